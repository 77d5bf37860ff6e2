"""Keeps what a step began with while it goes on, and writes it as a capture if its numbers are not finite."""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightspan.callbacks.resilience.random_state import random_states
from lightspan.core.devices import float32_precision
from lightspan.core.distributed import world_size
from lightspan.core.errors import UserError, one_line
from lightspan.core.files.atomic import make_folder, remove
from lightspan.core.files.places import RunPath
from lightspan.core.files.tensors import Form
from lightspan.core.memory import MIB
from lightspan.core.sharded import local, whole
from lightspan.training.captures import Capture, capture_folder, captures, nbytes, write_rank, write_weights

MOST_BUFFER_MIB = 64
"""Buffers are copied at the start of every step if all of them are at most this large."""
MOST_KEPT_MIB = 512
"""Micro-batches of one step that are kept beside the current one."""


class StepCapture:
    """What a step begins with: its micro-batches, as references, the random states before each, and copies of buffers,
    which a forward pass changes (running means, queues). Weights need no copy: the optimiser has not moved them yet.

    A step costs the copies of its random states (a few kilobytes) and buffers. With accumulation, micro-batches stay
    in memory until their step ends: up to `MOST_KEPT_MIB`, the newest.

    Args:
        folder: of the run's captures; None captures nothing.
        most: captures of a run that are kept; later steps are not captured.
        most_mib: size of a module's parameters and buffers, above which nothing is captured.
    """

    def __init__(self, folder: RunPath | None, most: int, most_mib: float) -> None:
        self.folder = None if folder is None else Path(folder)
        self.most, self.most_mib = most, most_mib
        self._step: int | None = None
        self._parts: deque[dict[str, Any]] = deque()
        self._kept_bytes, self._dropped = 0, 0
        self._buffers: dict[str, Tensor] = {}

    def add(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called when a micro-batch starts, on its device."""
        if self.folder is None or trainer.strategy.handles_gradient_accumulation:
            return
        if trainer.global_step != self._step or trainer.accumulate_grad_batches == 1:
            self._begin(trainer.global_step, module)
        size = nbytes(batch) if trainer.accumulate_grad_batches > 1 else 0
        self._kept_bytes += size
        while self._parts and self._kept_bytes > MOST_KEPT_MIB * MIB:
            self._kept_bytes -= self._parts.popleft()["bytes"]
            self._dropped += 1
        self._parts.append({"batch": batch, "batch_idx": batch_idx, "random": random_states(), "bytes": size})

    def write(self, trainer: Trainer, module: LightningModule, broken: bool, reason: str) -> str:
        """Writes the step under way; all ranks must call it together, before the optimiser's step.

        Args:
            broken: whether this rank's own loss is not finite.
        Returns: what to tell the user, empty if nothing is to be captured; the same on all ranks. It reports a
            full disk and does not raise: there is an error already.
        """
        if self.folder is None or trainer.strategy.handles_gradient_accumulation:
            return ""
        target = capture_folder(self.folder, trainer.global_step)
        state = self._state(module)
        size_mib = sum(tensor.nbytes for tensor in state.values()) / MIB
        if size_mib > self.most_mib:
            return f"; not captured, since the model is {size_mib:.0f} MiB and most_mib={self.most_mib:g}"
        refused = str(trainer.strategy.broadcast(self._prepare(target) if trainer.is_global_zero else ""))
        if refused:
            return f"; not captured: {refused}"
        failure = _write_weights(target, state) if trainer.is_global_zero else _take_part(state)
        remarks = [f"{self._dropped} earlier micro-batches of the step were not kept"] * bool(self._dropped)
        try:
            remarks += write_rank(target, trainer.global_rank, self._of_rank(trainer))
        except (UserError, OSError) as error:
            failure = failure or one_line(error)
        everyone: list[Any] = [(failure, remarks, broken)]
        if world_size() > 1:
            everyone = [None] * world_size()
            dist.all_gather_object(everyone, (failure, remarks, broken))
        failure = next((told for told, _, _ in everyone if told), "")
        if trainer.is_global_zero:
            failure = failure or self._complete(trainer, target, everyone, reason)
            if failure:
                remove(target)
        failure = str(trainer.strategy.broadcast(failure))
        if failure:
            return f"; not captured: {failure}"
        return f"; captured in {target}: `lightspan replay {self.folder.parent}` finds where it begins"

    def _begin(self, step: int, module: LightningModule) -> None:
        self._step, self._kept_bytes, self._dropped = step, 0, 0
        self._parts.clear()
        buffers = {name: local(buffer) for name, buffer in module.named_buffers()}
        if sum(buffer.nbytes for buffer in buffers.values()) > MOST_BUFFER_MIB * MIB:
            buffers = {}
        if {n: (b.shape, b.dtype) for n, b in buffers.items()} != {
            n: (b.shape, b.dtype) for n, b in self._buffers.items()
        }:
            self._buffers = {name: torch.empty_like(buffer) for name, buffer in buffers.items()}
        if buffers:
            with torch.no_grad():
                torch._foreach_copy_(list(self._buffers.values()), list(buffers.values()))

    def _state(self, module: LightningModule) -> dict[str, Tensor]:
        """Parameters and buffers by name, as they were when the step began."""
        state: dict[str, Tensor] = {name: parameter.detach() for name, parameter in module.named_parameters()}
        return state | {name: self._buffers.get(name, buffer.detach()) for name, buffer in module.named_buffers()}

    def _prepare(self, target: Path) -> str:
        """Makes the folder; returns why not."""
        assert self.folder is not None
        others = captures(self.folder).keys() - {self._step}
        if len(others) >= self.most:
            return f"{self.folder} has {len(others)} captures, the most that are kept"
        try:
            if target.exists():
                remove(target)
            make_folder(target)
        except (UserError, OSError) as error:
            return one_line(error)
        return ""

    def _of_rank(self, trainer: Trainer) -> dict[str, Any]:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # a connector of the trainer sets it
        altering = [one for one in callbacks if getattr(one, "alters_training", True) and not _is_lightnings(one)]
        states = {one.state_key: state for one in altering if (state := one.state_dict())}
        parts = [{key: part[key] for key in ("batch", "batch_idx", "random")} for part in self._parts]
        return {
            "micro_batches": parts,
            "callbacks": states,
            "matmul_precision": float32_precision(),
        }

    def _complete(self, trainer: Trainer, target: Path, everyone: list[Any], reason: str) -> str:
        """Writes what makes the capture whole; returns why not."""
        remarks = dict.fromkeys(remark for _, of_rank, _ in everyone for remark in of_rank)
        if not self._buffers and any(True for _ in trainer.lightning_module.buffers()):
            remarks["buffers are those after the forward pass"] = None
        capture = Capture(
            step=trainer.global_step,
            epoch=trainer.current_epoch,
            ranks=len(everyone),
            broken=[rank for rank, (_, _, broken) in enumerate(everyone) if broken],
            accumulate=trainer.accumulate_grad_batches,
            precision=str(trainer.precision),
            reason=reason,
            remarks=list(remarks),
        )
        try:
            capture.write(target)
        except (UserError, OSError) as error:
            return one_line(error)
        return ""


def _write_weights(target: Path, state: dict[str, Tensor]) -> str:
    """Returns why it could not. The other ranks gather with this one to the end, so it does too."""
    pieces = _pieces(state)
    forms = {name: Form(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    try:
        write_weights(target, forms, pieces)
    except (UserError, OSError) as error:
        for _ in pieces:
            pass
        return one_line(error)
    return ""


def _take_part(state: dict[str, Tensor]) -> str:
    for _ in _pieces(state):
        pass
    return ""


def _pieces(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors one after the other: those that are sharded are gathered by all ranks."""
    for name, tensor in state.items():
        yield name, whole(tensor)


def _is_lightnings(callback: Callback) -> bool:
    return type(callback).__module__.startswith(("lightning.", "pytorch_lightning."))
