"""Stacks of matrices that step together, and one step of a stack: what is the same for every rule in matrices.

Shapes: B matrices, M rows (the kept, longer side), N columns. Wide matrices are passed transposed.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightspan.core.devices import widest_float
from lightspan.core.sharded import Ranks, ranks_of
from lightspan.optim.matrices.layout import (
    Layout,
    State,
    canonical,
    canonical_gradient,
    matrices,
    part_of,
    put,
    write_part,
)
from lightspan.optim.matrices.placement import StateTransfer

FIXED = ("rank", "project", "stacks")
"""Settings of groups that decide which state there is; those without a subspace have no rank."""


@dataclass
class Bucket:
    """Parameters of one group, shape and layout that are stepped as matrices; `Optimizer.state` contains views of their
    stacked state.

    Args:
        phases: in [0, 1), spread over all matrices of the optimiser; see `lightspan.optim.low_rank.bases.Trigger`.
        views: the state of each parameter.
        done: steps that each matrix has taken; the state has them as tensors, which the host need not read.
        draws: frames that each matrix has drawn, likewise; zeros for a basis that does not count them.
        noise: int64, 0-d, on the device: seed of the coming step's stochastic rounding. It counts the steps of all
            matrices, which the saved state knows, so a resumed run rounds like an uninterrupted one.
        stacked: whether each parameter is a stack [E out in] of matrices, and its state is stacked too.
        offloaded: names of the state that lives on the host, while the parameters do not; see
        `lightspan.optim.matrices.placement`.
        pending: coordinates [M R] of gradients that no longer exist, by position; see
        `lightspan.optim.low_rank.gradients`.
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
    offloaded: frozenset[str] = frozenset()
    pending: dict[int, Tensor] = field(default_factory=dict)

    def places(self, number: int) -> range:
        """Positions of the matrices that parameter `number` holds."""
        count = len(self.done) // len(self.parameters)
        return range(number * count, (number + 1) * count)

    def owners(self) -> list[int]:
        """The parameters that have a gradient, whole or in coordinates."""
        return [i for i, p in enumerate(self.parameters) if p.grad is not None or i in self.pending]

    def is_shown_in(self, state: Mapping[Tensor, State]) -> bool:
        """Whether an optimiser's `state` still shows the bucket's tensors: Lightning puts other tensors into the same
        dictionaries, and so does loading a checkpoint.
        """
        return all(
            state[p].keys() == view.keys() and all(state[p][key] is view[key] for key in view)
            for p, view in zip(self.parameters, self.views, strict=True)
        )


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
    return look, [tuple(group.get(key) for key in FIXED) for group in groups]


class StackStep(ABC):
    """One step of a bucket's matrices that have a gradient. A rule in matrices says what it does to them, in `apply`.

    Attributes:
        owners: which of the bucket's parameters take part, at least one.
        active: which of its matrices take part. A rank may have none of a stack; it counts the step with the others.
        index: selects the active matrices from the bucket's stacks; None if all take part.
        layout, state: those of the active matrices. State on the host joins the rest in `update`.
        gradients: [M N] by active matrix, in any float dtype; None if only coordinates are left.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.bucket, self.owners = bucket, bucket.owners()
        self.active = [place for i in self.owners for place in bucket.places(i)]
        self.layout, self.index = bucket.layout, None
        self.state = {key: value for key, value in bucket.state.items() if key not in bucket.offloaded}
        if len(self.active) < self.layout.batch:
            self.index = self.layout.select(self.active)
            self.layout, self.state = self.layout.part(self.active), part_of(self.state, self.index)
        self.gradients: list[Tensor | None] = []
        for parameter in (bucket.parameters[i] for i in self.owners):
            held = matrices(parameter, bucket.stacked)
            own = [None] * len(held) if parameter.grad is None else matrices(parameter.grad, bucket.stacked)
            self.gradients += [None if g is None else canonical_gradient(g, p) for g, p in zip(own, held, strict=True)]

    @property
    def ranks(self) -> Ranks | None:
        """The ranks among which the matrices, or stacks of them, are split."""
        return ranks_of(self.bucket.parameters[0])

    def prepare(self, energy: bool) -> list[Tensor]:
        """Does what comes before all gradients are checked and clipped together; writes no state.

        Args:
            energy: whether the norms of gradients are wanted.
        Returns the gradients that must be checked by themselves, because what is made of them would hide their norms.
        """
        return []

    def not_projected(self) -> list[Tensor]:
        """The gradients, as long as their norms follow from nothing else."""
        return [gradient for gradient in self.gradients if gradient is not None]

    def squares(self, in_frames: bool) -> list[Tensor]:
        """The squared norm of all gradients, 0-d, if `prepare` found it.

        Args:
            in_frames: whether gradients no longer exist, so that it is that of their coordinates.
        """
        return [] if self.active else [self.layout.zeros().sum()]

    def transfer(self, clip: Tensor | None) -> StateTransfer:
        """`update`, with the bucket's offloaded state brought to the device for it."""
        return StateTransfer(
            self.bucket.layout.device, [self.bucket.state], [self.bucket.offloaded], partial(self.update, clip)
        )

    def update(self, clip: Tensor | None, states: Sequence[State]) -> None:
        """Weights and state, in place.

        Args:
            clip: 0-d factor by which the gradients must still be multiplied; None for none.
            states: the bucket's, all of it on the device.
        """
        if self.active:
            (stacks,) = states
            arrived = {key: value for key, value in stacks.items() if key not in self.state}
            self.state = {**self.state, **(arrived if self.index is None else part_of(arrived, self.index))}
            owned = [m for i in self.owners for m in matrices(self.bucket.parameters[i], self.bucket.stacked)]
            weights = [canonical(matrix) for matrix in owned]
            self.apply(weights, clip)
            put(weights, owned)
            self.bucket.noise.add_(len(self.active))
            if isinstance(self.index, Tensor):  # a slice was stepped in place
                write_part(stacks, self.index, self.state, {})
        self.count()
        self.gradients, self.state = [], {}  # those on the device for this step are freed

    @abstractmethod
    def apply(self, weights: list[Tensor], clip: Tensor | None) -> None:
        """Steps the weights [M N] and the state of the active matrices, in place."""

    def count(self) -> None:
        """Counts the step."""
        for i in self.active:
            self.bucket.done[i] += 1
        for i in self.owners:
            self.bucket.views[i]["step"].add_(1)

    def rates(self) -> tuple[Tensor, Tensor]:
        """lr * scale and 1 - lr * decay, on the device, filled there because a copy from the host would wait for it."""
        rate, scale, decay = (self.bucket.group[name] for name in ("lr", "scale", "weight_decay"))
        device = self.layout.device
        wide = widest_float(device)
        if isinstance(rate, Tensor):
            rate = rate.to(device, wide).reshape(())
            return rate * scale, 1 - rate * decay
        lr, keep = (torch.full((), value, dtype=wide, device=device) for value in (rate * scale, 1 - rate * decay))
        return lr, keep
