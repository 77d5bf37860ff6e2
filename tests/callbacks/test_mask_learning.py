"""MaskLearning in a LightningModule that knows nothing of lightspan."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightspan.adapters.lora import LoRA
from lightspan.callbacks.training.adaptation import Adaptation
from lightspan.callbacks.training.intrinsic_dimension import IntrinsicDimension
from lightspan.callbacks.training.mask_learning import FILE, MaskLearning
from lightspan.callbacks.training.subspace_projection import SubspaceProjection
from lightspan.errors import UserError
from lightspan.loggers.jsonl import JsonlLogger
from lightspan.merging.arithmetic import StoredMask
from lightspan.optim.low_rank import LowRank
from lightspan.optim.masks.by_gradient import ByGradient
from lightspan.optim.masks.by_score import ByScore
from lightspan.optim.masks.drop_and_grow import DropAndGrow
from lightspan.optim.masks.learner import MaskLearner
from lightspan.report.runs import load_run
from lightspan.report.sections import sections
from lightspan.subspaces.masks.allocation import AllTogether, ErdosRenyi
from lightspan.subspaces.masks.distributions import HardConcrete, concrete
from lightspan.subspaces.masks.draws import uniform
from lightspan.subspaces.masks.schedules import Cubic, Linear
from lightspan.subspaces.masks.scores import Movement
from lightspan.tensor_files import Form

ADAM = partial(torch.optim.Adam, lr=0.1)
LEARNERS: dict[str, Callable[[], MaskLearner]] = {
    "concrete": lambda: ByGradient(optimizer=ADAM),
    "hard concrete": lambda: ByGradient(HardConcrete(), Linear(1.0, 0.3), optimizer=ADAM, start=2.0),
    "the weights' own optimiser": lambda: ByGradient(),
    "magnitude": lambda: ByScore(every=3),
    "movement": lambda: ByScore(Movement(), memory=1.0, every=3),
    "drop and grow": lambda: DropAndGrow(every=3),
}
WEIGHTS = ["net.0.weight", "net.2.weight"]


class Plain(lightning.LightningModule):
    def __init__(self, optimizer: Any = torch.optim.AdamW, lr: float = 0.02, dtype: torch.dtype = torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 4))
        for p in self.parameters():
            p.data = (torch.randn(p.shape, generator=generator) * 0.3).to(dtype)
        self.make, self.losses = partial(optimizer, lr=lr), []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x.to(self.net[0].weight.dtype)), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Watch(lightning.Callback):
    """Calls a function after every batch; after MaskLearning, if it stands behind it."""

    def __init__(self, look: Callable[[lightning.Trainer, Any], None]) -> None:
        self.look = look

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *rest: Any) -> None:
        self.look(trainer, pl_module)


def loader(batch_size: int) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 10, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :4].argmax(dim=1)), batch_size=batch_size)


def fit(module: Any, callbacks: list[Any], tmp_path: Path, batch_size: int = 16, **options: Any) -> lightning.Trainer:
    resumed = {"ckpt_path": path, "weights_only": True} if (path := options.pop("ckpt_path", None)) else {}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=options.pop("max_steps", 20),
        max_epochs=-1,
        callbacks=callbacks,
        logger=options.pop("logger", False),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )
    trainer.fit(module, loader(batch_size), **resumed)
    return trainer


def weights(module: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(weights(a), weights(b), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", LEARNERS)
def test_any_module_learns_with_few_weights_and_ends_as_plain_weights(kind: str, tmp_path: Path) -> None:
    module, plain = Plain(), Plain()
    callback = MaskLearning(["net.*.weight"], LEARNERS[kind](), density=0.3)
    trainer = fit(module, [callback], tmp_path, max_steps=80)
    assert type(trainer.optimizers[0]) is torch.optim.AdamW
    assert module.state_dict().keys() == plain.state_dict().keys()
    for name, count in (("net.0.weight", 48), ("net.2.weight", 19)):
        assert callback.masks[name].sum() == count
        assert not weights(module)[name][~callback.masks[name]].any()
        assert weights(module)[name][callback.masks[name]].all()
    assert sum(module.losses[-8:]) < 0.9 * sum(module.losses[:8])
    for name, weight in module.state_dict().items():  # every tensor has a mask, as merging asks for
        mask = StoredMask(str(tmp_path / FILE)).of(name, Form(tuple(weight.shape), weight.dtype))
        assert torch.equal(mask.bool(), callback.masks.get(name, torch.ones(weight.shape, dtype=torch.bool)))


def test_a_mask_that_leaves_everything_open_changes_nothing(tmp_path: Path) -> None:
    plain, scored, grown, soft = Plain(), Plain(), Plain(), Plain()
    fit(plain, [], tmp_path)
    for module, mask in ((scored, ByScore(every=2)), (grown, DropAndGrow(every=2))):
        fit(module, [MaskLearning(["*"], mask, density=1.0)], tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))
    fit(soft, [MaskLearning(["*"], ByGradient(optimizer=partial(torch.optim.SGD, lr=0.0), start=40.0), 1.0)], tmp_path)
    close(soft, plain)


def test_learning_by_gradient_is_gradient_descent_through_the_sampled_mask(tmp_path: Path) -> None:
    """An oracle with w m written into the loss: weights and logits after every step."""
    steps, rate, temperature = 6, 0.5, 0.7
    module, other = (Plain(torch.optim.SGD, lr=0.1, dtype=torch.float64) for _ in range(2))
    callback = MaskLearning(
        WEIGHTS,
        ByGradient(temperature=temperature, optimizer=partial(torch.optim.SGD, lr=rate)),
        1.0,
        until=1.0,
        seed=3,
    )
    seen: list[dict[str, Tensor]] = []
    watch = Watch(lambda trainer, m: seen.append({k: v.clone() for k, v in weights(m).items()}))
    fit(module, [Watch(lambda *_: None), watch, callback], tmp_path, max_steps=steps)
    logits = {name: torch.zeros_like(weights(other)[name], requires_grad=True) for name in WEIGHTS}
    optimizer = other.configure_optimizers()
    batches = [batch for _ in range(3) for batch in loader(16)]
    for step in range(steps - 1):
        x, y = batches[step]
        named = dict(other.named_parameters())
        masks = {
            name: concrete(logits[name], temperature, uniform(3, step, name, named[name].shape, dtype=torch.float64))
            for name in WEIGHTS
        }
        used = {name: p * masks[name] if name in masks else p for name, p in named.items()}
        used = {name.removeprefix("net."): p for name, p in used.items()}
        loss = nn.functional.cross_entropy(torch.func.functional_call(other.net, used, x.double()), y)
        assert module.losses[step] == pytest.approx(loss.item(), rel=1e-12)
        optimizer["optimizer"].zero_grad()
        loss.backward()
        optimizer["optimizer"].step()
        optimizer["lr_scheduler"]["scheduler"].step()
        with torch.no_grad():
            for logit in logits.values():
                logit -= rate * logit.grad
                logit.grad = None
        torch.testing.assert_close(seen[step], weights(other), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", LEARNERS)
def test_accumulated_micro_batches_equal_one_large_batch(kind: str, tmp_path: Path) -> None:
    whole, parts = Plain(), Plain()
    masks = []
    for module, options in ((whole, {"batch_size": 32}), (parts, {"batch_size": 8, "accumulate_grad_batches": 4})):
        callback = MaskLearning(WEIGHTS, LEARNERS[kind](), density=Cubic(1.0, 0.3))
        fit(module, [callback], tmp_path, **options)
        masks.append(callback.masks)
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in WEIGHTS)
    close(whole, parts)


def test_what_is_clipped_are_the_gradients_of_open_weights(tmp_path: Path) -> None:
    norms = []

    class Clips(Plain):
        def configure_gradient_clipping(self, optimizer: Any, *rest: Any, **settings: Any) -> None:
            assert not self.net[0].weight.grad[self.net[0].weight == 0].any()
            super().configure_gradient_clipping(optimizer, *rest, **settings)
            norms.append(torch.stack([p.grad.norm() for p in self.parameters()]).norm().item())

    fit(Clips(), [MaskLearning(WEIGHTS, DropAndGrow(alpha=0.0))], tmp_path, gradient_clip_val=0.05)
    assert len(norms) == 20
    assert max(norms) == pytest.approx(0.05, rel=1e-3)


def test_moments_of_dropped_coordinates_vanish_and_new_ones_start_clean(tmp_path: Path) -> None:
    before: dict[str, Tensor] = {}
    moved = []

    def look(trainer: lightning.Trainer, module: Plain) -> None:
        for name in WEIGHTS:
            weight = dict(module.named_parameters())[name]
            state, mask = trainer.optimizers[0].state[weight], callback.mask.factor(name)
            for moment in (state["exp_avg"], state["exp_avg_sq"], weight):
                assert not moment[~mask].any()
            if name in before and trainer.global_step % 3 == 0:
                grown = mask & ~before[name]
                moved.append(int(grown.sum()))
                assert not state["exp_avg"][grown].any()
                assert not weight[grown].any()
            assert mask.sum() == {"net.0.weight": 48, "net.2.weight": 19}[name]
            before[name] = mask.clone()

    callback = MaskLearning(WEIGHTS, DropAndGrow(every=3), density=0.3, until=1.0)
    fit(Plain(), [callback, Watch(look)], tmp_path, max_steps=15)
    assert sum(moved) > 10


@pytest.mark.parametrize("last", [True, False])  # the callback that saves stands behind MaskLearning, or before it
@pytest.mark.parametrize("at", [6, 13])  # at an update while the mask is learned, and after it was fixed
@pytest.mark.parametrize("kind", LEARNERS)
def test_a_resumed_run_has_every_bit_of_the_straight_one(kind: str, at: int, last: bool, tmp_path: Path) -> None:
    def masks() -> MaskLearning:
        return MaskLearning(WEIGHTS, LEARNERS[kind](), density=Cubic(1.0, 0.3), until=0.6)

    def save(trainer: lightning.Trainer, module: Plain) -> None:
        if trainer.global_step == at:
            trainer.save_checkpoint(tmp_path / "part.ckpt")

    straight, resumed, callbacks = Plain(), Plain(), (masks(), masks())
    # One batch an epoch: a plain DataLoader forgets its place within an epoch, which is not what is tested here.
    both = [callbacks[0], Watch(save)]
    fit(straight, both if last else both[::-1], tmp_path, batch_size=64, max_steps=18)
    fit(resumed, [callbacks[1]], tmp_path, batch_size=64, max_steps=18, ckpt_path=tmp_path / "part.ckpt")
    assert resumed.losses == straight.losses[at:]
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    assert all(torch.equal(callbacks[0].masks[name], callbacks[1].masks[name]) for name in WEIGHTS)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", ["concrete", "magnitude", "drop and grow"])
def test_in_half_precision_counts_stay_exact(kind: str, precision: str, tmp_path: Path) -> None:
    module = Plain()
    callback = MaskLearning(WEIGHTS, LEARNERS[kind](), density=0.3)
    fit(module, [callback], tmp_path, precision=precision)
    assert callback.masks["net.0.weight"].sum() == 48
    assert (module.net[0].weight != 0).sum() == 48
    assert all(p.isfinite().all() for p in module.parameters())


def test_validation_runs_with_the_mean_mask_and_training_goes_on_with_the_weights(tmp_path: Path) -> None:
    class Validates(Plain):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            seen.append((self.net[0].weight.clone(), self.trainer.sanity_checking))

    seen: list[tuple[Tensor, bool]] = []
    plain, module = Plain(), Validates()
    callback = MaskLearning(WEIGHTS, ByGradient(optimizer=ADAM, start=1.0), 1.0, until=1.0)
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=4, callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, val_check_interval=2,
        accumulate_grad_batches=2, max_epochs=-1,
    )  # fmt: skip
    trainer.fit(module, loader(16), loader(64))
    fit(plain, [MaskLearning(WEIGHTS, ByGradient(optimizer=ADAM, start=1.0), 1.0, until=1.0)], tmp_path,
        max_steps=4, accumulate_grad_batches=2)  # fmt: skip
    assert module.losses == plain.losses
    assert torch.equal(seen[0][0], Plain().net[0].weight)  # the sanity check comes before there is a mask
    start = Plain().net[0].weight
    in_use = [weight for weight, sanity in seen if not sanity]
    assert (in_use[0].abs() < 0.9 * start.abs()).float().mean() > 0.8


def test_a_checkpoint_of_any_moment_holds_the_weights_not_those_in_use(tmp_path: Path) -> None:
    """As one that is written on a signal while the module is validated."""

    class Saves(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.look()
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.look()

        def look(self) -> None:
            used, shown, copied = self.net[0].weight, self.state_dict(), copy.deepcopy(self.net).state_dict()
            if not self.trainer.sanity_checking:
                assert torch.equal(shown["net.0.weight"], at_rest[-1])
                assert callback.masks or not torch.equal(used, at_rest[-1])  # once fixed, they are the same
                assert torch.equal(copied["0.weight"], used)
                looked.append(self.trainer.validating)

    module, looked = Saves(), []
    at_rest = [module.net[0].weight.detach().clone()]
    callback = MaskLearning(WEIGHTS, ByGradient(optimizer=ADAM), 1.0, until=1.0)
    watch = Watch(lambda trainer, m: at_rest.append(m.net[0].weight.detach().clone()))
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=3, callbacks=[watch, callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, val_check_interval=1,
        max_epochs=-1,
    )  # fmt: skip
    trainer.fit(module, loader(16), loader(64))
    assert looked.count(True) >= 2
    assert looked.count(False) == 3
    assert not module._state_dict_hooks


def test_a_run_that_breaks_off_leaves_the_weights_not_those_in_use(tmp_path: Path) -> None:
    class Breaks(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            assert not torch.equal(self.net[0].weight, Plain().net[0].weight)
            raise RuntimeError("mid-air")

    module = Breaks()
    with pytest.raises(RuntimeError, match="mid-air"):
        fit(module, [MaskLearning(WEIGHTS, ByGradient(optimizer=ADAM), 1.0)], tmp_path)
    assert torch.equal(module.net[0].weight, Plain().net[0].weight)


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_step_that_is_not_taken_changes_no_mask(kind: str, tmp_path: Path) -> None:
    class Skips(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            return loss if self.trainer.global_step < 4 else None

    states = []
    module = Skips()
    callback = MaskLearning(WEIGHTS, LEARNERS[kind](), density=1.0, until=1.0)
    watch = Watch(lambda trainer, m: states.append((callback.mask.state_dict(), weights(m)["net.0.weight"].clone())))
    fit(module, [callback, watch], tmp_path, max_steps=8)
    torch.testing.assert_close(states[3], states[-2], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["concrete", "magnitude", "drop and grow"])
def test_together_with_a_low_rank_optimiser_steps_are_cut_to_the_mask(kind: str, tmp_path: Path) -> None:
    module = Plain()
    callback = MaskLearning(WEIGHTS, LEARNERS[kind](), density=0.4, until=0.5)
    trainer = fit(module, [callback, SubspaceProjection(rank=3)], tmp_path, max_steps=60)
    assert isinstance(trainer.optimizers[0], LowRank)
    assert (module.net[0].weight != 0).sum() == 64
    assert sum(module.losses[-8:]) < 0.9 * sum(module.losses[:8])


def test_parameters_of_adapters_have_masks_like_any_other(tmp_path: Path) -> None:
    module = Plain()
    adaptation = Adaptation(LoRA(rank=3), ["net.0"], train=["net.2.*"])
    callback = MaskLearning(["net.0.adapters.*"], DropAndGrow(every=3), density=0.5)
    fit(module, [adaptation, callback], tmp_path)
    assert len(callback.masks) == 2
    assert all((weights(module)[name] != 0).sum() <= mask.sum() for name, mask in callback.masks.items())
    assert torch.equal(module.net[0].base.weight, Plain().net[0].weight)


def test_figures_are_logged_and_drawn_in_the_report(tmp_path: Path) -> None:
    logger = JsonlLogger(save_dir=str(tmp_path))
    callback = MaskLearning(WEIGHTS, ByGradient(temperature=Linear(1.0, 0.5), optimizer=ADAM), Cubic(1.0, 0.2))
    fit(Plain(), [callback], tmp_path, logger=logger, log_every_n_steps=5)
    run = load_run(tmp_path, "run")
    density = [point.value for point in run.points("mask/density")]
    assert len(density) == 4
    assert density[-1] == pytest.approx(0.2, abs=0.01)
    assert all(0 <= point.value <= 1 for point in run.points("mask/churn"))
    assert run.points("mask/temperature")[0].value == pytest.approx(1 - 0.5 / 3)
    assert run.points("mask/density/net.2.weight")[-1].value == 13 / 64
    (section,) = [section for section in sections([run]) if section.key == "mask"]
    titles = [chart.title for chart in section.charts]
    assert titles == ["mask/density", "mask/churn", "mask/temperature", "mask/density by matrix"]
    assert [x for x, _ in section.charts[-1].curves[0].points] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskLearning("net.*", ByScore()), r"match='net\.\*' must be a list of patterns"),
        (lambda: MaskLearning([], ByScore()), r"match=\[\] must be a list of patterns"),
        (lambda: MaskLearning(["*"], ByScore(), 0.0), r"MaskLearning density=0\.0 must be above 0 and at most 1"),
        (lambda: MaskLearning(["*"], ByScore(), 1.5), r"MaskLearning density=1\.5 must be above 0 and at most 1"),
        (lambda: MaskLearning(["*"], ByScore(), Cubic(1.0, 0.0)), r"MaskLearning density=0\.0 must be above 0"),
        (lambda: MaskLearning(["*"], ByScore(), until=0.0), r"until=0\.0 is a share of the run"),
        (lambda: ByScore(every=0), r"ByScore every=0 must be at least 1, and memory=0\.0 in \[0, 1\]"),
        (lambda: DropAndGrow(alpha=1.5), r"DropAndGrow every=100 must be at least 1, and alpha=1\.5 in \[0, 1\]"),
        (lambda: ByGradient(temperature=0.0), r"temperature=0\.0 of a mask must be a finite number above 0"),
        (lambda: ByGradient(temperature=Linear(1.0, -1.0)), r"temperature=-1\.0 of a mask must be"),
        (lambda: ByGradient(start=float("inf")), r"start=inf is a logit and must lie between -100 and 100"),
    ],
)
def test_values_out_of_range_are_refused_at_once(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


class ByHand(Plain):
    automatic_optimization = False


@pytest.mark.parametrize(
    ("module", "callbacks", "message"),
    [
        (Plain, [MaskLearning(["encoder.*"], ByScore())], r"pattern 'encoder\.\*' matches no parameter of Plain that"),
        (
            Plain,
            [Adaptation(LoRA(rank=2), ["net.0"]), MaskLearning(["net.0.base.weight"], ByScore())],
            r"pattern 'net\.0\.base\.weight' matches no parameter of Plain that trains",
        ),
        (Plain, [IntrinsicDimension(dim=5), MaskLearning(["*"], ByScore())], "MaskLearning, not both"),
        (
            Plain,
            [MaskLearning(["*"], DropAndGrow(), allocation=AllTogether())],
            "keeps a count for each tensor",
        ),
        (
            Plain,
            [MaskLearning(["*"], ByScore()), SubspaceProjection(rank=2, residual=None, backward="hooks")],
            r"LowRank\(backward='hooks'\) keeps their coordinates alone; set backward='whole'",
        ),
        (partial(Plain, torch.optim.LBFGS), [MaskLearning(["*"], ByScore())], "LBFGS evaluates the loss several times"),
        (
            partial(Plain, torch.optim.Adafactor),
            [MaskLearning(["*"], ByScore())],
            r"Adafactor keeps 'row_var' of shape \(2, 1\).*cannot follow a mask",
        ),
        (
            Plain,
            [MaskLearning(["*"], ByGradient()), SubspaceProjection(rank=2)],
            "the logits of ByGradient cannot be trained by a LowRank",
        ),
        (
            Plain,
            [MaskLearning(["*"], ByScore()), MaskLearning(["*.weight"], ByScore())],
            r"two entries of MaskLearning match net\.0\.weight; give each parameter one mask",
        ),
        (
            Plain,
            [MaskLearning(["*.bias"], ByScore()), MaskLearning(["*.weight"], ByScore())],
            "two entries of MaskLearning write to path=None; give each a path of its own",
        ),
        (ByHand, [MaskLearning(["*"], ByScore())], "ByHand steps by hand; set automatic_optimization=True"),
    ],
)
def test_what_makes_no_sense_together_is_refused_before_the_first_step(
    module: Callable[[], Plain], callbacks: list[Any], message: str, tmp_path: Path
) -> None:
    made = module()
    with pytest.raises(UserError, match=message):
        fit(made, callbacks, tmp_path)
    assert made.losses == []


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_lay_parameters_end_to_end_are_refused(kind: type) -> None:
    trainer = SimpleNamespace(strategy=object.__new__(kind), callbacks=[])
    with pytest.raises(UserError, match=f"{kind.__name__} lays them end to end; train with --config scale/fsdp2"):
        MaskLearning(["*"], ByScore()).on_fit_start(trainer, Plain())


def test_a_run_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs the run's length; set trainer.max_steps or trainer.max_epochs"):
        fit(Plain(), [MaskLearning(["*"], ByScore())], tmp_path, max_steps=-1)


def test_a_checkpoint_of_other_masks_is_refused(tmp_path: Path) -> None:
    trainer = fit(Plain(), [MaskLearning(WEIGHTS, ByGradient(optimizer=ADAM), 1.0, until=1.0)], tmp_path, max_steps=4)
    trainer.callbacks[0]._now = trainer.callbacks[0].mask  # as it was before it was fixed
    trainer.callbacks[0].masks = {}
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    for other, message in (
        (MaskLearning(WEIGHTS, DropAndGrow()), r"the saved masks have masks of shape none for net\.0\.weight"),
        (MaskLearning(["*.bias"], ByGradient(optimizer=ADAM)), r"resume with the match of that run"),
    ):
        with pytest.raises(UserError, match=message):
            fit(Plain(), [other], tmp_path, ckpt_path=tmp_path / "old.ckpt", max_steps=8)


def test_two_entries_learn_the_masks_of_different_parameters(tmp_path: Path) -> None:
    def entries() -> list[Any]:
        first = MaskLearning(["net.0.weight"], ByGradient(optimizer=ADAM), 0.5, path=str(tmp_path / "first"))
        return [first, MaskLearning(["net.2.weight"], DropAndGrow(every=3), 0.2, path=str(tmp_path / "second"))]

    def save(trainer: lightning.Trainer, module: Plain) -> None:
        if trainer.global_step == 7:
            trainer.save_checkpoint(tmp_path / "part.ckpt")

    straight, resumed, again = Plain(), Plain(), entries()
    fit(straight, [*entries(), Watch(save)], tmp_path, batch_size=64, max_steps=18)
    fit(resumed, again, tmp_path, batch_size=64, max_steps=18, ckpt_path=tmp_path / "part.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    assert [int(mask.sum()) for callback in again for mask in callback.masks.values()] == [80, 13]


def test_small_tensors_and_erdos_renyi(tmp_path: Path) -> None:
    """A scalar, an empty parameter and vectors are ordinary."""

    class Odd(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.none = nn.Parameter(torch.ones(())), nn.Parameter(torch.empty(0, 3))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * self.scale.exp() + self.none.sum()

    for kind, make in LEARNERS.items():
        callback = MaskLearning(["*"], make(), density=0.3, allocation=ErdosRenyi())
        fit(Odd(), [callback], tmp_path, max_steps=8)
        counts = {name: int(mask.sum()) for name, mask in callback.masks.items()}
        assert counts["scale"] == 1, kind
        assert counts["none"] == 0, kind
