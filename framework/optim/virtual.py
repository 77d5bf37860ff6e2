"""Steps that an optimiser takes to see where they lead, and that are undone.

They are the optimiser's own, with its rule, rates and state, so that what is seen is where it would go.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightspan.core.distributed import mean_over_ranks, world_size
from lightspan.optim.steps import uncounted


@contextlib.contextmanager
def rolled_back(*modules: nn.Module) -> Iterator[None]:
    """What happens to weights and buffers inside is undone at the end, bit for bit."""
    kept = [copies(module) for module in modules]
    try:
        yield
    finally:
        for module, values in zip(modules, kept, strict=True):
            copy_into(tensors_of(module), values)


@contextlib.contextmanager
def virtual_steps(optimizer: Optimizer, keep_state: bool = False) -> Iterator[None]:
    """Steps of the optimiser inside do not count, and its state, such as moments, is afterwards what it was before.

    Args:
        keep_state: let the state go on from where the virtual steps leave it.
    """
    before = None if keep_state else copy.deepcopy(own_state(optimizer))
    with uncounted(optimizer):
        try:
            yield
        finally:
            if before is not None:
                optimizer.load_state_dict(before)


def own_state(optimizer: Optimizer) -> dict[str, Any]:
    """What this rank's `load_state_dict` takes back: where ranks own parts of the state, its own part."""
    return getattr(optimizer, "own_state_dict", optimizer.state_dict)()


def step_on(loss: Tensor, optimizer: Optimizer) -> None:
    """One step on this loss's gradient, a mean over ranks as DDP takes it; gradients that were there before stay.

    For whole weights, outside of DDP's own backward pass. Every rank must call it.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    if world_size() > 1:
        mean_over_ranks([gradient for gradient in gradients if gradient is not None])
    before = [parameter.grad for parameter in parameters]
    _give(parameters, gradients)
    optimizer.step()
    _give(parameters, before)
    torch.clear_autocast_cache()  # copies of the weights in half precision are of those before the step


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Weights, then buffers, in the module's order."""
    return [*module.parameters(), *module.buffers()]


def copies(module: nn.Module) -> list[Tensor]:
    """What `tensors_of` gives, as they are now."""
    return [tensor.detach().clone() for tensor in tensors_of(module)]


@torch.no_grad()
def copy_into(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copies values into tensors in place, where a forward pass may already have read them."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
    torch.clear_autocast_cache()


def mean_weights(branches: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The mean of several networks' weights, tensor by tensor: a soup. Of equal ones it is theirs, bit for bit."""
    first, *others = branches
    means = []
    for tensors in zip(first, *others, strict=True):
        # Differences to the first: sums of equal numbers would round.
        apart = torch.stack([tensor - tensors[0] for tensor in tensors]).sum(dim=0)
        means.append(tensors[0] + apart / len(branches))
    return means


def _give(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
