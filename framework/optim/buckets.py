"""Parameters that step together: matrices of one group, shape and layout, with their state stacked."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightspan.devices import wide_type
from lightspan.errors import UserError
from lightspan.optim.layout import Layout, State, canonical, is_wide, matrices, matrix_shape, shards_of
from lightspan.optim.loading import require_same_kind
from lightspan.optim.settings import Switches
from lightspan.sharded import local

if TYPE_CHECKING:
    from lightspan.optim.low_rank import LowRank

SEED_STRIDE = 1 << 24
"""Distance between the seeds of two random streams, so that counting up in one does not reach the next."""
SHARD_STRIDE = 1 << 40
"""Distance between the seeds of two ranks with rows of one matrix: they round different numbers."""


@dataclass
class Bucket:
    """Projected parameters of one group, shape and layout; `Optimizer.state` contains views of their stacked state.

    Args:
        phases: in [0, 1), spread over all matrices of the optimiser; see `lightspan.optim.triggers`.
        views: the state of each parameter.
        done: steps that each matrix has taken; the state has them as tensors, which the host need not read.
        noise: int64, 0-d, on the device: seed of the coming step's stochastic rounding. It counts the steps of all
            matrices, which the saved state knows, so a resumed run rounds like an uninterrupted one.
        stacked: whether each parameter is a stack [E out in] of matrices, and its state is stacked too.
        pending: coordinates [M R] of gradients that no longer exist, by position; see `lightspan.optim.gradients`.
    """

    group: dict[str, Any]
    parameters: list[Tensor]
    phases: list[float]
    layout: Layout
    state: State
    views: list[State]
    done: list[int]
    noise: Tensor
    stacked: bool = False
    pending: dict[int, Tensor] = field(default_factory=dict)

    def places(self, number: int) -> range:
        """Positions of the matrices that parameter `number` holds."""
        count = len(self.done) // len(self.parameters)
        return range(number * count, (number + 1) * count)

    @staticmethod
    def build(
        group: dict[str, Any],
        parameters: list[Tensor],
        stacked: bool,
        phases: list[float],
        layout: Layout,
        rule: Switches,
        saved: list[State],
        names: list[str],
    ) -> "Bucket":
        """Stacks the existing state of the parameters, in the given order; what is missing is initialised.

        Raises: UserError for state of another rule or another rank.
        """
        state, shards = rule.initial(layout), layout.shards
        by_row = set() if shards is None else _keys_by_row(rule, layout)
        views, count = [], layout.batch // len(parameters)
        for i, known in enumerate(saved):
            place = slice(i * count, (i + 1) * count) if stacked else i
            view = {key: stack[place] for key, stack in state.items()}
            if shards is not None:
                view.update({key: shards.distributed(view[key]) for key in by_row})
            view["step"] = torch.tensor(0.0)
            if known:
                require_same_kind(names[i], known, view)
            for key, value in known.items():
                if shards is not None and key in by_row:
                    rows = value.to_local() if isinstance(value, DTensor) else shards.own(value)
                    state[key][i].copy_(rows)
                else:
                    view[key].copy_(value)
            views.append(view)
        done = [int(view["step"]) for view in views for _ in range(count)]
        seed = layout.seeds[0] * SEED_STRIDE + sum(done) + (shards.ranks.index * SHARD_STRIDE if shards else 0)
        noise = torch.full((), seed, dtype=torch.int64, device=layout.device)
        return Bucket(group, parameters, phases, layout, state, views, done, noise, stacked)

    def is_shown_in(self, state: Mapping[Tensor, State]) -> bool:
        """Whether an optimiser's `state` still shows the bucket's tensors: Lightning puts other tensors into the same
        dictionaries, and so does loading a checkpoint.
        """
        return all(
            state[p].keys() == view.keys() and all(state[p][key] is view[key] for key in view)
            for p, view in zip(self.parameters, self.views, strict=True)
        )

    def due(self, positions: list[int], rule: Switches) -> tuple[list[int], list[int]]:
        """Those of `positions` whose frame the coming step chooses for the first time, and those it chooses again; as
        indices into `positions`.
        """
        first = [place for place, i in enumerate(positions) if self.done[i] == 0]
        later = [place for place, i in enumerate(positions) if self.done[i] > 0]
        if not later:
            return first, []
        due = set(rule.trigger.due([positions[place] for place in later], self.done, self.phases))
        return first, [place for place in later if positions[place] in due]


@dataclass(frozen=True)
class Member:
    """A projected parameter that is to be put into a bucket.

    Args:
        stacked: whether it counts as a stack of matrices [E out in].
        saved: its state so far; empty if it has none.
    """

    parameter: Tensor
    group: dict[str, Any]
    rank: int
    stacked: bool
    name: str
    saved: State


def build_buckets(members: Sequence[Member], rule: Switches, seed: int) -> list[Bucket]:
    """Groups what can step together: parameters of one group whose matrices have one shape, one rank, and their
    axes in one order in memory; the rows of moved ones are made alike.

    Raises: UserError for saved state of another rule or another rank.
    """
    alike: dict[tuple[Any, ...], list[tuple[Member, int]]] = defaultdict(list)
    order = 0  # matrices so far: each has its own seed and phase, whatever its bucket
    for member in members:
        parameter = member.parameter
        held, shards = matrices(parameter, member.stacked), shards_of(parameter)
        matrix = local(parameter) if shards is not None and shards.moved else canonical(held[0])
        look = (matrix.shape, matrix.stride(), matrix_shape(held[0]), is_wide(held[0]), shards, len(held))
        key = (id(member.group), member.stacked, look, parameter.dtype, parameter.device, member.rank)
        alike[key].append((member, order))
        order += len(held)
    buckets = []
    for pairs in alike.values():
        kind, together = pairs[0][0], [member for member, _ in pairs]
        held = matrices(kind.parameter, kind.stacked)
        places = [first + i for _, first in pairs for i in range(len(held))]
        seeds, phases = [seed * SEED_STRIDE + place for place in places], [place / order for place in places]
        buckets.append(
            Bucket.build(
                kind.group,
                [member.parameter for member in together],
                kind.stacked,
                phases,
                layout_of(held, kind.rank, seeds, kind.parameter.device),
                rule,
                [member.saved for member in together],
                [member.name for member in together],
            )
        )
    return buckets


class Buckets:
    """An optimiser's buckets, built when they are needed."""

    def __init__(self) -> None:
        self._built: list[Bucket] | None = None
        self._built_for: tuple[list[Any], list[Any]] = [], []
        self._places: dict[Tensor, tuple[Bucket, int]] = {}

    def of(self, optimizer: "LowRank") -> list[Bucket]:
        """The buckets, rebuilt whenever something, a checkpoint or a device move, replaced the state that consists of
        their views.

        Raises: UserError if a group's `rank` or `project` changed after its state had taken steps.
        """
        groups, state = optimizer.param_groups, optimizer.state
        # Buckets keep groups and parameters alive, so nothing else can get their ids.
        look = [(id(g), id(p), p.device, p.dtype, p.stride()) for g in groups for p in g["params"]]
        settings = [(group["rank"], group["project"]) for group in groups]
        shown = self._built is not None and all(bucket.is_shown_in(state) for bucket in self._built)
        if self._built is None or (look, settings) != self._built_for or not shown:
            if self._built is not None and settings != self._built_for[1]:
                _forget_unstepped(state, self._built_for[1], settings)
            self._built, self._places = build_buckets(_members(optimizer), optimizer.rule, optimizer.seed), {}
            for bucket in self._built:
                views = zip(bucket.parameters, bucket.views, strict=True)
                state.update((parameter, dict(view)) for parameter, view in views)
            self._built_for = look, settings
        return self._built

    def places(self, optimizer: "LowRank") -> dict[Tensor, tuple[Bucket, int]]:
        """The bucket of each projected parameter, and its position there. Checks for replaced state once per step."""
        if not self._places:
            self._places = {p: (bucket, i) for bucket in self.of(optimizer) for i, p in enumerate(bucket.parameters)}
        return self._places

    def end_step(self) -> None:
        """The next step checks again whether the state was replaced."""
        self._places = {}

    def rebuild(self) -> None:
        """The next step builds them anew from the optimiser's state."""
        self._built, self._places = None, {}

    def forget_coordinates(self) -> None:
        """Clears gradients that exist only in coordinates."""
        for bucket in self._built or []:
            bucket.pending.clear()


