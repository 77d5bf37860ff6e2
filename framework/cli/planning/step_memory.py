"""How much memory one training step needs, counted from the step's own tensors.

The step runs on fake tensors (shapes and storages without data), so a model far larger than this machine can be
planned in seconds, and any optimiser is planned from its own code instead of a formula. Where a real step reads
numbers to choose its path, a fake one takes the general path: transformers, for one, then builds the causal mask that
it otherwise omits, a few percent of a small model's activations.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightspan.core.batches import rows_in
from lightspan.core.blocks import recomputes
from lightspan.core.memory import state_bytes


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one rank, every storage counted once, with its full size.

    Attributes:
        rows: samples in the micro-batch.
        weights: parameters and buffers.
        batch: the micro-batch itself.
        activations: tensors kept for the backward pass, without weights and batch.
        gradients: `.grad` of all parameters after the backward pass.
        optimizer_state: tensors in the optimisers' state after a step.
        peak: what is alive of all this at the same time, with temporaries, at the worst moment of the first two
            steps: between operations, not inside one, and without the allocator's rounding.
        host_state: optimiser state that lives on the host while the step runs on a device; part of no other figure.
    """

    rows: int
    weights: int
    batch: int
    activations: int
    gradients: int
    optimizer_state: int
    peak: int
    host_state: int = 0


def in_words(error: BaseException) -> str:
    """Why a step could not run, on fake tensors or real ones, on one line."""
    if isinstance(error, DataDependentOutputException):
        return "it reads a number from a tensor, as .item(), float(tensor), .tolist() and `if tensor:` do"
    if isinstance(error, DynamicOutputShapeException):
        return "the size of a tensor follows from numbers in another, as with nonzero() or a mask as an index"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


class OptimizerStopped(RuntimeError):
    """An optimiser's step could not run, as on fake tensors if it reads numbers."""


class StepCounter:
    """Counts optimiser steps of one module on batches of any size.

    The first batch takes two whole steps: the first creates the optimisers' state, and in the second it exists together
    with activations. What the optimisers' steps need is the same for every batch, so later batches only go forward and
    backward, beside that state.

    Args:
        module: its parameters are trained for real, unless they are fake (see `faked`).
        loss_of: the forward pass, from the batch to a scalar.
        make_optimizers: called once, before the first step; an empty list plans everything else.
        backward_passes: micro-batches per optimiser step, >= 1; gradients stay alive between them.
    """

    def __init__(
        self,
        module: nn.Module,
        loss_of: Callable[[Any], Tensor],
        make_optimizers: Callable[[], list[Optimizer]],
        backward_passes: int = 1,
    ) -> None:
        self.module, self.loss_of, self.passes = module, loss_of, backward_passes
        self._make, self._optimizers = make_optimizers, list[Optimizer]()
        self._own = [*module.parameters(), *module.buffers()]
        self._live = _LiveBytes()
        self._stepping = 0
        """The most that is alive in a step of the optimisers."""

    def count(self, batch: Any, rows: int | None = None) -> StepMemory:
        """Of a batch that is a tensor or nested containers of tensors.

        Args:
            rows: its samples; None takes those of `lightspan.core.batches.rows_in`.
        Raises: OptimizerStopped if an optimiser's step cannot run on these tensors.
        """
        inputs = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        self._live.known = _storages([*self._own, *inputs])
        with self._live:
            if first := not self._stepping:
                self._optimizers = self._make()
                self._forward_and_backward(batch)
                self._step()
            self._live.peak = self._live.now
            activations = self._forward_and_backward(batch)
            passing = self._live.peak
            gradients = nbytes(p.grad for p in self.module.parameters() if p.grad is not None)
            if first:
                self._step()
            self.module.zero_grad(set_to_none=True)
        return StepMemory(
            rows=rows_in(batch) if rows is None else rows,
            weights=nbytes(self._own),
            batch=nbytes(inputs),
            activations=activations,
            gradients=gradients,
            optimizer_state=sum(map(state_bytes, self._optimizers)),
            peak=nbytes([*self._own, *inputs]) + max(passing, self._stepping),
        )

    def _forward_and_backward(self, batch: Any) -> int:
        """As often as there are micro-batches in a step. Returns: bytes of activations."""
        live, saved, activations = self._live, dict[int, Any](), 0
        for _ in range(self.passes):
            before = live.now
            with torch.autograd.graph.saved_tensors_hooks(_noting(saved), lambda tensor: tensor):
                loss = self.loss_of(batch)
            # Blocks that compute activations again keep their inputs, which autograd itself does not save.
            activations = (
                live.now - before
                if recomputes(self.module)
                else sum(storage.nbytes() for key, storage in saved.items() if key not in live.known)
            )
            # The count must not keep alive what the backward pass frees.
            saved.clear()
            loss.backward()
            del loss
        return activations

    def _step(self) -> None:
        self._live.peak = self._live.now
        _step(self._optimizers)
        self._stepping = max(self._stepping, self._live.peak)
        self.module.zero_grad(set_to_none=True)


