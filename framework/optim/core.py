"""One step of a low-rank optimiser on a list of matrices of one shape, in two halves.

    R = A Q                          coordinates of A = G, or of A = G + E with error feedback
    U = inner(R)                     direction; Adam's moments have shape M x R
    W <- (1 - lr wd) W - lr (U Q^T + what `residual` makes of A - R Q^T)
with Q chosen again by `basis` for the matrices that are due. The first half projects and writes nothing, so that all
matrices can be clipped together, or refused, before any of them changes. The second half updates weights and state in
place.

Shapes: B matrices, M rows (the kept, longer side), N columns (the projected side), R rank. Wide matrices are passed
transposed.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightspan.optim.bases import Basis
from lightspan.optim.carries import FrameChange
from lightspan.optim.inner import Adam, AdamSettings, Inner, InnerContext
from lightspan.optim.layout import WEIGHT_STREAM, Layout, State, part_of, write_part
from lightspan.optim.moments import Float32Moments, MomentStorage
from lightspan.optim.residuals import Dropped, Residual
from lightspan.optim.triggers import Trigger
from lightspan.subspaces.frames import push
from lightspan.triton_kernels.bias_correction import bias_correction
from lightspan.triton_kernels.row_resident_step import row_resident_step


@dataclass(frozen=True)
class Rule:
    """The switches of a low-rank optimiser; each published one is one combination of them."""

    basis: Basis
    residual: Residual
    inner: Inner
    moments: MomentStorage
    trigger: Trigger

    def initial(self, layout: Layout) -> State:
        """State before the first step. The parts' names differ, so one mapping contains them all."""
        parts = (
            self.basis.initial(layout),
            self.inner.initial(layout, self.moments),
            self.residual.initial(layout),
            self.trigger.initial(layout),
        )
        return {key: value for part in parts for key, value in part.items()}

    def takes_one_pass(self, state: State) -> bool:
        """Whether a step needs only its own rows: Adam in float32 on a stored frame, without residual."""
        plain = isinstance(self.inner, Adam) and isinstance(self.moments, Float32Moments)
        return plain and isinstance(self.residual, Dropped) and not self.trigger.needs_energy and "frame" in state


@dataclass
class NewFrames:
    """New frames for the matrices at `positions`; `first` if no gradient had shaped the old ones."""

    positions: list[int]
    first: bool
    basis: State


@dataclass
class ProjectedGradients:
    """The results of the first half of a step.

    Args:
        gradients: what was projected, by matrix; None if only coordinates are left.
        energy_BM: squared row norms of what was projected, or empty [0 M].
        seen: the basis' state that the coordinates belong to, with frames built if they are used.
    """

    gradients: list[Tensor | None]
    coordinates_BMR: Tensor
    energy_BM: Tensor
    changes: list[NewFrames]
    seen: State


def project_step(
    gradients: list[Tensor | None],
    pending: dict[int, Tensor],
    state: State,
    layout: Layout,
    rule: Rule,
    *,
    first: list[int],
    due: list[int],
    energy: bool,
    beta1: float,
) -> ProjectedGradients:
    """The first half: new frames where due, and coordinates in them. Nothing is written.

    Args:
        gradients: [M N] by matrix, in any float dtype; None if there is none, or only a pending part.
        pending: coordinates [M R] that came without their gradient, by position; such matrices cannot be due.
        first, due: positions whose frame is chosen for the first time, or again.
        energy: whether row norms are wanted.
        beta1: of Adam's first moment, for a basis that follows it.
    """
    changes, seen = [], state
    for positions, is_first in ((first, True), (due, False)):
        if positions:
            index = layout.select(positions)
            chosen = [gradient for i in positions if (gradient := gradients[i]) is not None]
            assert len(chosen) == len(positions), "a frame is chosen from whole gradients"
            part, part_layout = part_of(state, index), layout.part(positions)
            if rule.basis.momentum and not is_first:
                chosen = _with_momentum(chosen, part, part_layout, rule, beta1)
            basis = rule.basis.refresh(chosen, part, part_layout, first=is_first)
            changes.append(NewFrames(positions, is_first, basis))
            seen = {**seen, **{key: _with_part(seen[key], positions, index, value) for key, value in basis.items()}}
    seen = rule.basis.materialised(seen, layout)
    whole = {i: gradient for i, gradient in enumerate(gradients) if gradient is not None}
    if len(whole) == layout.batch:
        coordinates_BMR, energy_BM = rule.basis.project(list(whole.values()), seen, layout, energy=energy)
    else:
        coordinates_BMR, energy_BM = layout.zeros(layout.rows, layout.rank), layout.zeros(layout.rows)[:0]
        if whole:
            index = layout.select(list(whole))
            held = part_of(seen, index), layout.part(list(whole))
            coordinates_BMR[index], _ = rule.basis.project(list(whole.values()), *held, energy=False)
    for i, coordinates_MR in pending.items():
        coordinates_BMR[i] += coordinates_MR
    return ProjectedGradients(gradients, coordinates_BMR, energy_BM, changes, seen)


