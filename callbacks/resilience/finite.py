"""A loss or gradient that is not finite ends the run and names its batch, or skips the step; weights never see it."""

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightspan.callbacks.resilience.step_capture import StepCapture
from lightspan.core.distributed import rank, world_size
from lightspan.core.errors import UserError, printable
from lightspan.core.files.places import RunPath
from lightspan.core.sharded import local_numbers, square_norms
from lightspan.optim.matrices.matrix_optimizer import MatrixOptimizer


class FiniteLoss(Callback):
    """Checks the losses of an optimiser step and its gradients before the optimiser sees them.

    One host synchronisation per step, on any number of ranks and accumulated micro-batches: the losses and the
    largest norm of a gradient stay on the device, their maxima are reduced over ranks there, and one small tensor is
    read. All ranks read the same numbers, so all of them stop at, or skip, the same step. Norms, because second moments
    are squares, which overflow above 1.8e19 in float32: a matrix with a larger gradient would never move again.

    "stop" raises on every rank before the optimiser's step: no weight, no optimiser state and no checkpoint has seen
    the batch, so the last checkpoint is a good one. "skip" clears the gradients of that step on all ranks instead: the
    optimiser finds none and changes nothing; step, schedule and data continue; the figure `skipped_steps` is logged.
    Skipping cannot fix a network that is not finite itself, such as running means that include the batch: then, and
    after `most_skips` steps, it stops too.

    A `MatrixOptimizer`, such as `LowRank`, checks its gradients itself. If this callback sees them, it switches that
    second check off until the
    fit ends, and with it a second synchronisation; with backward="hooks" or "projected" gradients are kept in
    coordinates, which the optimiser alone sees, and it stops the run under either policy. With gradient scaling
    (16-mixed) infinite gradients are part of the method, and with DeepSpeed they are out of reach: only the loss is
    checked, and "skip" is refused.

    With `folder`, either policy also captures the step: its weights, micro-batches and random states, from which
    `lightspan replay` finds the module in which it begins; see `lightspan.callbacks.resilience.step_capture`.

    Args:
        policy: "stop" or "skip".
        most_skips: skipped steps of this run, resumes included, that are still tolerated; >= 0.
        folder: where captures go, usually ${run}/captures. None captures nothing.
        most_captures: steps of a run that are captured, >= 0.
        most_capture_mib: size of a module's parameters and buffers above which nothing is captured.

    Raises: UserError, with step, epoch, place in the epoch, samples if the batch names them, rank, and the first
        parameter or gradient that is not finite.
    """

    alters_training = False  # a step with finite numbers is the same with or without it

    def __init__(
        self,
        policy: Literal["stop", "skip"] = "stop",
        most_skips: int = 10,
        folder: RunPath | None = None,
        most_captures: int = 3,
        most_capture_mib: float = 8192.0,
    ) -> None:
        if policy not in ("stop", "skip"):
            raise UserError(f"policy={policy!r} must be 'stop' or 'skip'")
        if most_skips < 0:
            raise UserError(f"most_skips={most_skips} must be at least 0")
        if most_captures < 0:
            raise UserError(f"most_captures={most_captures} must be at least 0")
        self.policy, self.most_skips = policy, most_skips
        self._capture = StepCapture(folder, most_captures, most_capture_mib)
        self.skipped = 0
        self._batch: str | Tensor = "a batch"  # the current one
        self._losses: list[tuple[Tensor, str | Tensor]] = []  # of this step, each with its batch
        self._sees_gradients = True
        self._relieved: list[MatrixOptimizer] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._sees_gradients = not (scaled or trainer.strategy.handles_gradient_accumulation)
        if self.policy == "skip" and not self._sees_gradients:
            what = "16-mixed skips such steps itself" if scaled else "DeepSpeed does not expose the gradients"
            raise UserError(f"FiniteLoss(policy='skip'): {what}; use policy='stop' or another precision or strategy")
        self._losses = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers if self._sees_gradients else ():
            if isinstance(optimizer, MatrixOptimizer) and optimizer.backward == "whole" and optimizer.check_finite:
                optimizer.check_finite = False
                self._relieved.append(optimizer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._hand_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._hand_back()

    def _hand_back(self) -> None:
        """Optimisers that outlive the fit check their gradients again."""
        for optimizer in self._relieved:
            optimizer.check_finite = True
        self._relieved = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        index = batch.get("index") if isinstance(batch, dict) else None
        self._batch = index if isinstance(index, Tensor) else _position(trainer, batch_idx)
        self._capture.add(trainer, pl_module, batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        # A micro-batch whose step returns None has no loss and does not come here.
        self._losses.append((loss.detach().abs().float().max(), self._batch))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        losses, self._losses = self._losses, []
        largest = torch.stack([*(loss for loss, _ in losses), self._largest_gradient(optimizer, pl_module)])
        # NaN as infinity, which a maximum over ranks keeps on every backend.
        largest = largest.nan_to_num(nan=torch.inf, posinf=torch.inf)
        if world_size() > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        if all(map(math.isfinite, largest.tolist())):  # the only time that the host waits
            return
        broken = _first_broken(_values(pl_module))
        reason = self._reason(trainer, pl_module, losses, broken)
        own = any(not loss.isfinite() for loss, _ in losses)
        captured = self._capture.write(trainer, pl_module, own, reason)
        if self.policy == "stop":
            raise UserError(f"{reason}. Lower the learning rate, clip gradients, or inspect that batch{captured}")
        if _anywhere(broken is not None, pl_module.device):
            raise UserError(f"{reason}. Skipping the step would not fix the network{captured}")
        self.skipped += 1
        if self.skipped > self.most_skips:
            raise UserError(f"{reason}. It is skip number {self.skipped}, above most_skips={self.most_skips}{captured}")
        optimizer.zero_grad(set_to_none=True)
        if trainer.is_global_zero:
            print(printable(f"skipped: {reason} ({self.skipped} of at most {self.most_skips}){captured}"), flush=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.policy == "skip":
            pl_module.log("skipped_steps", float(self.skipped), on_step=True, on_epoch=False, batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    def _largest_gradient(self, optimizer: Optimizer, module: LightningModule) -> Tensor:
        """Largest norm among this rank's gradients, 0-d on the device; not finite if an optimiser finds one that is
        not.
        """
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients or not self._sees_gradients:
            return torch.zeros((), device=module.device)
        return square_norms([local_numbers(gradient) for gradient in gradients]).max().sqrt().float()

    def _reason(
        self,
        trainer: Trainer,
        module: LightningModule,
        losses: list[tuple[Tensor, str | Tensor]],
        broken: str | None,
    ) -> str:
        bad = [batch for loss, batch in losses if not loss.isfinite()]
        found = broken or _first_broken(_gradients(module))
        mine = []
        if bad:
            mine.append(f"the loss of {_named(bad[0])} is not finite")
        if found:
            mine.append(
                f"{found} is not finite" + ("" if bad else f", after {_named(losses[-1][1])}" if losses else "")
            )
        everyone: list[Any] = [mine]
        if world_size() > 1:
            everyone = [None] * world_size()
            dist.all_gather_object(everyone, [f"rank {rank()}: {line}" for line in mine])
        return f"step {trainer.global_step}, epoch {trainer.current_epoch}: " + "; ".join(chain(*everyone))


def _position(trainer: Trainer, batch_idx: int) -> str:
    """The position of a batch, as text: with the loader's own count of samples, if it keeps one."""
    state_dict = getattr(trainer.train_dataloader, "state_dict", None)
    position = None if state_dict is None else state_dict().get("samples")
    return f"batch {batch_idx}" + (f", which ends at sample {position} of the epoch's order" if position else "")


def _named(place: str | Tensor) -> str:
    if isinstance(place, str):
        return place
    indices = place.flatten().tolist()
    return f"samples {indices[:8]}" + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")


def _values(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((f"parameter {name}", parameter) for name, parameter in module.named_parameters())
    yield from ((f"buffer {name}", buffer) for name, buffer in module.named_buffers() if buffer.is_floating_point())


def _gradients(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            yield f"the gradient of {name}", parameter.grad
            yield f"the square of the gradient of {name}", square_norms([local_numbers(parameter.grad)])


def _first_broken(tensors: Iterator[tuple[str, Tensor]]) -> str | None:
    for name, tensor in tensors:
        if not local_numbers(tensor).isfinite().all():
            return name
    return None


def _anywhere(mine: bool, device: torch.device) -> bool:
    flag = torch.tensor(float(mine), device=device)
    if world_size() > 1:
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)
