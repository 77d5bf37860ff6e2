"""What follows an optimiser step follows each step that moved the weights, once, and nothing else."""

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import rank_processes
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightspan.callbacks.resilience.finite import FiniteLoss
from lightspan.callbacks.training.intrinsic_dimension import IntrinsicDimension
from lightspan.callbacks.training.subspace_projection import SubspaceProjection
from lightspan.optim.steps import steps_taken
from lightspan.training.method import Method
from lightspan.training.strategies import FSDP2

BATCHES, BAD = 4, 1


class Averaged(Method):
    """Averages its weights after each step. What batch `BAD` gives is up to `bad`."""

    def __init__(self, bad: str = "fine", make: Callable[..., Any] = torch.optim.SGD) -> None:
        super().__init__(lambda groups: make(groups, lr=0.1))
        torch.manual_seed(0)
        self.net = nn.Linear(6, 5, bias=False)
        self.average = nn.Linear(6, 5, bias=False).requires_grad_(False)
        self.average.load_state_dict(self.net.state_dict())
        self.bad, self.called, self.after = bad, list[int](), list[Tensor]()
        self.counted: list[tuple[int, int]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        self.batch_idx, self.step_of_batch = batch_idx, self.global_step
        if batch_idx == BAD and self.bad == "none":
            return None
        loss = self.net(batch).square().mean()
        return loss * float("inf") if batch_idx == BAD and self.bad == "infinite" else loss

    def after_optimizer_step(self) -> None:
        self.called.append(self.batch_idx)
        self.counted.append((self.step_of_batch, self.global_step))
        self.average.weight.lerp_(self.net.weight, 0.5)
        self.after.append(self.net.weight.detach().clone())


def data() -> DataLoader:
    """Equal batches, so that a resumed run needs no loader that knows where it was."""
    return DataLoader(torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).repeat(BATCHES, 1), batch_size=4)


def fit(module: LightningModule, folder: Path, **options: Any) -> Trainer:
    silent: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options = silent | {"enable_model_summary": False, "accelerator": "cpu", "max_epochs": 1} | options
    resume = options.pop("ckpt_path", None)
    trainer = Trainer(default_root_dir=folder, **options)
    trainer.fit(module, data(), ckpt_path=resume, weights_only=True)
    return trainer


def fused(params: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr, fused=True)


def scaled() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0))


ALL, GOOD = list(range(BATCHES)), [i for i in range(BATCHES) if i != BAD]
CASES: dict[str, tuple[str, Callable[..., Any], dict[str, Any], list[int]]] = {
    "every step": ("fine", torch.optim.SGD, {}, ALL),
    "accumulation": ("fine", torch.optim.SGD, {"accumulate_grad_batches": 2}, [1, 3]),
    "a batch without loss": ("none", torch.optim.AdamW, {}, GOOD),
    "a batch that FiniteLoss skips": (
        "infinite", torch.optim.AdamW, {"callbacks": lambda: [FiniteLoss("skip")]}, GOOD
    ),
    "a step that the scaler skips": ("infinite", torch.optim.SGD, {"plugins": lambda: [scaled()]}, GOOD),
    "a step that a fused optimiser skips": ("infinite", fused, {"plugins": lambda: [scaled()]}, GOOD),
    "low rank": ("none", torch.optim.AdamW, {"callbacks": lambda: [SubspaceProjection(rank=2)]}, GOOD),
    "gradients that never are": (
        "none", torch.optim.AdamW,
        {"callbacks": lambda: [SubspaceProjection(rank=2, residual=None, backward="projected")]}, GOOD,
    ),
    "a random subspace": ("none", torch.optim.AdamW, {"callbacks": lambda: [IntrinsicDimension(dim=4)]}, GOOD),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_follows_each_step_that_moved_the_weights_once(case: str, tmp_path: Path) -> None:
    bad, make, options, expected = CASES[case]
    module = Averaged(bad, make)
    before = [module.net.weight.detach().clone()]
    fit(module, tmp_path, **{key: value() if callable(value) else value for key, value in options.items()})
    assert module.called == expected
    seen = [*before, *module.after]
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))


@pytest.mark.parametrize(("accumulated", "steps"), [(1, [0, 1, 2, 3]), (2, [0, 1])])
def test_the_step_is_counted_afterwards(accumulated: int, steps: list[int], tmp_path: Path) -> None:
    module = Averaged()
    trainer = fit(module, tmp_path, accumulate_grad_batches=accumulated)
    assert module.counted == [(step, step) for step in steps]
    assert trainer.global_step == len(steps)


def test_a_checkpoint_of_a_step_holds_what_followed_it_and_a_resumed_run_goes_on_from_there(tmp_path: Path) -> None:
    straight = Averaged()
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(straight, tmp_path, callbacks=[saves], enable_checkpointing=True)
    resumed = Averaged()
    fit(resumed, tmp_path, ckpt_path=tmp_path / "step=2.ckpt")
    assert resumed.called == [2, 3]
    assert torch.equal(resumed.average.weight, straight.average.weight)


def test_any_optimiser_tells_its_real_steps_from_when_it_is_asked() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight], lr=0.1)
    assert steps_taken(optimizer) == 0
    optimizer.step()
    assert steps_taken(optimizer) == 0
    weight.grad = torch.ones(2)
    optimizer.step()
    optimizer.step(lambda: 0.0)
    assert steps_taken(optimizer) == 2


def ranks_average(rank: int, folder: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    for strategy in ("ddp", FSDP2()):
        module = Averaged()
        options: dict[str, Any] = {"strategy": strategy, "devices": 2, "accumulate_grad_batches": 2}
        fit(module, Path(folder), use_distributed_sampler=False, **options)
        assert module.called == [1, 3]
        averages = module.average.weight
        whole = averages.full_tensor() if hasattr(averages, "full_tensor") else averages
        torch.testing.assert_close(whole, torch.load(f"{folder}/alone.pt"), rtol=1e-6, atol=1e-7)


def test_ranks_average_as_one_process_does(tmp_path: Path) -> None:
    alone = Averaged()
    fit(alone, tmp_path, accumulate_grad_batches=2)
    torch.save(alone.average.weight.detach(), tmp_path / "alone.pt")
    rank_processes.start(ranks_average, 2, str(tmp_path), rank_processes.free_port())
