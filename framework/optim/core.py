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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightspan.devices import widest_float
from lightspan.optim.frame_changes import NewFrames, change_frames, choose_frames, with_frames
from lightspan.optim.inner import AdamSettings, InnerContext
from lightspan.optim.layout import (
    WEIGHT_STREAM,
    Layout,
    State,
    canonical,
    canonical_gradient,
    matrices,
    part_of,
    put,
    write_part,
)
from lightspan.optim.offload import Visit
from lightspan.optim.residuals import LostMoments, Terms
from lightspan.optim.settings import UpdateRule
from lightspan.sharded import Ranks, ranks_of
from lightspan.triton_kernels.backproject_update import operand_type


@dataclass
class Bucket:
    """Projected parameters of one group, shape and layout; `Optimizer.state` contains views of their stacked state.

    Args:
        phases: in [0, 1), spread over all matrices of the optimiser; see `lightspan.optim.bases.Trigger`.
        views: the state of each parameter.
        done: steps that each matrix has taken; the state has them as tensors, which the host need not read.
        draws: frames that each matrix has drawn, likewise; zeros for a basis that does not count them.
        noise: int64, 0-d, on the device: seed of the coming step's stochastic rounding. It counts the steps of all
            matrices, which the saved state knows, so a resumed run rounds like an uninterrupted one.
        stacked: whether each parameter is a stack [E out in] of matrices, and its state is stacked too.
        away: names of the state that lives on the host, while the parameters do not; see `lightspan.optim.offload`.
        pending: coordinates [M R] of gradients that no longer exist, by position; see `lightspan.optim.gradients`.
    """

    group: dict[str, Any]
    parameters: list[Tensor]
    phases: list[float]
    layout: Layout
    state: State
    views: list[State]
    done: list[int]
    draws: list[int]
    noise: Tensor
    stacked: bool = False
    away: frozenset[str] = frozenset()
    pending: dict[int, Tensor] = field(default_factory=dict)

    def places(self, number: int) -> range:
        """Positions of the matrices that parameter `number` holds."""
        count = len(self.done) // len(self.parameters)
        return range(number * count, (number + 1) * count)

    def is_shown_in(self, state: Mapping[Tensor, State]) -> bool:
        """Whether an optimiser's `state` still shows the bucket's tensors: Lightning puts other tensors into the same
        dictionaries, and so does loading a checkpoint.
        """
        return all(
            state[p].keys() == view.keys() and all(state[p][key] is view[key] for key in view)
            for p, view in zip(self.parameters, self.views, strict=True)
        )

    def due(self, positions: list[int], rule: UpdateRule) -> tuple[list[int], list[int]]:
        """Those of `positions` whose frame the coming step chooses for the first time, and those it chooses again; as
        indices into `positions`.
        """
        first = [place for place, i in enumerate(positions) if self.done[i] == 0]
        later = [place for place, i in enumerate(positions) if self.done[i] > 0]
        if not later:
            return first, []
        due = set(rule.trigger.due([positions[place] for place in later], self.done, self.phases))
        return first, [place for place in later if positions[place] in due]


@dataclass
class Buckets:
    """All of an optimiser's buckets.

    Args:
        built_for: parameters and settings of the groups that they were built for, as `built_for` gives them; None if
            there are none yet.
    """

    every: list[Bucket] = field(default_factory=list)
    built_for: tuple[list[Any], list[Any]] | None = None
    places: dict[Tensor, tuple[Bucket, int]] = field(init=False)
    """The bucket of each projected parameter, and its position there."""

    def __post_init__(self) -> None:
        self.places = {p: (bucket, i) for bucket in self.every for i, p in enumerate(bucket.parameters)}

    def are_current(self, groups: list[dict[str, Any]], state: Mapping[Tensor, State]) -> bool:
        """Whether nothing, such as a checkpoint or a move to another device, has replaced what they were built for, or
        the state that consists of their views.
        """
        return self.built_for == built_for(groups) and all(bucket.is_shown_in(state) for bucket in self.every)


