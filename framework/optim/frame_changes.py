"""Frames that are chosen again: the first half of a step chooses them, the second writes them and carries moments over.

Shapes: B matrices of a bucket, b of them with a new frame; M rows, N columns, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightspan.optim.bases import Basis
from lightspan.optim.carries import FrameChange
from lightspan.optim.inner import AdamSettings
from lightspan.optim.layout import Layout, State, part_of, write_part
from lightspan.optim.residuals import LostMoments
from lightspan.optim.settings import Switches
from lightspan.triton_kernels.bias_correction import bias_correction


@dataclass
class NewFrames:
    """New frames for the matrices at `positions`; `first` if no gradient had shaped the old ones."""

    positions: list[int]
    first: bool
    basis: State


def choose_frames(
    gradients: Sequence[Tensor],
    positions: list[int],
    state: State,
    layout: Layout,
    rule: Switches,
    beta1: float,
    *,
    first: bool,
) -> NewFrames:
    """New frames for the matrices at `positions`, from their gradients [M N]; nothing is written."""
    part, part_layout = part_of(state, layout.select(positions)), layout.part(positions)
    if rule.basis.momentum and not first:
        correction_b1R = bias_correction(part["age"], beta1)[:, None]
        part["mean"] = rule.moments.load(part, "exp_avg").to(layout.dtype) / correction_b1R
    return NewFrames(positions, first, rule.basis.refresh(gradients, part, part_layout, first=first))


def with_frames(changes: Sequence[NewFrames], state: State, layout: Layout) -> State:
    """The state that new frames lead to, with moments as they were; the given one is unchanged."""
    for change in changes:
        index, basis = layout.select(change.positions), change.basis.items()
        state = {**state, **{key: _with_part(state[key], change.positions, index, value) for key, value in basis}}
    return state


def change_frames(
    changes: Sequence[NewFrames],
    state: State,
    layout: Layout,
    rule: Switches,
    coordinates_BMR: Tensor,
    numbers: AdamSettings,
) -> tuple[Tensor | None, LostMoments | None]:
    """Writes new frames and carries moments into them.

    Args:
        coordinates_BMR: of the present gradients, in the new frames.
    Returns where each column's moments are [B R], None if in place; and what first moments lost, if it is wanted.
    """
    source_BR: Tensor | None = None
    lost: LostMoments | None = None
    for change in changes:
        index = layout.select(change.positions)
        before, part_layout = part_of(state, index), layout.part(change.positions)
        part = dict(before)
        if not change.first and "exp_avg" in state:  # otherwise there is nothing to carry
            make_old, make_new = (partial(_frame, rule.basis, basis, part_layout) for basis in (before, change.basis))
            coordinates_bMR = coordinates_BMR[index]
            seen = FrameChange(make_old, make_new, before, change.basis, coordinates_bMR, numbers.betas)
            negated_bMR = -rule.moments.load(part, "exp_avg") if rule.residual.keeps_lost_moments else None
            moved_bR = rule.basis.carry.carry(part, seen, rule.moments, numbers.seed)
            if negated_bMR is not None:
                moments_bMK = torch.cat((rule.moments.load(part, "exp_avg"), negated_bMR), dim=2)
                frames_bNK = torch.cat((seen.new_BNR, seen.old_BNR), dim=2)
                lost = LostMoments(*(_in_stack(both, change, layout) for both in (moments_bMK, frames_bNK)))
            if moved_bR is not None:
                if source_BR is None:
                    source_BR = torch.arange(layout.rank, device=layout.device).repeat(layout.batch, 1)
                source_BR[index] = moved_bR
        write_part(state, index, {**part, **change.basis}, before)
    return source_BR, lost


def _frame(basis: Basis, state: State, layout: Layout) -> Tensor:
    return basis.frame(state, layout).to(layout.dtype)


def _with_part(stack: Tensor, positions: list[int], index: slice | Tensor, part: Tensor) -> Tensor:
    """A copy of the stack with some matrices replaced; the given stack is unchanged."""
    if len(positions) == len(stack):
        return part
    stack = stack.clone()
    stack[index] = part
    return stack


def _in_stack(part: Tensor, change: NewFrames, layout: Layout) -> Tensor:
    """What belongs to the matrices of a change as a stack of all matrices, zero for the others."""
    if len(change.positions) == layout.batch:
        return part
    stack = part.new_zeros((layout.batch, *part.shape[1:]))
    stack[layout.select(change.positions)] = part
    return stack
