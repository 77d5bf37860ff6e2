"""Building buckets: which parameters step together, with the state that they have so far stacked."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightspan.core.devices import wide_type, widest_float
from lightspan.core.errors import UserError
from lightspan.core.sharded import local, ranks_of
from lightspan.optim.matrices.loading import require_same_kind
from lightspan.optim.matrices.placement import StatePlacement
from lightspan.optim.matrices.shapes import canonical, count_of, is_wide, matrix_shape, one_of, shards_of, slices_of
from lightspan.optim.matrices.stacks import FIXED, SEED_STRIDE, SHARD_STRIDE, Bucket, Layout, State

LARGEST_STACK = 1 << 24
"""How many numbers of whole matrices a rule that projects late widens at once, unless a single parameter, or one matrix
for each rank, has more: 64 MiB of float32."""


class StateMaker(Protocol):
    """What buckets ask of a rule in matrices."""

    @property
    def projects_late(self) -> bool:
        """Whether it widens whole matrices, those of one bucket at a time."""

    def initial(self, layout: Layout) -> State:
        """State before the first step."""


def stacked_bucket(
    group: dict[str, Any],
    parameters: list[Tensor],
    stacked: bool,
    phases: list[float],
    layout: Layout,
    rule: StateMaker,
    saved: list[State],
    names: list[str],
    placement: StatePlacement,
) -> Bucket:
    """Stacks the existing state of the parameters, in the given order; what is missing is initialised.

    Raises: UserError for state of another rule or another rank.
    """
    shards, first = layout.shards, parameters[0]
    state = placement.create(lambda device: rule.initial(replace(layout, device=device)), first)
    by_row = set() if shards is None else _keys_by_row(rule, layout)
    views, count = [], layout.batch // len(parameters)
    for i, known in enumerate(saved):
        place = slice(i * count, (i + 1) * count) if stacked else i
        view = {key: stack[place] for key, stack in state.items()}
        slices = slices_of(parameters[i], stacked)
        spread = dict.fromkeys(by_row, shards) if slices is None else dict.fromkeys(state, slices)
        view.update({key: parts.distributed(view[key]) for key, parts in spread.items() if parts is not None})
        view["step"] = torch.tensor(0.0)
        if known:
            require_same_kind(names[i], known, view)
        for key, value in known.items():
            if (parts := spread.get(key)) is not None:
                state[key][place].copy_(value.to_local() if isinstance(value, DTensor) else parts.own(value))
            else:
                view[key].copy_(value)
        views.append(view)
    done = [int(view["step"]) for view in views for _ in range(count)]
    draws = state["draws"].tolist() if "draws" in state and any(done) else [0] * layout.batch
    seed = next(iter(layout.seeds), 0) * SEED_STRIDE + sum(done) + (shards.ranks.index * SHARD_STRIDE if shards else 0)
    noise = torch.full((), seed, dtype=torch.int64, device=layout.device)
    offloaded = frozenset(key for key in state if placement.is_offloaded(first, key))
    return Bucket(
        group, parameters, phases, layout, state, views, done, draws, noise, widest_float(layout.device),
        ranks_of(first), isinstance(first, DTensor), stacked, offloaded,
    )  # fmt: skip


@dataclass(frozen=True)
class Member:
    """A projected parameter that is to be put into a bucket.

    Args:
        stacked: whether it counts as a stack of matrices [E out in].
        heads: how many of its rows belong to each attention head, see `Layout`.
        saved: its state so far; empty if it has none.
        alone: whether it has a bucket to itself, so that its steps do not depend on what else this rank steps.
        here: whether this rank steps it.
    """

    parameter: Tensor
    group: dict[str, Any]
    rank: int
    stacked: bool
    heads: tuple[int, ...]
    name: str
    saved: State
    alone: bool = False
    here: bool = True


def build_buckets(members: Sequence[Member], rule: StateMaker, seed: int, placement: StatePlacement) -> list[Bucket]:
    """Groups what can step together: parameters of one group whose matrices have one shape, one rank, and their
    axes in one order in memory; the rows of moved ones are made alike. What other ranks step counts for the seeds, and
    gets no bucket.

    Raises: UserError for saved state of another rule or another rank.
    """
    alike: dict[tuple[Any, ...], list[tuple[Member, int]]] = defaultdict(list)
    order = 0  # matrices so far: each has its own seed and phase, whatever its bucket
    for member in members:
        parameter = member.parameter
        like, count = one_of(parameter, member.stacked), count_of(parameter, member.stacked)
        shards, slices = shards_of(like), slices_of(parameter, member.stacked)
        matrix = local(parameter) if shards is not None and shards.moved else canonical(like)
        look = (matrix.shape, matrix.stride(), matrix_shape(like), is_wide(like), shards, count, ranks_of(parameter))
        key = (id(member.group), member.stacked, look, parameter.dtype, parameter.device, member.rank, member.heads)
        if member.here:
            alike[key].append((member, order if slices is None else order + slices.start))
        order += count if slices is None else slices.total
    buckets = []
    for pairs in (part for one_kind in alike.values() for part in _parts(one_kind, rule, placement)):
        kind, together = pairs[0][0], [member for member, _ in pairs]
        held, count = [one_of(kind.parameter, kind.stacked)], count_of(kind.parameter, kind.stacked)
        places = [first + i for _, first in pairs for i in range(count)]
        seeds, phases = [seed * SEED_STRIDE + place for place in places], [place / order for place in places]
        buckets.append(
            stacked_bucket(
                kind.group,
                [member.parameter for member in together],
                kind.stacked,
                phases,
                layout_of(held, kind.rank, seeds, kind.parameter.device, kind.heads),
                rule,
                [member.saved for member in together],
                [member.name for member in together],
                placement,
            )
        )
    return buckets


def _parts(
    pairs: list[tuple[Member, int]], rule: StateMaker, placement: StatePlacement
) -> Iterator[list[tuple[Member, int]]]:
    """All that can step together, or as many as rules that project late should widen at once and as fit one transfer
    to the device. Ranks cut alike, since they see the same whole shapes.
    """
    member, shards = pairs[0][0], shards_of(pairs[0][0].parameter)
    least = 1 if shards is None else shards.ranks.count
    count = 1 if member.alone else len(pairs)
    if rule.projects_late:
        count = min(count, max(LARGEST_STACK // member.parameter.shape.numel(), least))
    if (fitting := placement.largest_count(_offloaded_size(member, rule, placement))) is not None:
        count = min(count, max(fitting, least))
    return (pairs[start : start + count] for start in range(0, len(pairs), count))


def _offloaded_size(member: Member, rule: StateMaker, placement: StatePlacement) -> int:
    """Bytes of a parameter's state that live on the host; of a sharded one those of its first rank, the most."""
    slices = slices_of(member.parameter, member.stacked)
    count = count_of(member.parameter, member.stacked) if slices is None else slices.chunk
    like = one_of(member.parameter, member.stacked)
    layout = layout_of([like], member.rank, [0] * count, torch.device("meta"))
    rows = layout.rows if layout.shards is None else layout.shards.chunk
    state = rule.initial(replace(layout, rows=rows))
    return sum(value.nbytes for key, value in state.items() if placement.is_offloaded(member.parameter, key))


