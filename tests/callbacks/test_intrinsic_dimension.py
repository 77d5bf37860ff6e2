"""IntrinsicDimension in a LightningModule that knows nothing of lightspan."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from rank_processes import callback
from rank_processes import fit as launched
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightspan.callbacks.training.intrinsic_dimension import IntrinsicDimension
from lightspan.core.errors import UserError
from lightspan.optim.random_subspace import RandomSubspace
from lightspan.optim.subspace_file import apply_subspace
from lightspan.subspaces.projections import Sparse


class Plain(lightning.LightningModule):
    """Anyone's module: a per-step schedule, and a record of rates and losses."""

    def __init__(self, optimizer: Any = torch.optim.AdamW, seed: int = 0, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 4))
        self.make, self.settings = optimizer, {"lr": 0.05, **settings}
        self.rates: list[float] = []
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = self.make(self.parameters(), **self.settings)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader(batch_size: int) -> DataLoader:
    x = torch.randn(64, 10, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x[:, :4].argmax(dim=1)), batch_size=batch_size)


def trainer(callback: IntrinsicDimension | None, folder: Path, steps: int = 20, **options: Any) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        callbacks=[callback] if callback else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


def fit(module, callback, folder, batch_size=16, ckpt_path=None, **options) -> lightning.Trainer:
    made = trainer(callback, folder, **options)
    made.fit(module, loader(batch_size), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return made


def weights(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_one_line_trains_anyones_module_in_sixty_numbers(tmp_path, capsys) -> None:
    module = Plain()
    done = fit(module, IntrinsicDimension(60), tmp_path, steps=80)
    (optimizer,) = done.optimizers
    assert isinstance(optimizer, RandomSubspace)
    assert type(optimizer.inner) is torch.optim.AdamW
    assert optimizer.z_d.shape == (60,)
    assert sum(module.losses[-8:]) < 0.8 * sum(module.losses[:8])
    assert "60 coordinates move 244 weights, one number for 4" in capsys.readouterr().out


@pytest.mark.filterwarnings("error:.*lr_scheduler.step.*:UserWarning")
def test_the_schedule_goes_on_as_without_the_callback(tmp_path) -> None:
    plain, inside = Plain(), Plain()
    fit(plain, None, tmp_path)
    fit(inside, IntrinsicDimension(9), tmp_path)
    assert inside.rates == plain.rates
    assert inside.rates[-1] < inside.rates[0]


def test_settings_of_the_modules_optimiser_go_to_the_coordinates(tmp_path) -> None:
    module = Plain(torch.optim.SGD, momentum=0.8, nesterov=True, weight_decay=0.1)
    (optimizer,) = fit(module, IntrinsicDimension(9), tmp_path, steps=2).optimizers
    inner = optimizer.inner.param_groups[0]
    assert type(optimizer.inner) is torch.optim.SGD
    assert (inner["momentum"], inner["nesterov"], inner["weight_decay"]) == (0.8, True, 0.0)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_accumulation_and_clipping_work_as_without_it(tmp_path) -> None:
    whole, parts = Plain(), Plain()
    fit(whole, IntrinsicDimension(9), tmp_path, batch_size=32, gradient_clip_val=0.05)
    fit(parts, IntrinsicDimension(9), tmp_path, batch_size=8, accumulate_grad_batches=4, gradient_clip_val=0.05)
    torch.testing.assert_close(weights(parts), weights(whole), atol=1e-5, rtol=1e-4)


@pytest.mark.sample(2)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("options", [{}, {"layer_scales": True, "projection": Sparse}, {"per_tensor": True}])
def test_a_run_stopped_and_resumed_is_the_straight_one_bit_for_bit(tmp_path, options, precision) -> None:
    # One batch an epoch: a plain DataLoader forgets its place within an epoch, which is not what is tested here.
    straight, first, second = Plain(), Plain(), Plain()
    common = {"batch_size": 64, "precision": precision}
    fit(straight, IntrinsicDimension(9, **options), tmp_path, steps=16, **common)
    done = fit(first, IntrinsicDimension(9, **options), tmp_path, steps=8, **common)
    done.save_checkpoint(tmp_path / "half.ckpt")
    fit(second, IntrinsicDimension(9, **options), tmp_path, steps=16, ckpt_path=tmp_path / "half.ckpt", **common)
    assert len(second.losses) == 8
    assert torch.equal(weights(second), weights(straight))


def test_a_checkpoint_of_other_initial_weights_is_refused(tmp_path) -> None:
    done = fit(Plain(), IntrinsicDimension(9), tmp_path, steps=4)
    done.save_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(UserError, match="belong to other initial weights"):
        fit(Plain(seed=1), IntrinsicDimension(9), tmp_path, steps=8, ckpt_path=tmp_path / "half.ckpt")


@pytest.mark.parametrize("options", [{}, {"per_tensor": True, "layer_scales": True}])
def test_the_file_a_run_leaves_makes_its_weights_from_the_initial_ones_bit_for_bit(tmp_path, options) -> None:
    module = Plain()
    fit(module, IntrinsicDimension(9, seed=5, **options), tmp_path)
    fresh = Plain()
    apply_subspace(tmp_path / "subspace.safetensors", fresh)
    assert torch.equal(weights(fresh), weights(module))


def test_the_file_goes_where_it_is_wanted(tmp_path) -> None:
    fit(Plain(), IntrinsicDimension(9, path=str(tmp_path / "there" / "z.safetensors")), tmp_path, steps=2)
    assert (tmp_path / "there" / "z.safetensors").is_file()


class TwoOptimisers(Plain):
    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]


class Inside(Plain):
    def configure_optimizers(self):
        return RandomSubspace(self.named_parameters(), lambda params: torch.optim.SGD(params, lr=0.1), 3)


class OtherRates(Plain):
    def configure_optimizers(self):
        groups = [{"params": self.net[0].parameters()}, {"params": self.net[2].parameters(), "lr": 0.2}]
        return torch.optim.AdamW(groups, lr=0.1)


@pytest.mark.parametrize(
    ("kind", "dim", "message"),
    [
        (TwoOptimisers, 9, "TwoOptimisers has 2 optimisers, IntrinsicDimension trains with one"),
        (Inside, 9, "is already a RandomSubspace"),
        (OtherRates, 9, "groups have lr=0.1 and 0.2, but one set of coordinates"),
        (Plain, 245, "dim=245 must be at least 1 and at most the 244 weights"),
    ],
)
def test_what_cannot_be_trained_so_is_refused_before_the_first_step(tmp_path, kind, dim, message) -> None:
    module = kind()
    module.automatic_optimization = kind is not TwoOptimisers
    with pytest.raises(UserError, match=message):
        fit(module, IntrinsicDimension(dim), tmp_path)
    assert module.losses == []


@pytest.mark.ranks
@pytest.mark.parametrize("poisoned", [None, 5], ids=["sound rows", "a step skipped"])
def test_two_ranks_under_ddp_exchange_coordinates_and_train_as_one(tmp_path, poisoned) -> None:
    """A step that `FiniteLoss` skips moves neither coordinates nor moments of Adam, which would move them later."""
    flags = callback("subspace", "lightspan.callbacks.training.intrinsic_dimension.IntrinsicDimension", dim=12)
    if poisoned is not None:
        flags += callback("finite", "lightspan.callbacks.resilience.finite.FiniteLoss", policy="skip")
        flags += [f"data.init_args.poisoned={poisoned}"]
    numbers = []
    for ranks in (1, 2):
        ended = launched(tmp_path / f"{ranks}", *flags, ranks=ranks)
        assert ended.statuses == [0] * ranks, ended.said
        assert ended.said.count("skipped: step") == (0 if poisoned is None else 2)  # once in each of two epochs
        numbers.append(load_file(tmp_path / f"{ranks}" / "subspace.safetensors")["coordinates"])
    assert numbers[0].norm() > 0
    torch.testing.assert_close(numbers[1], numbers[0], rtol=1e-4, atol=1e-6)
