"""SubspaceProjection in a LightningModule that knows nothing of lightspan."""

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightspan.callbacks.training.subspace_projection import SubspaceProjection
from lightspan.core.errors import UserError
from lightspan.optim.low_rank.optimizer import LowRank


class Plain(lightning.LightningModule):
    """Anyone's module: AdamW, a per-step schedule, and a record of the rates it trained with."""

    def __init__(self, optimizer=torch.optim.AdamW):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 4))
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.3
        self.make, self.rates, self.norms, self.losses = optimizer, [], [], []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        held = [p.grad.norm() for p in self.parameters() if p.grad is not None]
        self.norms.append(torch.stack(held).norm().item())

    def configure_optimizers(self):
        optimizer = self.make(self.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader(batch_size):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 10, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, :4]).argmax(dim=1)), batch_size=batch_size)


def fit(module, callbacks, tmp_path, batch_size=16, **options):
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=options.pop("max_steps", 20),
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )
    trainer.fit(module, loader(batch_size))
    return trainer


def test_one_line_makes_anyones_optimiser_low_rank_and_it_learns(tmp_path):
    module = Plain()
    trainer = fit(module, [SubspaceProjection(rank=3)], tmp_path, max_steps=80)
    assert isinstance(trainer.optimizers[0], LowRank)
    assert trainer.optimizers[0].state[module.net[0].weight]["exp_avg"].shape == (16, 3)
    assert sum(module.losses[-8:]) < 0.6 * sum(module.losses[:8])


@pytest.mark.filterwarnings("error:.*lr_scheduler.step.*:UserWarning")
def test_the_schedule_goes_on_as_without_the_callback(tmp_path):
    plain, projected = Plain(), Plain()
    fit(plain, [], tmp_path)
    fit(projected, [SubspaceProjection(rank=3)], tmp_path)
    assert projected.rates == plain.rates
    assert projected.rates[-1] < projected.rates[0]


def test_accumulated_micro_batches_equal_one_large_batch(tmp_path):
    whole, parts = Plain(), Plain()
    fit(whole, [SubspaceProjection(rank=3)], tmp_path, batch_size=32)
    fit(parts, [SubspaceProjection(rank=3)], tmp_path, batch_size=8, accumulate_grad_batches=4)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_trainers_clipping_by_norm_is_done_in_the_step(tmp_path):
    class ClippedByHand(Plain):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters(), 0.05)

    by_trainer, by_hand = Plain(), ClippedByHand()
    fit(by_trainer, [SubspaceProjection(rank=3)], tmp_path, gradient_clip_val=0.05)
    fit(by_hand, [SubspaceProjection(rank=3)], tmp_path)
    assert max(by_trainer.norms) > 0.06  # so that clipping had something to do; gradients themselves stay as they are
    for a, b in zip(by_trainer.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_same_trainer_clips_in_a_second_fit_and_shows_modules_its_own_setting(tmp_path):
    class Looks(Plain):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            seen.append(gradient_clip_val)
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    seen = []
    first, second, other = Looks(), Looks(), Looks()
    trainer = fit(first, [SubspaceProjection(rank=3)], tmp_path, gradient_clip_val=0.05)
    for module in (second, other):
        if module is other:
            trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, SubspaceProjection)]
        trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.reset()
        trainer.fit(module, loader(16))
    assert seen == [0.05] * 60
    assert trainer.gradient_clip_val == 0.05
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert max(second.norms) > 0.06  # clipped inside the step, as in the first fit
    assert max(other.norms) < 0.051  # AdamW's gradients are clipped by Lightning as ever


def test_a_fit_that_fails_leaves_the_trainers_clipping_as_it_was(tmp_path):
    class Fails(Plain):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("mid-air")

    trainers = []

    class Sees(lightning.Callback):
        def on_fit_start(self, trainer, pl_module):
            trainers.append(trainer)

    with pytest.raises(RuntimeError, match="mid-air"):
        fit(Fails(), [SubspaceProjection(rank=3), Sees()], tmp_path, gradient_clip_val=0.05)
    assert trainers[0].gradient_clip_val == 0.05


def test_a_module_that_clips_some_steps_alone_has_only_these_clipped(tmp_path):
    class Sometimes(Plain):
        clips = staticmethod(lambda step: step % 3 == 0)

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            if self.clips(len(self.rates)):
                self.clip_gradients(optimizer, 0.05, "norm")

    class ByHand(Plain):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            if Sometimes.clips(len(self.rates)):
                torch.nn.utils.clip_grad_norm_(self.parameters(), 0.05)

    sides = Sometimes(), ByHand()
    for module in sides:
        fit(module, [SubspaceProjection(rank=3)], tmp_path)
    for a, b in zip(*(side.parameters() for side in sides), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


class Adversaries(Plain):
    """Two optimisers and a third for a scalar, stepped and clipped by hand."""

    def __init__(self):
        super().__init__()
        self.temperature, self.automatic_optimization = nn.Parameter(torch.zeros(())), False

    def training_step(self, batch, batch_idx):
        x, y = batch
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self.net(x) * self.temperature.exp(), y))
            self.clip_gradients(optimizer, 0.05, "norm")
            optimizer.step()
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self):
        first, second = (torch.optim.AdamW(part.parameters(), lr=0.02) for part in (self.net[0], self.net[2]))
        scalar = torch.optim.SGD([self.temperature], lr=0.1)
        return [first, second, scalar], [torch.optim.lr_scheduler.StepLR(o, 2) for o in (first, second, scalar)]


