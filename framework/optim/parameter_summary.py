"""What an optimiser does with each parameter, and why, before the first step."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightspan.core.devices import wide_type
from lightspan.core.sharded import local
from lightspan.optim.matrices.matrix_optimizer import MatrixOptimizer


@dataclass(frozen=True)
class ParameterSummary:
    """How one parameter is treated: at `rate`, before a schedule changes it, times `scale` if it is projected.
    `state_bytes` is this rank's part of its state, `adamw_bytes` that of AdamW.
    """

    group: str
    shape: tuple[int, ...]
    rate: float
    scale: float
    how: str
    state_bytes: int
    adamw_bytes: int


def parameter_summary(optimizer: MatrixOptimizer, parameter: Tensor, group: dict[str, Any]) -> ParameterSummary:
    """How the optimiser treats a parameter, and why."""
    selection = optimizer.selection(parameter, group)
    if selection.projected:
        width, side = selection.width, selection.side
        how = f"rank {width} of {side}" if width < side else "whole"
        how += f", each of {len(parameter)}" if selection.stacked else ""
        if heads := optimizer.heads_of(parameter):
            how = f"by heads, {len(heads)} parts"
    elif parameter.ndim < 2:
        how = "AdamW: a vector"
    elif not selection.allowed:
        how = "AdamW: not selected"  # by its group's `project`, or by a callback's `match`
    elif parameter.is_complex():
        how = "AdamW: complex"
    elif not selection.side:
        how = "AdamW: empty"
    elif not selection.whole:
        how = "AdamW: a stack of matrices, whose projection needs gradients of whole ones"
    else:
        how = f"AdamW: rank {selection.rank} is not below its shorter side"
    state = optimizer.initial_state(parameter, group, torch.empty_like(parameter, device="meta"))
    kept = sum(local(tensor).nbytes for tensor in state.values())
    wide = wide_type(parameter.dtype).itemsize
    name, shape = group.get("name", "parameters"), tuple(parameter.shape)
    rate = float(group.get("initial_lr", group["lr"]))
    scale = float(group["scale"]) if selection.projected else 1.0
    return ParameterSummary(name, shape, rate, scale, how, kept, 2 * wide * local(parameter).numel())