def update_step(
    weights: list[Tensor],
    state: State,
    layout: Layout,
    rule: Rule,
    projection: ProjectedGradients,
    numbers: AdamSettings,
    *,
    lr: Tensor,
    keep: Tensor,
    clip: Tensor | None,
) -> None:
    """The second half: moments, weights [M N] and the rest of the state, in place.

    Args:
        lr, keep: 0-d; keep = 1 - lr * weight decay.
        clip: 0-d factor by which the gradients must still be multiplied; None for none.
    """
    coordinates_BMR, energy_BM = projection.coordinates_BMR, projection.energy_BM
    if clip is not None:
        clip = clip.to(coordinates_BMR.dtype)
        coordinates_BMR.mul_(clip)
        energy_BM = energy_BM * clip.square()
    source_BR, lost = _change_frames(state, layout, rule, projection, numbers)
    setting = InnerContext(layout, rule.moments, numbers, source_BR)
    direction_BMR = rule.inner.direction(coordinates_BMR, state, setting)
    coefficients_BMR, scale_BM = rule.residual.terms(direction_BMR, coordinates_BMR, energy_BM, state, layout)
    whole: list[Tensor] = []
    if len(scale_BM):
        whole = [gradient for gradient in projection.gradients if gradient is not None]
        scale_BM = scale_BM if clip is None else scale_BM * clip
    seed = numbers.seed + WEIGHT_STREAM if weights[0].dtype == torch.bfloat16 else None
    if layout.rows:  # a rank may have no rows of a small matrix
        rule.basis.update(weights, coefficients_BMR, projection.seen, layout, whole, scale_BM, lr, keep, seed)
    if rule.residual.feeds_back:
        accumulated = [gradient for gradient in projection.gradients if gradient is not None]
        frame_BNR = rule.basis.frame(projection.seen, layout)
        rule.residual.remember(accumulated, coordinates_BMR, frame_BNR, lost, state, numbers.betas)
    if rule.trigger.needs_energy:
        changed = sorted(i for change in projection.changes for i in change.positions)
        refreshed = layout.select(changed) if changed else None
        rule.trigger.observe(coordinates_BMR, energy_BM, refreshed, state, layout.total)


def step_in_one_pass(
    weights: list[Tensor],
    gradients: list[Tensor],
    state: State,
    rule: Rule,
    numbers: AdamSettings,
    *,
    lr: Tensor,
    keep: Tensor,
) -> None:
    """Both halves in one kernel, for rules with `takes_one_pass` in steps without a change of frame or clipping."""
    state["age"].add_(1)
    if not len(weights[0]):
        return
    moments, seed = (state["exp_avg"], state["exp_avg_sq"], state["age"]), numbers.seed + WEIGHT_STREAM
    row_resident_step(weights, gradients, state["frame"], *moments, *numbers.betas, numbers.eps, lr, keep, seed)


def _change_frames(
    state: State, layout: Layout, rule: Rule, projection: ProjectedGradients, numbers: AdamSettings
) -> tuple[Tensor | None, dict[int, Tensor]]:
    """Writes new frames and carries moments into them.

    Returns where each column's moments are [B R], None if in place; and what first moments lost [M N], by matrix.
    """
    source_BR: Tensor | None = None
    lost: dict[int, Tensor] = {}
    for change in projection.changes:
        index = layout.select(change.positions)
        before, part_layout = part_of(state, index), layout.part(change.positions)
        part = dict(before)
        if not change.first and "exp_avg" in state:  # otherwise there is nothing to carry
            make_old, make_new = (partial(_frame, rule.basis, basis, part_layout) for basis in (before, change.basis))
            coordinates_BMR = projection.coordinates_BMR[index]
            seen = FrameChange(make_old, make_new, before, change.basis, coordinates_BMR, numbers.betas)
            before_BMN = _lifted(part, seen.old_BNR, rule) if rule.residual.keeps_lost_moments else None
            moved_bR = rule.basis.carry.carry(part, seen, rule.moments, numbers.seed)
            if before_BMN is not None:
                left = before_BMN - _lifted(part, seen.new_BNR, rule)
                lost.update(zip(change.positions, left, strict=True))
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


def _with_momentum(gradients: list[Tensor], part: State, layout: Layout, rule: Rule, beta1: float) -> list[Tensor]:
    """rho m_hat Q^T + (1 - rho) G, by matrix."""
    share = rule.basis.momentum
    correction_B1R = bias_correction(part["age"], beta1)[:, None]
    mean_BMR = rule.moments.load(part, "exp_avg").to(layout.dtype) / correction_B1R
    lifted_BMN = push(mean_BMR, rule.basis.frame(part, layout).to(layout.dtype))
    return [
        torch.lerp(g.to(layout.dtype), lifted_MN, share) for g, lifted_MN in zip(gradients, lifted_BMN, strict=True)
    ]


def _lifted(part: State, frame_BNR: Tensor, rule: Rule) -> Tensor:
    return push(rule.moments.load(part, "exp_avg").to(frame_BNR.dtype), frame_BNR)