def _members(optimizer: "LowRank") -> list[Member]:
    return [
        Member(
            parameter,
            group,
            group["rank"],
            optimizer.selection(group).stacked(parameter),
            optimizer.name_of(parameter),
            optimizer.state[parameter],
        )
        for group in optimizer.param_groups
        for parameter in group["params"]
        if optimizer.projected(parameter, group)
    ]


def _forget_unstepped(state: dict[Tensor, Any], before: list[Any], now: list[Any]) -> None:
    if any(int(held["step"]) for held in state.values() if "step" in held):
        changes = [f"{b} -> {n}" for b, n in zip(before, now, strict=True) if b != n]
        raise UserError(
            f"(rank, project) of a parameter group changed in the middle of training: {', '.join(changes)}. State "
            "cannot follow; restore the value, or build a new optimiser"
        )
    state.clear()


def layout_of(parameters: list[Tensor], rank: int, seeds: list[int], device: torch.device) -> Layout:
    """How the step sees parameters of one shape."""
    first, shards = parameters[0], shards_of(parameters[0])
    rows, size = matrix_shape(first)
    held, dtype = rows if shards is None else shards.rows, wide_type(first.dtype)
    return Layout(held, size, rank, is_wide(first), dtype, device, tuple(seeds), shards)


def _keys_by_row(rule: Switches, layout: Layout) -> set[str]:
    """The state with a part for every row: what grows by one with each row."""
    small, large = (
        rule.initial(replace(layout, rows=rows, device=torch.device("meta"))) for rows in (layout.rows, layout.rows + 1)
    )
    return {key for key, value in small.items() if value.shape != large[key].shape}