def forget_unstepped(state: dict[Tensor, Any], before: list[Any], now: list[Any]) -> None:
    """Raises: UserError if the groups' `rank`, `project` or `stacks` changed after their state had taken steps."""
    if any(int(held["step"]) for held in state.values() if "step" in held):
        changes = [f"{b} -> {n}" for b, n in zip(before, now, strict=True) if b != n]
        raise UserError(
            f"({', '.join(FIXED)}) of a parameter group changed in the middle of training: {', '.join(changes)}. "
            "State cannot follow; restore the value, or build a new optimiser"
        )
    state.clear()


def layout_of(
    parameters: list[Tensor], rank: int, seeds: list[int], device: torch.device, heads: tuple[int, ...] = ()
) -> Layout:
    """How the step sees parameters of one shape."""
    first, shards = parameters[0], shards_of(parameters[0])
    rows, size = matrix_shape(first)
    held, dtype = rows if shards is None else shards.rows, wide_type(first.dtype)
    return Layout(held, size, rank, is_wide(first), dtype, device, tuple(seeds), shards, heads)


def _keys_by_row(rule: StateMaker, layout: Layout) -> set[str]:
    """The state with a part for every row: what grows by one with each row."""
    small, large = (
        rule.initial(replace(layout, rows=rows, device=torch.device("meta"))) for rows in (layout.rows, layout.rows + 1)
    )
    return {key for key, value in small.items() if value.shape != large[key].shape}
