"""Frames that are chosen again: the first half of a step chooses them, the second writes them and carries moments over.

Shapes: B matrices of a bucket, b of them with a new frame; M rows, N columns, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightspan.optim.low_rank.bases import Basis
from lightspan.optim.low_rank.carries import FrameChange
from lightspan.optim.low_rank.inner import AdamSettings
from lightspan.optim.low_rank.residuals import LostMoments
from lightspan.optim.low_rank.update_rule import UpdateRule
from lightspan.optim.matrices.stacks import Layout, State, part_of, write_part
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
    draws: list[int],
    state: State,
    layout: Layout,
    rule: UpdateRule,
    beta1: float,
    *,
    first: bool,
) -> NewFrames:
    """New frames for the matrices at `positions`, from their gradients [M N] and, if they are random, from how many
    draws came before; nothing is written.
    """
    part, part_layout = part_of(state, layout.select(positions)), layout.part(positions).drawn(draws)
    if rule.basis.momentum and not first:
        correction_b1R = bias_correction(part["age"], beta1)[:, None]
        part["mean"] = rule.moments.load(part, "exp_avg").to(layout.dtype) / correction_b1R
    return NewFrames(positions, first, rule.basis.refresh(gradients, part, part_layout, first=first))


def with_frames(changes: Sequence[NewFrames], state: State, given: Sequence[bool]) -> list[tuple[range, State]]:
    """The state that new frames lead to, with moments as they were: positions of neighbours whose frames lie in one
    tensor, and views of their state. Nothing is copied, so that a change costs the memory of what changes.

    Args:
        given: of every matrix, whether it has what the caller asks for; neighbours that differ are apart.
    """
    owners = {at: (number, i) for number, change in enumerate(changes) for i, at in enumerate(change.positions)}
    kinds = [(owners[at][0] if at in owners else None, known) for at, known in enumerate(given)]
    starts = [at for at in range(len(kinds)) if not at or kinds[at] != kinds[at - 1]]
    parts = []
    for start, stop in zip(starts, [*starts[1:], len(kinds)], strict=True):
        part = part_of(state, slice(start, stop))
        if start in owners:
            number, first = owners[start]
            part = {**part, **part_of(changes[number].basis, slice(first, first + stop - start))}
        parts.append((range(start, stop), part))
    return parts


def change_frames(
    changes: Sequence[NewFrames],
    state: State,
    layout: Layout,
    rule: UpdateRule,
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


def _in_stack(part: Tensor, change: NewFrames, layout: Layout) -> Tensor:
    """What belongs to the matrices of a change as a stack of all matrices, zero for the others."""
    if len(change.positions) == layout.batch:
        return part
    stack = part.new_zeros((layout.batch, *part.shape[1:]))
    stack[layout.select(change.positions)] = part
    return stack
