"""What one bucket does in one step: its matrices that have a gradient, from projection to the new weights.

The step has two halves, like the equations in `lightspan.optim.core`: all shares are projected before any is
updated, so that all gradients can be clipped together, or refused, before a weight changes.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightspan.devices import widest_float
from lightspan.optim.buckets import Bucket
from lightspan.optim.core import ProjectedGradients, Rule, project_step, step_in_one_pass, update_step
from lightspan.optim.inner import AdamSettings
from lightspan.optim.layout import Layout, State, canonical, canonical_gradient, matrices, part_of, put, write_part
from lightspan.optim.norms import held_gradient, square_norms
from lightspan.optim.sharding import Ranks, ranks_of


@dataclass
class Share:
    """A bucket's share of one step.

    Args:
        owners: which of the bucket's parameters take part; `active`: which of its matrices.
        index: selects the active matrices from the bucket's stacks; None if all take part.
        layout, state: those of the active matrices.
        gradients: [M N] by active matrix, None if only coordinates are left.
        pending: coordinates [M R] that came without their gradient, by position.
        first, due: positions whose frame is chosen for the first time, or again.
        projected: result of the first half of the step; None before it.
    """

    bucket: Bucket
    owners: list[int]
    active: list[int]
    index: slice | Tensor | None
    layout: Layout
    state: State
    gradients: list[Tensor | None]
    pending: dict[int, Tensor]
    first: list[int]
    due: list[int]
    projected: ProjectedGradients | None = None

    @staticmethod
    def of(bucket: Bucket, rule: Rule) -> "Share | None":
        """The bucket's share of the coming step; None if none of its parameters has a gradient."""
        owners = [i for i, p in enumerate(bucket.parameters) if p.grad is not None or i in bucket.pending]
        if not owners:
            return None
        active = [place for i in owners for place in bucket.places(i)]
        first, due = bucket.due(active, rule)
        layout, state, index = bucket.layout, bucket.state, None
        if len(active) < layout.batch:
            index = layout.select(active)
            layout, state = layout.part(active), part_of(state, index)
        gradients: list[Tensor | None] = []
        for parameter in (bucket.parameters[i] for i in owners):
            held = matrices(parameter, bucket.stacked)
            own = [None] * len(held) if parameter.grad is None else matrices(parameter.grad, bucket.stacked)
            gradients += [None if g is None else canonical_gradient(g, p) for g, p in zip(own, held, strict=True)]
        pending = {place: bucket.pending[i] for place, i in enumerate(active) if i in bucket.pending}
        return Share(bucket, owners, active, index, layout, state, gradients, pending, first, due)

    @property
    def ranks(self) -> Ranks | None:
        """The ranks among which the matrices are split."""
        return None if self.layout.shards is None else self.layout.shards.ranks

    def whole_gradients(self) -> list[Tensor]:
        return [gradient for gradient in self.gradients if gradient is not None]

    def gradients_that_choose_frames(self) -> list[Tensor]:
        """The gradients from which this step chooses frames."""
        return [gradient for i in (*self.first, *self.due) if (gradient := self.gradients[i]) is not None]

    def keeps_its_frames(self) -> bool:
        return not (self.first or self.due)

    def project(self, rule: Rule, energy: bool) -> None:
        """The first half: coordinates of the gradients, in new frames where due. Writes no state.

        Args:
            energy: whether row norms are wanted.
        """
        self.projected = project_step(
            self.gradients, self.pending, self.state, self.layout, rule,
            first=self.first, due=self.due, energy=energy, beta1=self.bucket.group["betas"][0],
        )  # fmt: skip

    def project_with_error(self, rule: Rule, energy: bool, clip: Tensor | None) -> None:
        """The first half under error feedback: with the clipped gradients plus what earlier steps left out. The sums
        are as large as the gradients in float32, so those of one share exist at a time: those of all would cancel
        what quantised state saves.
        """
        one = torch.ones((), device=self.layout.device) if clip is None else clip
        accumulated = rule.residual.accumulate(self.whole_gradients(), self.state, one)
        self.gradients = [matrix_MN.to(self.layout.dtype) for matrix_MN in accumulated]
        self.project(rule, energy)

    def update(self, rule: Rule, scale: float, clip: Tensor | None) -> None:
        """The second half: weights and state, in place; in one pass over both halves if nothing was projected before.

        Args:
            scale: factor on the learning rate, except for decay.
            clip: 0-d factor by which the gradients must still be multiplied; None for none.
        """
        self._count_step()
        rates = self._rates(scale)
        group, noise = self.bucket.group, self.bucket.noise
        adam = AdamSettings(group["betas"], group["eps"], noise)
        owned = self._matrices()
        weights = [canonical(matrix) for matrix in owned]
        if self.projected is None:
            step_in_one_pass(weights, self.whole_gradients(), self.state, rule, adam, **rates)
        else:
            update_step(weights, self.state, self.layout, rule, self.projected, adam, **rates, clip=clip)
        put(weights, owned)
        self.gradients, self.projected = [], None
        noise.add_(len(self.active))
        self.bucket.pending.clear()
        if isinstance(self.index, Tensor):  # a slice was stepped in place
            write_part(self.bucket.state, self.index, self.state, {})

    def _matrices(self) -> list[Tensor]:
        return [m for i in self.owners for m in matrices(self.bucket.parameters[i], self.bucket.stacked)]

    def _count_step(self) -> None:
        for i in self.active:
            self.bucket.done[i] += 1
        for i in self.owners:
            self.bucket.views[i]["step"].fill_(self.bucket.done[self.bucket.places(i)[0]])

    def _rates(self, scale: float) -> dict[str, Tensor]:
        """lr * scale and 1 - lr * decay, on the device, filled there because a copy from the host would wait for it."""
        rate, device = self.bucket.group["lr"], self.layout.device
        wide = widest_float(device)
        lr = rate.to(device, wide).reshape(()) if isinstance(rate, Tensor) else None
        lr = torch.full((), rate, dtype=wide, device=device) if lr is None else lr
        return {"lr": lr * scale, "keep": 1 - lr * self.bucket.group["weight_decay"]}


def squares_of(shares: Sequence[Share], plain: Sequence[Tensor], in_frames: bool) -> list[tuple[Ranks | None, Tensor]]:
    """Squared norms of all gradients of a step, each with the ranks among which it is split.

    Args:
        plain: parameters that are not projected.
        in_frames: whether gradients no longer exist, so that norms of projected ones are those of their coordinates.
    """
    unprojected: dict[Ranks | None, list[Tensor]] = defaultdict(list)
    for parameter in plain:
        unprojected[ranks_of(parameter)].append(held_gradient(parameter))
    squares = []
    for share in shares:
        if share.projected is None:
            unprojected[share.ranks] += share.whole_gradients()
        elif in_frames:
            squares.append((share.ranks, share.projected.coordinates_BMR.square().sum()))
        else:
            squares.append((share.ranks, share.projected.energy_BM.sum()))
    return squares + [(ranks, square_norms(gradients)) for ranks, gradients in unprojected.items()]
