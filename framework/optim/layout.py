"""How the low-rank step sees parameters: stacks of matrices of one shape, kept side first, and their state by name."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightspan.optim.sharding import Ranks, Shards, alone, from_local, local, ranks_of

State = dict[str, Tensor]
"""Stacked plain tensors, each with the matrix as its first axis: saved, moved and sharded like any optimiser state."""

WEIGHT_STREAM = 1 << 61
"""Added to a step's seed: the noise that rounds weights has nothing in common with that of moments."""


@dataclass(frozen=True)
class Layout:
    """B matrices of one shape: M rows (the kept, longer side), N columns (the projected side), rank R.

    Of sharded matrices a rank sees its own rows: `rows` counts these alone, possibly none.

    Args:
        wide: whether the parameter itself is wide, so that the step sees its transpose.
        dtype: of the arithmetic and of unquantised state: float32, or float64 for float64 weights.
        seeds: one a matrix; all randomness of its frames comes from it.
        shards: where the other rows are; None if they are all here.
    """

    rows: int
    size: int
    rank: int
    wide: bool
    dtype: torch.dtype
    device: torch.device
    seeds: tuple[int, ...]
    shards: Shards | None = None

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

    def part(self, positions: list[int]) -> "Layout":
        """The layout of some of the matrices."""
        return replace(self, seeds=tuple(self.seeds[i] for i in positions))

    def total(self, part: Tensor) -> Tensor:
        """A sum over this rank's rows, continued over all others."""
        return alone(part) if self.shards is None else self.shards.ranks.total(part)

    def gathered(self, part: Tensor) -> Tensor:
        """Whole matrices from this rank's rows [..., m, any]: for what cannot be written as sums over rows."""
        return part if self.shards is None else self.shards.gather(part)

    def own_rows(self, whole: Tensor) -> Tensor:
        """This rank's rows of whole matrices [..., M, any]."""
        return whole if self.shards is None else self.shards.own(whole, axis=-2)


def part_of(state: State, index: Tensor) -> State:
    """A copy that holds the matrices `index` only."""
    return {key: value[index] for key, value in state.items()}


def write_part(state: State, index: Tensor, part: State) -> None:
    """Writes matrices back in place, so that views of the stack stay views."""
    for key, value in part.items():
        state[key][index] = value


def matrix_shape(weight: Tensor) -> tuple[int, int]:
    """(M, N) of a whole parameter with two or more axes, M >= N."""
    out, width = weight.shape[0], weight.shape[1:].numel()
    return max(out, width), min(out, width)


def is_wide(weight: Tensor) -> bool:
    """Whether a whole parameter has fewer rows than columns, so that the step sees its transpose."""
    return weight.shape[0] < weight.shape[1:].numel()


def shards_of(weight: Tensor) -> Shards | None:
    """How the rows that the step sees of a parameter lie on ranks; None if they are all here.

    Raises: UserError for a parameter that is split along several axes of its mesh.
    """
    ranks = ranks_of(weight)
    if ranks is None:
        return None
    axis, rows = weight.placements[ranks.axis].dim, matrix_shape(weight)[0]  # type: ignore[attr-defined]
    kept = 1 if is_wide(weight) else 0
    # A split of a convolution's input channels is an even split of the flattened axis, or no split of it at all.
    whole_rows = axis == kept and (weight.ndim == 2 or kept == 0 or weight.shape[1] % ranks.count == 0)
    return Shards(ranks, rows, moved=not whole_rows)


def canonical(weight: Tensor) -> Tensor:
    """A view [M N] of a parameter, M >= N: trailing axes flattened in memory order, transposed when wide.

    A convolution is out x (in * height * width), in channels-last memory out x (height * width * in). Of a sharded
    parameter it has this rank's rows [m N], as a copy if they had to be fetched; `put` takes it back.
    """
    shards = shards_of(weight)
    if shards is None or not shards.moved:
        part = local(weight)
        return _matrix(part, part, is_wide(weight))
    return _moved(weight, shards.ranks, is_wide(weight))


def canonical_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient as `canonical` shows the weight, a view where its memory allows one."""
    shards = shards_of(weight)
    if shards is not None and shards.moved:
        return _moved(gradient, shards.ranks, is_wide(weight))
    gradient, part = local(gradient), local(weight)
    matrix = _matrix(gradient, part, is_wide(weight))
    if gradient.stride() == part.stride():
        return matrix
    return torch.empty_like(_matrix(part, part, is_wide(weight)), dtype=matrix.dtype).copy_(matrix)


def put(rows: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Brings rows that `canonical` fetched from other ranks back to where their parameters hold them."""
    for rows_mN, weight in zip(rows, weights, strict=True):
        shards = shards_of(weight)
        assert isinstance(weight, DTensor)
        assert shards is not None
        shape, wide = torch.Size((weight.shape[0], weight.shape[1:].numel())), is_wide(weight)
        flat = from_local(rows_mN.mT if wide else rows_mN, shards.ranks, int(wide), shape)
        part = flat.redistribute(placements=shards.ranks.placements(0)).to_local()
        part = part.reshape(len(part), *weight.shape[1:])
        there = from_local(part, shards.ranks, 0, weight.shape).redistribute(placements=weight.placements)
        local(weight).copy_(there.to_local())


def _moved(tensor: Tensor, ranks: Ranks, wide: bool) -> Tensor:
    """This rank's rows [m N] of a parameter or gradient that is split along another axis."""
    assert isinstance(tensor, DTensor)
    part = tensor.redistribute(placements=ranks.placements(0)).to_local().detach().flatten(1)
    shape = torch.Size((tensor.shape[0], tensor.shape[1:].numel()))
    matrix = from_local(part, ranks, 0, shape).redistribute(placements=ranks.placements(int(wide))).to_local()
    return matrix.mT if wide else matrix


def _matrix(tensor: Tensor, like: Tensor, wide: bool) -> Tensor:
    matrix = tensor.detach()
    if like.ndim > 2:
        strides = like.stride()
        trailing = sorted(range(1, like.ndim), key=lambda axis: -strides[axis])
        matrix = matrix.permute(0, *trailing).flatten(1)
    return matrix.mT if wide else matrix