@pytest.mark.parametrize("backward", ["whole", "hooks"])
def test_of_several_optimisers_the_matched_ones_are_exchanged_and_clipped_in_their_steps(tmp_path, backward):
    module = Adversaries()
    callback = SubspaceProjection(rank=3, match=["net.0.*"], residual=None, backward=backward)
    before = module.temperature.item()
    trainer = fit(module, [callback], tmp_path, max_steps=12)
    first, second, scalar = trainer.optimizers
    assert [type(o) for o in (first, second, scalar)] == [LowRank, torch.optim.AdamW, torch.optim.SGD]
    assert all(o.param_groups[0]["lr"] < 1e-3 for o in (first, second))  # each schedule steps its own optimiser
    assert module.temperature.item() != before
    assert first.max_norm is None  # what was asked for before one step held for that step


@pytest.mark.parametrize("backward", ["hooks", "projected"])
def test_gradients_kept_in_coordinates_train_as_whole_ones_do(tmp_path, backward):
    whole, kept = Plain(), Plain()
    for module, mode in ((whole, "whole"), (kept, backward)):
        callback = SubspaceProjection(rank=3, residual=None, refresh=3, backward=mode)
        fit(module, [callback], tmp_path, accumulate_grad_batches=2)
    for a, b in zip(whole.parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_clipping_by_value_cannot_reach_gradients_in_coordinates(tmp_path):
    callback = SubspaceProjection(rank=3, residual=None, backward="hooks")
    with pytest.raises(UserError, match="can only be clipped by norm"):
        fit(Plain(), [callback], tmp_path, gradient_clip_val=0.05, gradient_clip_algorithm="value")


def test_a_checkpoint_taken_under_the_callback_resumes_bit_for_bit(tmp_path):
    # One batch an epoch: a plain DataLoader forgets its place within an epoch, which is not what is tested here.
    straight, first, second = Plain(), Plain(), Plain()
    fit(straight, [SubspaceProjection(rank=3, refresh=3)], tmp_path, batch_size=64, max_steps=16)
    trainer = fit(first, [SubspaceProjection(rank=3, refresh=3)], tmp_path, batch_size=64, max_steps=8)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = lightning.Trainer(
        accelerator="cpu", max_steps=16, max_epochs=-1, callbacks=[SubspaceProjection(rank=3, refresh=3)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    resumed.fit(second, loader(64), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (SubspaceProjection(rank=64), r"rank=64 is not below the shorter side of any matrix \(the largest is 10\)"),
        (
            SubspaceProjection(rank=2, match=["encoder.*"]),
            r"pattern 'encoder\.\*' matches no trained parameter of Plain",
        ),
    ],
)
def test_what_cannot_be_projected_is_refused_before_the_first_step(callback, message, tmp_path):
    module = Plain()
    with pytest.raises(UserError, match=message):
        fit(module, [callback], tmp_path)
    assert module.losses == []


def test_without_match_what_groups_count_as_matrices_is_projected_and_the_table_says_the_rest(tmp_path, capsys):
    class Tokens(Plain):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 10)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.table.weight.square().mean()

    module = Tokens()
    fit(module, [SubspaceProjection(rank=2, scale=4.0)], tmp_path)
    said = capsys.readouterr().out
    assert "AdamW: not selected" in said
    assert "0.02 x 4" in said
    optimizer = module.trainer.optimizers[0]
    assert optimizer.state[module.net[0].weight]["exp_avg"].shape == (16, 2)
    assert optimizer.state[module.table.weight]["exp_avg"].shape == (9, 10)


def test_an_optimiser_without_adams_moments_is_refused(tmp_path):
    with pytest.raises(UserError, match="only Adam and AdamW can be made low-rank, but this module's optimiser is SGD"):
        fit(Plain(torch.optim.SGD), [SubspaceProjection(rank=2)], tmp_path)


def test_settings_out_of_range_are_refused_when_the_callback_is_built():
    wrong = {"rank": "64", "scale": 0.0, "seed": 1.5, "backward": "half", "offload": 1, "owners": 1}
    for name, value in wrong.items():
        with pytest.raises(UserError, match=f"SubspaceProjection {name}={value!r}"):
            SubspaceProjection(**{name: value})