def idle_state_bytes(module: nn.Module, optimizers: list[Optimizer]) -> int:
    """Bytes of optimiser state after one real step on zero gradients, in which only weight decay changes weights."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    _step(optimizers)
    module.zero_grad(set_to_none=True)
    return sum(map(state_bytes, optimizers))


@contextlib.contextmanager
def faked(module: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Inside, `module` has fake parameters and buffers of `mode` (shared ones stay shared); afterwards its own."""
    made: dict[int, Tensor] = {}
    kept = [(part, dict(part._parameters), dict(part._buffers)) for part in module.modules()]
    try:
        for part, parameters, buffers in kept:
            part._parameters.update({name: _fake(p, mode, made) for name, p in parameters.items()})  # type: ignore[misc]
            part._buffers.update({name: _fake(b, mode, made) for name, b in buffers.items()})
        yield
    finally:
        for part, parameters, buffers in kept:
            part._parameters.update(parameters)
            part._buffers.update(buffers)


def is_meta(module: nn.Module) -> bool:
    """Whether a module was built on the meta device, so that it has no numbers."""
    return any(tensor.is_meta for tensor in module.parameters())


def largest_rows(limit: int, measure: Callable[[int], StepMemory], small: StepMemory, large: StepMemory) -> int:
    """The largest micro-batch whose measured peak is at most `limit` bytes; 0 if not even one sample fits.

    The line through two measured sizes gives a first guess; whatever grows faster than the batch is then handled by
    measuring the guess itself and shrinking it until it fits.
    """
    per_row = (large.peak - small.peak) / (large.rows - small.rows)
    rows = int((limit - small.peak) / max(per_row, 1) + small.rows)
    while rows > 0:
        peak = measure(rows).peak
        if peak <= limit:
            return rows
        rows = min(rows - 1, int(rows * limit / peak))
    return 0


def _step(optimizers: list[Optimizer]) -> None:
    for optimizer in optimizers:
        try:
            optimizer.step()
        except Exception as error:
            raise OptimizerStopped(f"{type(optimizer).__name__}: {in_words(error)}") from error


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make, until they are freed; `peak` is the most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, Any] = {}
        """Storages that were there before, which are not counted."""
        self._alive: dict[int, weakref.finalize] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._meet(leaf.untyped_storage())
        return result

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in self._alive:
            return
        self.now += size
        self.peak = max(self.peak, self.now)
        self._alive[key] = weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.now -= size
        del self._alive[key]


def _noting(saved: dict[int, Any]) -> Callable[[Tensor], Tensor]:
    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    return pack


def _fake(tensor: Tensor | None, mode: FakeTensorMode, made: dict[int, Tensor]) -> Tensor | None:
    """A fake of a tensor, on the CPU even if that is on the meta device; the one `made` of it before, if any."""
    if tensor is None or not tensor.is_meta:
        return None if tensor is None else mode.from_tensor(tensor)
    if id(tensor) not in made:
        with mode:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, tensor.requires_grad)
        vars(fake).update(vars(tensor))  # what a library keeps there, such as that it should not decay
        made[id(tensor)] = fake
    return made[id(tensor)]


def _storages(tensors: Iterable[Tensor]) -> dict[int, Any]:
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage for storage in found}


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors, each counted once."""
    return sum(storage.nbytes() for storage in _storages(tensors).values())
