"""How the low-rank step sees parameters: stacks of matrices of one shape, kept side first, and their state by name."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from lightspan.core.errors import UserError
from lightspan.core.sharded import Ranks, RowShards, from_local, local, ranks_of, unsharded_total

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
        return unsharded_total(part) if self.shards is None else self.shards.ranks.total(part)

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


def require_shapes(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Raises: UserError for parameters that get their shape in the first forward pass, by their names, if they have
    any: they would be taken for vectors.
    """
    if lazy := [name or "a parameter" for name, parameter in parameters if is_lazy(parameter)]:
        raise UserError(
            f"no shape is known yet of {', '.join(lazy[:3])}, so matrices cannot be told from vectors; call the model, "
            "whose layers such as nn.LazyLinear get theirs then, on one batch before the optimiser is built"
        )


def is_matrix(parameter: Tensor) -> bool:
    """Whether a subspace can hold a parameter's state: it has two or more axes, and its numbers are real."""
    return parameter.ndim > 1 and not parameter.is_complex()


def matrices(parameter: Tensor, stacked: bool) -> list[Tensor]:
    """The matrices that a parameter holds: itself, or the slices of a stack [E out in]; those that this rank has."""
    return list(local(parameter).unbind()) if stacked else [parameter]


def one_of(parameter: Tensor, stacked: bool) -> Tensor:
    """What each of the parameter's matrices looks like: a rank may have none of a stack."""
    if not stacked:
        return parameter
    part = local(parameter)
    return torch.empty_strided(part.shape[1:], part.stride()[1:], dtype=part.dtype, device="meta")


def slices_of(parameter: Tensor, stacked: bool) -> RowShards | None:
    """How the matrices of a stack are spread over ranks; None if they are all here, or it is none."""
    ranks = ranks_of(parameter) if stacked else None
    return None if ranks is None else RowShards(ranks, len(parameter), moved=False)


def matrix_shape(weight: Tensor) -> tuple[int, int]:
    """(M, N) of a whole parameter with two or more axes, M >= N."""
    out, width = weight.shape[0], weight.shape[1:].numel()
    return max(out, width), min(out, width)


def is_wide(weight: Tensor) -> bool:
    """Whether a whole parameter has fewer rows than columns, so that the step sees its transpose."""
    return weight.shape[0] < weight.shape[1:].numel()


def shards_of(weight: Tensor) -> RowShards | None:
    """How the rows of a parameter that the step sees are spread over ranks; None if they are all here.

    Raises: UserError for a parameter that is split along several axes of its mesh.
    """
    ranks = ranks_of(weight)
    if ranks is None:
        return None
    axis, rows = weight.placements[ranks.axis].dim, matrix_shape(weight)[0]  # type: ignore[attr-defined]
    kept = 1 if is_wide(weight) else 0
    # A split of a convolution's input channels is an even split of the flattened axis, or not a split of it at all.
    whole_rows = axis == kept and (weight.ndim == 2 or kept == 0 or weight.shape[1] % ranks.count == 0)
    return RowShards(ranks, rows, moved=not whole_rows)


def canonical(weight: Tensor) -> Tensor:
    """A matrix [M N] of a parameter, M >= N: trailing axes flattened in logical order, transposed when wide.

    A convolution is out x (in * height * width), however it is laid out in memory, so state means the same in every
    memory format. The matrix is a view if memory allows one, otherwise a copy, which `put` writes back. Of a sharded
    parameter it has this rank's rows [m N].
    """
    shards, wide = shards_of(weight), is_wide(weight)
    if shards is not None and shards.moved:
        return _moved(weight, shards.ranks, wide)
    return _matrix(local(weight), wide)


def canonical_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient as `canonical` shows the weight, with the same strides; a view if its memory allows one."""
    shards, wide = shards_of(weight), is_wide(weight)
    if shards is not None and shards.moved:
        return _moved(gradient, shards.ranks, wide)
    matrix, strides = _matrix(local(gradient), wide), _strides(local(weight), wide)
    if matrix.stride() == strides:
        return matrix
    return torch.empty_strided(matrix.shape, strides, dtype=matrix.dtype, device=matrix.device).copy_(matrix)


def put(matrices: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Writes matrices back to the parameters that `canonical` could not show as views; it must have made them."""
    for matrix_mN, weight in zip(matrices, weights, strict=True):
        shards = shards_of(weight)
        if shards is not None and shards.moved:
            _put_moved(matrix_mN, weight, shards.ranks)
        elif not _flattens(part := local(weight)):
            part.copy_((matrix_mN.mT if is_wide(weight) else matrix_mN).reshape(part.shape))


def _put_moved(rows_mN: Tensor, weight: Tensor, ranks: Ranks) -> None:
    """Rows that came from other ranks go back there."""
    assert isinstance(weight, DTensor)
    shape, wide = torch.Size((weight.shape[0], weight.shape[1:].numel())), is_wide(weight)
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


def _matrix(tensor: Tensor, wide: bool) -> Tensor:
    matrix = tensor.detach().flatten(1)
    return matrix.mT if wide else matrix


def _flattens(tensor: Tensor) -> bool:
    """Whether the trailing axes merge without a copy."""
    axes = [axis for axis in range(1, tensor.ndim) if tensor.shape[axis] > 1]
    return not tensor.numel() or all(
        tensor.stride(outer) == tensor.stride(inner) * tensor.shape[inner] for outer, inner in pairwise(axes)
    )


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor fills its memory from end to end, in some order of its axes."""
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.is_contiguous() or tensor.permute(order).is_contiguous()


def _strides(tensor: Tensor, wide: bool) -> tuple[int, ...]:
    """Of `_matrix(tensor, wide)`, without the copy that it may be."""
    like = tensor if _flattens(tensor) else torch.empty(tensor.shape, device="meta")
    return _matrix(like, wide).stride()
