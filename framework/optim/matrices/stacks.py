"""Stacks of matrices that step together: how a step sees them, and one step of a stack, the same for every rule.

A bucket is put together once (`lightspan.optim.matrices.buckets`) and knows what its steps need of its parameters.

Shapes: B matrices, M rows (the kept, longer side), N columns. Wide matrices are passed transposed.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightspan.core.sharded import Ranks, RowShards, from_local, local

State = dict[str, Tensor]
"""Stacked plain tensors, each with the matrix as its first axis: saved, moved and sharded like any optimiser state."""

SEED_STRIDE = 1 << 24
"""Distance between the seeds of two random streams, so that counting up in one does not reach the next."""
SHARD_STRIDE = 1 << 40
"""Distance between the seeds of two ranks with rows of one matrix: they round different numbers."""
WEIGHT_STREAM = 1 << 61
"""Added to a step's seed: the noise that rounds weights is independent of that of moments."""


@dataclass(frozen=True)
class Layout:
    """B matrices of one shape: M rows (the kept, longer side), N columns (the projected side), rank R.

    Of sharded matrices a rank sees only its own rows: `rows` counts these, possibly none.

    Args:
        wide: whether the parameter itself is wide, so that the step sees its transpose.
        dtype: of the arithmetic and of unquantised state: float32, or float64 for float64 weights.
        seeds: one per matrix; all randomness of its frames comes from it.
        shards: where the other rows are; None if they are all here.
        heads: for rules that orthogonalise each attention head by itself, how many of the parameter's rows belong to
            each part, in order; empty if all belong together.
    """

    rows: int
    size: int
    rank: int
    wide: bool
    dtype: torch.dtype
    device: torch.device
    seeds: tuple[int, ...]
    shards: RowShards | None = None
    heads: tuple[int, ...] = ()
    _indices: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def batch(self) -> int:
        return len(self.seeds)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the whole parameter with its trailing axes flattened."""
        rows = self.rows if self.shards is None else self.shards.total
        return (self.size, rows) if self.wide else (rows, self.size)

    @property
    def first_row(self) -> int:
        """Where this rank's rows begin among those of whole matrices."""
        return 0 if self.shards is None else self.shards.start

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros [B, *shape] of the state's dtype, or of another."""
        return torch.zeros(self.batch, *shape, dtype=dtype or self.dtype, device=self.device)

    def part(self, positions: Sequence[int]) -> "Layout":
        """The layout of some of the matrices."""
        return replace(self, seeds=tuple(self.seeds[i] for i in positions))

    def drawn(self, draws: Sequence[int]) -> "Layout":
        """The layout with the seeds of the next frames of matrices that have drawn so many."""
        # A large odd factor separates the streams of neighbouring seeds.
        return replace(self, seeds=tuple(seed + 1_000_003 * draw for seed, draw in zip(self.seeds, draws, strict=True)))

    def select(self, positions: Sequence[int]) -> slice | Tensor:
        """An index that selects some matrices, in ascending order, from a stack: a slice if they are neighbours, which
        copies nothing, otherwise their indices on the device. These are sent there once, because a copy from the host
        waits for it.
        """
        key = tuple(positions)
        if key == tuple(range(key[0], key[0] + len(key))):
            return slice(key[0], key[0] + len(key))
        if key not in self._indices:
            self._indices[key] = torch.tensor(key, device=self.device)
        return self._indices[key]

    def total(self, part: Tensor) -> Tensor:
        """A sum over this rank's rows, continued over all others."""
        return part if self.shards is None else self.shards.ranks.total(part)

    def gathered(self, part: Tensor) -> Tensor:
        """Whole matrices from this rank's rows [..., m, any]: for what cannot be computed as sums over rows."""
        return part if self.shards is None else self.shards.gather(part)


def part_of(state: State, index: slice | Tensor) -> State:
    """Only the matrices `index`: views of the stack for a slice, otherwise copies."""
    return {key: value[index] for key, value in state.items()}


