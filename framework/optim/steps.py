"""How often an optimiser really stepped: for an EMA, a mask or a proximal step.

A Trainer's `global_step` also counts steps that changed nothing: a `training_step` that returned None, gradients that
`FiniteLoss` cleared, infinite ones that a GradScaler skipped.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch.optim import Optimizer

_TAKEN: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()


def steps_taken(optimizer: Any) -> int:
    """Steps that the optimiser took, on at least one gradient, since this was first called for it.

    Use the difference of two results, both between steps: DeepSpeed, for one, writes the weights only after
    the step of the optimiser inside it. A wrapper, such as Lightning's or DeepSpeed's, is unwrapped.
    """
    while (inside := getattr(optimizer, "optimizer", None)) is not None:  # DeepSpeed's are not torch optimisers
        optimizer = inside
    if optimizer not in _TAKEN:
        _TAKEN[optimizer] = 0
        optimizer.register_step_post_hook(_count)
    return _TAKEN[optimizer]


@contextlib.contextmanager
def uncounted(optimizer: Optimizer) -> Iterator[None]:
    """Steps inside are not counted: those that are rolled back, for one."""
    before = steps_taken(optimizer)
    try:
        yield
    finally:
        _TAKEN[optimizer] = before


def _count(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _TAKEN[optimizer] = _TAKEN.get(optimizer, 0) + _stepped(optimizer)


def _stepped(optimizer: Any) -> bool:
    # Fused optimisers are also called for infinite gradients, and check this themselves.
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None and bool(found_inf):
        return False
    # `LowRank` may have used gradients that never were in `grad`.
    if getattr(optimizer, "used_gradients", False):
        return True
    return any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])
