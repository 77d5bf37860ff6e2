"""One step of a low-rank optimiser on the matrices of one bucket, in two halves.

    R = A Q                          coordinates of A = G, or of A = G + E with error feedback
    U = inner(R)                     direction; Adam's moments have shape M x R
    W <- (1 - lr wd) W - lr (U Q^T + what `residual` makes of A - R Q^T)
with Q chosen again by `basis` for the matrices that are due. The first half projects and writes nothing, so that the
gradients of all buckets can be clipped together, or refused, before any weight changes. The second half updates weights
and state in place. Error feedback adds to clipped gradients, so there the second half begins with the first.

Shapes: B matrices, M rows (the kept, longer side), N columns (the projected side), R rank. Wide matrices are passed
transposed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightspan.optim.low_rank.frame_changes import NewFrames, change_frames, choose_frames, with_frames
from lightspan.optim.low_rank.inner import AdamSettings, InnerContext
from lightspan.optim.low_rank.residuals import LostMoments, Terms
from lightspan.optim.low_rank.update_rule import UpdateRule
from lightspan.optim.matrices.stacks import WEIGHT_STREAM, Bucket, Layout, StackStep, State, existing
from lightspan.triton_kernels.backproject_update import operand_type


def due(bucket: Bucket, positions: list[int], rule: UpdateRule) -> tuple[list[int], list[int]]:
    """Those of `positions` whose frame the coming step chooses for the first time, and those it chooses again; as
    indices into `positions`.
    """
    first = [place for place, i in enumerate(positions) if bucket.done[i] == 0]
    later = [place for place, i in enumerate(positions) if bucket.done[i] > 0]
    if not later:
        return first, []
    chosen = set(rule.trigger.due([positions[place] for place in later], bucket.done, bucket.phases))
    return first, [place for place in later if positions[place] in chosen]


@dataclass
class Projected:
    """The results of the first half of a step.

    Args:
        gradients: what was projected, by matrix; None if only coordinates are left.
        energy_BM: squared row norms of what was projected, or empty [0 M].
        seen: the basis' state that the coordinates belong to, with frames built if they are used; None if only some
            matrices change theirs, so that no tensor has all of them before the changes are written.
    """

    gradients: list[Tensor | None]
    coordinates_BMR: Tensor
    energy_BM: Tensor
    changes: list[NewFrames]
    seen: State | None


class BucketStep(StackStep):
    """One step of a bucket's matrices inside their frames.

    Args:
        rule: the optimiser's; its settings are replaced by those of the bucket's group.

    Attributes:
        pending: coordinates [M R] that came without their gradient, by position; such matrices are not due.
        first, due: positions whose frame is chosen for the first time, or again.
        projected: result of the first half; None before it.
    """

    def __init__(self, bucket: Bucket, rule: UpdateRule) -> None:
        super().__init__(bucket)
        self.first, self.due = due(bucket, self.active, rule)
        group = bucket.group
        settings = [(name, vars(part)[name]) for part in (rule.inner, rule.residual) for name in part.of_groups]
        self.rule = rule.of(group) if any(group.get(name, own) != own for name, own in settings) else rule
        self.pending = {place: bucket.pending[i] for place, i in enumerate(self.active) if i in bucket.pending}
        self.projected: Projected | None = None

    def prepare(self, energy: bool) -> list[Tensor]:
        """The first half: coordinates of the gradients, in new frames where due, and row norms if `energy`. With error
        feedback that is done in `apply`, after clipping.
        """
        if not self.active or self.rule.residual.feeds_back:
            return []
        choosing = existing(self.gradients[i] for i in (*self.first, *self.due))
        self.projected = self._projected(self.gradients, energy)
        return choosing

    def squares(self, in_frames: bool) -> list[Tensor]:
        if self.projected is None:
            return super().squares(in_frames)
        if in_frames:
            return [torch.linalg.vector_norm(self.projected.coordinates_BMR).square()]
        return [self.projected.energy_BM.sum()]

    def norms(self) -> list[Tensor]:
        """A row of a gradient that is not finite has coordinates that are not finite either."""
        if self.projected is None:
            return super().norms()
        return [square for in_frames in (True, False) for square in self.squares(in_frames)]

    def apply(self, weights: list[Tensor], clip: Tensor | None) -> None:
        """The second half."""
        if self.rule.residual.feeds_back:
            self.projected, clip = self._projected_with_error(clip), None
        assert self.projected is not None, "a step has two halves"
        group = self.bucket.group
        numbers = AdamSettings(group["betas"], group["eps"], self.bucket.noise)
        lr, keep = self.rates()
        if (factor := self.rule.inner.factor(self.layout)) != 1:
            lr = lr * factor
        update_weights(
            weights, self.state, self.layout, self.rule, self.projected, numbers, lr=lr, keep=keep, clip=clip
        )

    def count(self) -> None:
        for i in (*self.first, *self.due) if "draws" in self.state else ():
            self.bucket.draws[self.active[i]] += 1
        super().count()
        self.bucket.pending.clear()
        self.projected = None

    def _projected(self, gradients: list[Tensor | None], energy: bool) -> Projected:
        changes = [
            self._new_frames(gradients, at, is_first) for at, is_first in ((self.first, True), (self.due, False)) if at
        ]
        if changes or self.pending:
            exist = [gradient is not None for gradient in gradients]
            parts = [
                self._coordinates(gradients[at.start : at.stop], part, self.layout.part(at), energy)
                for at, part in with_frames(changes, self.state, exist)
            ]
        else:
            parts = [self._coordinates(gradients, self.state, self.layout, energy)]
        coordinates, energies, seen = zip(*parts, strict=True)
        coordinates_BMR = _joined(coordinates)
        for i, coordinates_MR in self.pending.items():
            coordinates_BMR[i] += coordinates_MR
        return Projected(gradients, coordinates_BMR, _joined(energies), changes, seen[0] if len(seen) == 1 else None)

    def _projected_with_error(self, clip: Tensor | None) -> Projected:
        """The first half with the clipped gradients plus what earlier steps left out. The sums are as large as the
        gradients in float32, so those of one bucket exist at a time: those of all would cancel what quantised state
        saves.
        """
        one = torch.ones((), device=self.layout.device) if clip is None else clip
        accumulated = self.rule.residual.accumulate(existing(self.gradients), self.state, one)
        # Products are in the dtype of other steps. What they lose of bfloat16 sums stays in the error.
        operand = operand_type(self.bucket.parameters[0].dtype)
        projected = self._projected([matrix_MN.to(operand) for matrix_MN in accumulated], self.rule.residual.rescales)
        self.gradients = []
        return replace(projected, gradients=[matrix_MN.to(self.layout.dtype) for matrix_MN in accumulated])

    def _new_frames(self, gradients: list[Tensor | None], positions: list[int], is_first: bool) -> NewFrames:
        chosen, beta1 = existing(gradients[i] for i in positions), self.bucket.group["betas"][0]
        assert len(chosen) == len(positions), "a frame is chosen from whole gradients"
        draws = [self.bucket.draws[self.active[i]] for i in positions]
        return choose_frames(chosen, positions, draws, self.state, self.layout, self.rule, beta1, first=is_first)

    def _coordinates(
        self, gradients: list[Tensor | None], state: State, layout: Layout, energy: bool
    ) -> tuple[Tensor, Tensor, State]:
        """Coordinates [b M R] of neighbours, zeros if none has a gradient; row norms [b M] or [0 M]; and their frames,
        built if they are used.
        """
        seen, whole = self.rule.basis.prepare(state, layout), existing(gradients)
        if not whole:
            return layout.zeros(layout.rows, layout.rank), layout.zeros(layout.rows)[:0], seen
        return *self.rule.basis.project(whole, seen, layout, energy=energy), seen


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def update_weights(
    weights: list[Tensor],
    state: State,
    layout: Layout,
    rule: UpdateRule,
    projected: Projected,
    numbers: AdamSettings,
    *,
    lr: Tensor,
    keep: Tensor,
    clip: Tensor | None,
) -> None:
    """Frames, moments, weights [M N] and the rest of the state, in place. torch.compile makes one graph of it.

    Args:
        lr, keep: 0-d; keep = 1 - lr * weight decay.
        clip: 0-d factor by which the gradients must still be multiplied; None for none.
    """
    coordinates_BMR, energy_BM = projected.coordinates_BMR, projected.energy_BM
    if clip is not None:
        clip = clip.to(coordinates_BMR.dtype)
        coordinates_BMR.mul_(clip)
        energy_BM = energy_BM * clip.square()
    source_BR: Tensor | None = None
    lost: LostMoments | None = None
    if projected.changes:
        source_BR, lost = change_frames(projected.changes, state, layout, rule, coordinates_BMR, numbers)
    seen = rule.basis.prepare(state, layout) if projected.seen is None else projected.seen
    setting = InnerContext(layout, rule.moments, numbers, source_BR)
    direction_BMR = rule.inner.direction(coordinates_BMR, state, setting)
    coefficients_BMR, scale_BM = direction_BMR, direction_BMR.new_empty(0, layout.rows)
    whole: list[Tensor] = []
    if rule.residual.rescales:
        given = Terms(direction_BMR, coordinates_BMR, energy_BM, layout)
        coefficients_BMR, scale_BM = rule.residual.terms(given, state)
        scale_BM = scale_BM if clip is None else scale_BM * clip
        whole = existing(projected.gradients)
    seed = numbers.seed + WEIGHT_STREAM if weights[0].dtype == torch.bfloat16 else None
    if layout.rows:  # a rank may have no rows of a small matrix
        rule.basis.update(weights, coefficients_BMR, seen, layout, whole, scale_BM, lr, keep, seed)
    if rule.residual.feeds_back:
        frame_BNR = rule.basis.frame(seen, layout)
        if lost is None:  # what moments lost is a difference of large products, which bfloat16 would not leave
            operand = operand_type(weights[0].dtype)
            coordinates_BMR, frame_BNR = coordinates_BMR.to(operand), frame_BNR.to(operand)
        rule.residual.remember(existing(projected.gradients), coordinates_BMR, frame_BNR, lost, state, numbers.betas)
