"""What an optimiser keeps for coordinates that are closed: nothing, so that they start clean when they open again."""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightspan.core.errors import UserError
from lightspan.core.sharded import local
from lightspan.optim.matrices.matrix_optimizer import MatrixOptimizer
from lightspan.optim.random_subspace import RandomSubspace


@torch.no_grad()
def keep_only(optimizer: Optimizer, parameter: Tensor, open_S: Tensor) -> None:
    """Sets the state of closed entries to zero: moments of any optimiser that keeps a number for each entry.

    Counters of steps are the tensor's, and stay: bias correction treats an entry that opens as one whose gradient was
    zero so far. A matrix that a `MatrixOptimizer` steps keeps its state: there each moment moves all entries of the
    matrix, so none is that of a closed one. Its steps are taken in the subspace and then cut to the mask.

    Args:
        open_S: bool, what this rank holds of the mask.
    """
    if _projected(optimizer, parameter):
        return
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
            local(value).masked_fill_(~open_S, 0)


def require_entrywise(optimizer: Optimizer) -> None:
    """Raises: UserError for an optimiser whose state cannot follow a mask."""
    name = type(optimizer).__name__
    if isinstance(optimizer, RandomSubspace):
        raise UserError(
            "a RandomSubspace writes all weights anew from its coordinates in each step, so none of them stays closed; "
            "train with IntrinsicDimension or with MaskLearning, not both"
        )
    if isinstance(optimizer, MatrixOptimizer):
        if optimizer.backward != "whole":
            raise UserError(
                f"masks are learned from whole gradients, and LowRank(backward={optimizer.backward!r}) keeps their "
                "coordinates alone; set backward='whole'"
            )
        return
    if inspect.signature(type(optimizer).step).parameters["closure"].default is inspect.Parameter.empty:
        raise UserError(
            f"{name} evaluates the loss several times a step, and a mask is drawn for one; use another optimiser, such "
            "as torch.optim.AdamW"
        )
    for key, value in probed_state(optimizer).items():
        if isinstance(value, Tensor) and value.numel() > 1 and not _of_entries(value):
            raise UserError(
                f"{name} keeps {key!r} of shape {tuple(value.shape)} and {value.dtype} for a weight of shape {_TRIED}, "
                "which is not one number an entry, so it cannot follow a mask; use an elementwise optimiser such as "
                "torch.optim.AdamW, or LowRank"
            )


_TRIED = (2, 3)


def _of_entries(value: Tensor) -> bool:
    return tuple(value.shape) == _TRIED and value.is_floating_point()


def probed_state(optimizer: Optimizer) -> dict[str, Any]:
    """What an optimiser of this class keeps after a step on a matrix; empty for one that cannot be made alone."""
    taken = inspect.signature(type(optimizer)).parameters
    settings = {key: value for key, value in optimizer.param_groups[0].items() if key in taken and key != "params"}
    tried = torch.zeros(_TRIED, requires_grad=True)
    tried.grad = torch.zeros(_TRIED)
    try:
        alone = type(optimizer)([tried], **{**settings, **({"fused": False} if "fused" in taken else {})})
        alone.step()
    except Exception:  # a class of the user's that wants more than its settings
        return {}
    return dict(alone.state.get(tried, {}))


def _projected(optimizer: Optimizer, parameter: Tensor) -> bool:
    if not isinstance(optimizer, MatrixOptimizer):
        return False
    groups = (group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
    return any(optimizer.projected(parameter, group) for group in groups)