def write_part(state: State, index: slice | Tensor, part: State, before: State) -> None:
    """Writes matrices back in place, so that views of the stack stay views.

    Args:
        before: what `part_of` returned for `index`; with a slice, a tensor that is still the same was changed in place.
    """
    for key, value in part.items():
        if isinstance(index, Tensor) or value is not before.get(key):
            state[key][index] = value


def matrix_of(tensor: Tensor, wide: bool, shards: RowShards | None) -> Tensor:
    """A matrix [M N] of a parameter, M >= N: trailing axes flattened in logical order, transposed when wide.

    A convolution is out x (in * height * width), however it is laid out in memory, so state means the same in every
    memory format. The matrix is a view if memory allows one, otherwise a copy, which `put` writes back.

    Args:
        tensor: what this rank has of the parameter, or of its gradient; if rows move between ranks, the sharded tensor,
            of which the result has this rank's rows [m N].
    """
    if shards is not None and shards.moved:
        return _moved(tensor, shards.ranks, wide)
    matrix = tensor.detach().flatten(1)
    return matrix.mT if wide else matrix


def gradient_of(gradient: Tensor, weight: Tensor, wide: bool, shards: RowShards | None) -> Tensor:
    """The gradient as `matrix_of` shows the weight, with the same strides; a view if its memory allows one."""
    matrix = matrix_of(gradient, wide, shards)
    if shards is not None and shards.moved:
        return matrix
    # Not those of the weight's matrix, which may be a copy.
    like = weight if _flattens(weight) else torch.empty(weight.shape, device="meta")
    strides = matrix_of(like, wide, None).stride()
    if matrix.stride() == strides:
        return matrix
    return torch.empty_strided(matrix.shape, strides, dtype=matrix.dtype, device=matrix.device).copy_(matrix)


def put(matrix_mN: Tensor, weight: Tensor, wide: bool, shards: RowShards | None) -> None:
    """Writes a matrix back to the parameter if `matrix_of`, which must have made it, could not show it as a view."""
    if shards is not None and shards.moved:
        _put_moved(matrix_mN, weight, shards.ranks, wide)
    elif not _flattens(weight):
        weight.copy_((matrix_mN.mT if wide else matrix_mN).reshape(weight.shape))


def _put_moved(rows_mN: Tensor, weight: Tensor, ranks: Ranks, wide: bool) -> None:
    """Rows that came from other ranks go back there."""
    assert isinstance(weight, DTensor)
    shape = torch.Size((weight.shape[0], weight.shape[1:].numel()))
    flat = from_local(rows_mN.mT if wide else rows_mN, ranks, int(wide), shape)
    part = flat.redistribute(placements=ranks.placements(0)).to_local()
    part = part.reshape(len(part), *weight.shape[1:])
    there = from_local(part, ranks, 0, weight.shape).redistribute(placements=weight.placements)
    local(weight).copy_(there.to_local())


def _moved(tensor: Tensor, ranks: Ranks, wide: bool) -> Tensor:
    """This rank's rows [m N] of a parameter or gradient that is split along another axis."""
    assert isinstance(tensor, DTensor)
    part = tensor.redistribute(placements=ranks.placements(0)).to_local().detach().flatten(1)
    shape = torch.Size((tensor.shape[0], tensor.shape[1:].numel()))
    matrix = from_local(part, ranks, 0, shape).redistribute(placements=ranks.placements(int(wide))).to_local()
    return matrix.mT if wide else matrix