def built_for(groups: list[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    """What buckets depend on: (parameters, settings) of an optimiser's groups."""
    # Buckets keep groups and parameters alive, so nothing else can get their ids.
    look = [(id(g), id(p), p.device, p.dtype, p.stride()) for g in groups for p in g["params"]]
    return look, [tuple(group[key] for key in ("rank", "project", "stacks")) for group in groups]


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


@dataclass
class BucketStep:
    """One step of a bucket's matrices that have a gradient.

    Args:
        owners: which of the bucket's parameters take part; `active`: which of its matrices. A rank may have none of a
            stack; it counts the step with the others.
        index: selects the active matrices from the bucket's stacks; None if all take part.
        layout, state: those of the active matrices. What lives on the host joins the state in the second half.
        gradients: [M N] by active matrix, in any float dtype; None if only coordinates are left.
        pending: coordinates [M R] that came without their gradient, by position; such matrices are not due.
        first, due: positions whose frame is chosen for the first time, or again.
        projected: result of the first half; None before it.
    """

    bucket: Bucket
    rule: UpdateRule
    owners: list[int]
    active: list[int]
    index: slice | Tensor | None
    layout: Layout
    state: State
    gradients: list[Tensor | None]
    pending: dict[int, Tensor]
    first: list[int]
    due: list[int]
    projected: Projected | None = None

    @staticmethod
    def of(bucket: Bucket, rule: UpdateRule) -> "BucketStep | None":
        """The bucket's part in the coming step, by `rule` with its group's settings; None if none of its parameters has
        a gradient.
        """
        owners = [i for i, p in enumerate(bucket.parameters) if p.grad is not None or i in bucket.pending]
        if not owners:
            return None
        active = [place for i in owners for place in bucket.places(i)]
        first, due = bucket.due(active, rule)
        layout, index = bucket.layout, None
        state = {key: value for key, value in bucket.state.items() if key not in bucket.away}
        if len(active) < layout.batch:
            index = layout.select(active)
            layout, state = layout.part(active), part_of(state, index)
        gradients: list[Tensor | None] = []
        for parameter in (bucket.parameters[i] for i in owners):
            held = matrices(parameter, bucket.stacked)
            own = [None] * len(held) if parameter.grad is None else matrices(parameter.grad, bucket.stacked)
            gradients += [None if g is None else canonical_gradient(g, p) for g, p in zip(own, held, strict=True)]
        pending = {place: bucket.pending[i] for place, i in enumerate(active) if i in bucket.pending}
        rule = rule.of(bucket.group)
        return BucketStep(bucket, rule, owners, active, index, layout, state, gradients, pending, first, due)

    @property
    def ranks(self) -> Ranks | None:
        """The ranks among which the matrices, or stacks of them, are split."""
        return ranks_of(self.bucket.parameters[0])

    def gradients_that_choose_frames(self) -> list[Tensor]:
        """The gradients from which the first half chooses frames."""
        return [] if self.rule.projects_late else _given(self.gradients[i] for i in (*self.first, *self.due))

    def not_projected(self) -> list[Tensor]:
        """The gradients, as long as their norms follow from nothing else."""
        return _given(self.gradients) if self.projected is None else []

    def squares(self, in_frames: bool) -> list[Tensor]:
        """The squared norm of all gradients, 0-d, once they are projected.

        Args:
            in_frames: whether gradients no longer exist, so that it is that of their coordinates.
        """
        if not self.active:
            return [self.layout.zeros().sum()]
        if self.projected is None:
            return []
        if in_frames:
            return [torch.linalg.vector_norm(self.projected.coordinates_BMR).square()]
        return [self.projected.energy_BM.sum()]

    def project(self, energy: bool) -> None:
        """The first half: coordinates of the gradients, in new frames where due. Writes no state. Rules that project
        late do so in `update`, after clipping.

        Args:
            energy: whether row norms are wanted.
        """
        if self.active and not self.rule.projects_late:
            self.projected = self._projected(self.gradients, energy)

    def second_half(self, clip: Tensor | None) -> Visit:
        """`update` as a visit of the bucket's state to the device."""
        state, away = self.bucket.state, self.bucket.away
        return Visit(self.bucket.layout.device, [state], [away], partial(self.update, clip))

    def update(self, clip: Tensor | None, states: Sequence[State]) -> None:
        """The second half: weights and state, in place.

        Args:
            clip: 0-d factor by which the gradients must still be multiplied; None for none.
            states: the bucket's, all of it on the device.
        """
        if not self.active:
            self._count_step()
            return
        (stacks,) = states
        arrived = {key: value for key, value in stacks.items() if key not in self.state}
        self.state = {**self.state, **(arrived if self.index is None else part_of(arrived, self.index))}
        if self.rule.residual.feeds_back:
            self.projected, clip = self._projected_with_error(clip), None
        elif self.rule.projects_late:
            self.projected = self._projected(self.gradients, self.rule.residual.rescales)
        assert self.projected is not None, "a step has two halves"
        self._count_step()
        group, noise = self.bucket.group, self.bucket.noise
        numbers = AdamSettings(group["betas"], group["eps"], noise)
        owned = [m for i in self.owners for m in matrices(self.bucket.parameters[i], self.bucket.stacked)]
        weights = [canonical(matrix) for matrix in owned]
        lr, keep = self._rates()
        update_weights(
            weights, self.state, self.layout, self.rule, self.projected, numbers, lr=lr, keep=keep, clip=clip
        )
        put(weights, owned)
        self.gradients, self.projected = [], None
        noise.add_(len(self.active))
        self.bucket.pending.clear()
        if isinstance(self.index, Tensor):  # a slice was stepped in place
            write_part(stacks, self.index, self.state, {})
        self.state = {}  # visitors leave

    def _projected(self, gradients: list[Tensor | None], energy: bool) -> Projected:
        changes = [
            self._new_frames(gradients, at, is_first) for at, is_first in ((self.first, True), (self.due, False)) if at
        ]
        given = [gradient is not None for gradient in gradients]
        parts = [
            self._coordinates(gradients[at.start : at.stop], part, self.layout.part(at), energy)
            for at, part in with_frames(changes, self.state, given)
        ]
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
        accumulated = self.rule.residual.accumulate(_given(self.gradients), self.state, one)
        # Products are in the dtype of other steps. What they lose of bfloat16 sums stays in the error.
        operand = operand_type(self.bucket.parameters[0].dtype)
        projected = self._projected([matrix_MN.to(operand) for matrix_MN in accumulated], self.rule.residual.rescales)
        self.gradients = []
        return replace(projected, gradients=[matrix_MN.to(self.layout.dtype) for matrix_MN in accumulated])

    def _new_frames(self, gradients: list[Tensor | None], positions: list[int], is_first: bool) -> NewFrames:
        chosen, beta1 = _given(gradients[i] for i in positions), self.bucket.group["betas"][0]
        assert len(chosen) == len(positions), "a frame is chosen from whole gradients"
        draws = [self.bucket.draws[self.active[i]] for i in positions]
        return choose_frames(chosen, positions, draws, self.state, self.layout, self.rule, beta1, first=is_first)

    def _coordinates(
        self, gradients: list[Tensor | None], state: State, layout: Layout, energy: bool
    ) -> tuple[Tensor, Tensor, State]:
        """Coordinates [b M R] of neighbours, zeros if none has a gradient; row norms [b M] or [0 M]; and their frames,
        built if they are used.
        """
        seen, whole = self.rule.basis.materialised(state, layout), _given(gradients)
        if not whole:
            return layout.zeros(layout.rows, layout.rank), layout.zeros(layout.rows)[:0], seen
        return *self.rule.basis.project(whole, seen, layout, energy=energy), seen

    def _count_step(self) -> None:
        for i in self.active:
            self.bucket.done[i] += 1
        for i in (*self.first, *self.due) if "draws" in self.state else ():
            self.bucket.draws[self.active[i]] += 1
        for i in self.owners:
            self.bucket.views[i]["step"].add_(1)

    def _rates(self) -> tuple[Tensor, Tensor]:
        """lr * scale and 1 - lr * decay, on the device, filled there because a copy from the host would wait for it."""
        rate, scale, decay = (self.bucket.group[name] for name in ("lr", "scale", "weight_decay"))
        device = self.layout.device
        wide = widest_float(device)
        if isinstance(rate, Tensor):
            rate = rate.to(device, wide).reshape(())
            return rate * scale, 1 - rate * decay
        lr, keep = (torch.full((), value, dtype=wide, device=device) for value in (rate * scale, 1 - rate * decay))
        return lr, keep


def _given(gradients: Iterable[Tensor | None]) -> list[Tensor]:
    return [gradient for gradient in gradients if gradient is not None]


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
    seen = rule.basis.materialised(state, layout) if projected.seen is None else projected.seen
    setting = InnerContext(layout, rule.moments, numbers, source_BR)
    direction_BMR = rule.inner.direction(coordinates_BMR, state, setting)
    coefficients_BMR, scale_BM = direction_BMR, direction_BMR.new_empty(0, layout.rows)
    whole: list[Tensor] = []
    if rule.residual.rescales:
        given = Terms(direction_BMR, coordinates_BMR, energy_BM, layout)
        coefficients_BMR, scale_BM = rule.residual.terms(given, state)
        scale_BM = scale_BM if clip is None else scale_BM * clip
        whole = _given(projected.gradients)
    seed = numbers.seed + WEIGHT_STREAM if weights[0].dtype == torch.bfloat16 else None
    if layout.rows:  # a rank may have no rows of a small matrix
        rule.basis.update(weights, coefficients_BMR, seen, layout, whole, scale_BM, lr, keep, seed)
    if rule.residual.feeds_back:
        frame_BNR = rule.basis.frame(seen, layout)
        if lost is None:  # what moments lost is a difference of large products, which bfloat16 would not leave
            operand = operand_type(weights[0].dtype)
            coordinates_BMR, frame_BNR = coordinates_BMR.to(operand), frame_BNR.to(operand)
        rule.residual.remember(_given(projected.gradients), coordinates_BMR, frame_BNR, lost, state, numbers.betas)