def _flattens(tensor: Tensor) -> bool:
    """Whether the trailing axes merge without a copy."""
    axes = [axis for axis in range(1, tensor.ndim) if tensor.shape[axis] > 1]
    return not tensor.numel() or all(
        tensor.stride(outer) == tensor.stride(inner) * tensor.shape[inner] for outer, inner in pairwise(axes)
    )


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
        widest: dtype of rates, the widest float of the device.
        ranks: those among which each parameter is split; None if this rank has all of it.
        sharded: whether parameters are distributed tensors, of which this rank may have all nevertheless.
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
    widest: torch.dtype
    ranks: Ranks | None = None
    sharded: bool = False
    stacked: bool = False
    offloaded: frozenset[str] = frozenset()
    pending: dict[int, Tensor] = field(default_factory=dict)

    def places(self, number: int) -> range:
        """Positions of the matrices that parameter `number` holds."""
        count = len(self.done) // len(self.parameters)
        return range(number * count, (number + 1) * count)

    def held(self, tensor: Tensor) -> list[Tensor]:
        """What `matrix_of` takes, by matrix, of a parameter or its gradient."""
        moves = self.layout.shards is not None and self.layout.shards.moved
        part = local(tensor) if self.sharded and not moves else tensor
        return list(part.unbind()) if self.stacked else [part]

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
        splits: the different groups of ranks among which some of the optimiser's parameters are split.
    """

    every: list[Bucket] = field(default_factory=list)
    built_for: tuple[list[Any], list[Any]] | None = None
    splits: list[Ranks] = field(default_factory=list)
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
            held = bucket.held(parameter)
            own = [None] * len(held) if parameter.grad is None else bucket.held(parameter.grad)
            self.gradients += [
                None if g is None else gradient_of(g, p, self.layout.wide, self.layout.shards)
                for g, p in zip(own, held, strict=True)
            ]

    def prepare(self, energy: bool) -> list[Tensor]:
        """Does what comes before all gradients are checked and clipped together; writes no state.

        Args:
            energy: whether the norms of gradients are wanted.
        Returns the gradients that must be checked by themselves, because what is made of them would hide their norms.
        """
        return []

    def squares(self, in_frames: bool) -> list[Tensor]:
        """Squared norms of the gradients, of any shape, which together are that of all.

        Args:
            in_frames: whether gradients no longer exist, so that they are those of their coordinates.
        """
        if not self.active:
            return [self.layout.zeros().sum()]
        norms = torch._foreach_norm(existing(self.gradients), 2, dtype=self.layout.dtype)
        return [torch.stack(norms).square()]

    def norms(self) -> list[Tensor]:
        """What is not finite if a gradient is not."""
        return self.squares(in_frames=False)

    def update(self, clip: Tensor | None, states: Sequence[State]) -> None:
        """Weights and state, in place, by `apply`.

        Args:
            clip: 0-d factor by which the gradients must still be multiplied; None for none.
            states: the bucket's, all of it on the device.
        """
        if self.active:
            (stacks,) = states
            arrived = {key: value for key, value in stacks.items() if key not in self.state}
            self.state = {**self.state, **(arrived if self.index is None else part_of(arrived, self.index))}
            wide, shards = self.layout.wide, self.layout.shards
            owned = [part for i in self.owners for part in self.bucket.held(self.bucket.parameters[i])]
            weights = [matrix_of(part, wide, shards) for part in owned]
            self.apply(weights, clip)
            for weight_MN, part in zip(weights, owned, strict=True):
                put(weight_MN, part, wide, shards)
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
        device, wide = self.layout.device, self.bucket.widest
        if isinstance(rate, Tensor):
            rate = rate.to(device, wide).reshape(())
            return rate * scale, 1 - rate * decay
        lr, keep = (torch.full((), value, dtype=wide, device=device) for value in (rate * scale, 1 - rate * decay))
        return lr, keep


def stacked(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Matrices [M N] as a new stack [B M N] of a dtype."""
    first = matrices[0]
    if first.device.type != "cpu" or first.is_contiguous():
        return torch.stack(list(matrices)).to(dtype)
    # Transposes of a processor go through its caches block by block if each is copied by itself, three times as fast.
    whole_BMN = torch.empty(len(matrices), *first.shape, dtype=first.dtype)
    for place_MN, matrix_MN in zip(whole_BMN, matrices, strict=True):
        place_MN.copy_(matrix_MN)
    return whole_BMN.to(dtype)


def existing(gradients: Iterable[Tensor | None]) -> list[Tensor]:
    """Those that exist."""
    return [gradient for gradient in gradients if gradient is not None]
