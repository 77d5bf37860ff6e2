"""Tensors that are split over ranks: a rank's part, the whole, and sums over ranks.

Of a plain tensor, part and whole are the same, so code need not ask. An optimiser's step treats the rows of a matrix
one by one, so a rank steps the rows it has. Sums over rows leave it: what chooses a frame, norms of whole matrices, and
whether gradients are finite; and rows do where the parameter is split along its other side, or where a matrix is
orthogonalised by one rank. All of this runs over the ranks among which the matrix is split; replicas of a hybrid mesh
compute the same and exchange nothing.

Shapes: B matrices, M rows of whole matrices, m rows of this rank; T tensors.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from lightspan.core.devices import wide_type, widest_float
from lightspan.core.errors import UserError


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts, gathered if ranks have one each; all of them must call it then."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


Total = Callable[[Tensor], Tensor]
"""A sum over the ranks that have the other rows of a matrix."""


@dataclass(frozen=True)
class Ranks:
    """The ranks among which a tensor is split: one axis of a device mesh."""

    mesh: DeviceMesh
    axis: int

    @property
    def count(self) -> int:
        return self.mesh.size(self.axis)

    @property
    def index(self) -> int:
        """This rank's position among them."""
        return self.mesh.get_local_rank(self.axis)

    def total(self, part: Tensor) -> Tensor:
        """Sum of every rank's `part`; the same bits on every rank."""
        whole = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=self.mesh.get_group(self.axis))
        return whole

    def placements(self, shard: int) -> tuple[Placement, ...]:
        """Split along tensor axis `shard` among these ranks, the same everywhere else."""
        return tuple(Shard(shard) if axis == self.axis else Replicate() for axis in range(self.mesh.ndim))


@dataclass(frozen=True)
class RowShards:
    """How the rows of matrices of one shape are spread over ranks: as torch.chunk splits them, so the last ones may
    have fewer or none.

    Args:
        total: M.
        moved: whether the parameter itself is split along its projected side, so that the rows of gradient and weight
            are sent to their rank and back in every step.
    """

    ranks: Ranks
    total: int
    moved: bool

    @property
    def chunk(self) -> int:
        """Rows of the first rank."""
        return -(-self.total // self.ranks.count)

    @property
    def start(self) -> int:
        """First row of this rank."""
        return min(self.ranks.index * self.chunk, self.total)

    @property
    def rows(self) -> int:
        """m."""
        return min(self.chunk, self.total - self.start)

    def gather(self, part: Tensor) -> Tensor:
        """Whole matrices [..., M, any] from every rank's rows [..., m, any]."""
        padded = part.new_zeros(*part.shape[:-2], self.chunk, part.shape[-1])
        padded[..., : self.rows, :] = part
        parts = [torch.empty_like(padded) for _ in range(self.ranks.count)]
        dist.all_gather(parts, padded, group=self.ranks.mesh.get_group(self.ranks.axis))
        return torch.cat(parts, dim=-2)[..., : self.total, :]

    def to_owners(self, part_BmN: Tensor) -> Tensor:
        """The whole matrices [b M N] that this rank owns, from every rank's rows [B m N]: each rank owns B / ranks of
        them, the last ones fewer or none. For what cannot be computed as sums over rows, and need be computed once.
        """
        batch, rows, columns = part_BmN.shape
        mine, share = self._owned(batch), [count * rows * columns for count in self._owners(batch)]
        sizes = [mine * held * columns for held in self._held()]
        flat = self._exchanged(part_BmN.reshape(-1), share, sizes)
        parts = zip(flat.split(sizes), self._held(), strict=True)
        return torch.cat([part.view(mine, held, columns) for part, held in parts], dim=1)

    def from_owners(self, whole_bMN: Tensor, batch: int) -> Tensor:
        """This rank's rows [B m N] of all matrices, from the whole ones [b M N] that each rank owns."""
        mine, _, columns = whole_bMN.shape
        sizes = [mine * held * columns for held in self._held()]
        share = [count * self.rows * columns for count in self._owners(batch)]
        parts = torch.cat([part.reshape(-1) for part in whole_bMN.split(self._held(), dim=1)])
        return self._exchanged(parts, sizes, share).view(batch, self.rows, columns)

    def _exchanged(self, flat: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """What the ranks have for this one, in their order; `sent` numbers go to each, `received` come from each."""
        out = flat.new_empty(sum(received))
        dist.all_to_all_single(out, flat, received, sent, group=self.ranks.mesh.get_group(self.ranks.axis))
        return out

    def _held(self) -> list[int]:
        """Rows of each rank."""
        return _chunks(self.total, self.ranks.count)

    def _owners(self, batch: int) -> list[int]:
        """How many of B matrices each rank owns."""
        return _chunks(batch, self.ranks.count)

    def _owned(self, batch: int) -> int:
        return self._owners(batch)[self.ranks.index]

    def own(self, whole: Tensor, axis: int = 0) -> Tensor:
        """This rank's rows of a tensor that has all rows along `axis`."""
        return whole.narrow(axis, self.start, self.rows)

    def distributed(self, part: Tensor) -> DTensor:
        """State with this rank's rows as its first axis as a DTensor: checkpoints save it once, and load it on another
        number of ranks. It shares memory with `part`.
        """
        shape = torch.Size((self.total, *part.shape[1:]))
        whole = with_part(from_local(part.to("meta"), self.ranks, 0, shape), part)
        assert isinstance(whole, DTensor)
        return whole


def _chunks(total: int, count: int) -> list[int]:
    """Sizes of `count` parts of `total`, as torch.chunk cuts them; the last ones may be smaller or empty."""
    size = -(-total // count)
    return [max(0, min(size, total - i * size)) for i in range(count)]


def from_local(part: Tensor, ranks: Ranks, axis: int, shape: torch.Size) -> DTensor:
    """A DTensor of `shape` split along `axis`, of which this rank has `part`."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, ranks.mesh, ranks.placements(axis), run_check=False, shape=shape, stride=stride)


def with_part(like: Tensor, part: Tensor) -> Tensor:
    """A tensor placed as `like` is, of which this rank has `part`; `part` itself if `like` is plain. It shares memory
    with `part`, also on another device than that of the mesh, to which `DTensor.from_local` would copy it.
    """
    return DTensor(part, like._spec, requires_grad=False) if isinstance(like, DTensor) else part


def axes_of(tensor: Tensor) -> tuple[Ranks, ...]:
    """The ranks among which a tensor is split, for each axis of its mesh that splits it; none of a plain tensor."""
    if not isinstance(tensor, DTensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements
    split = [axis for axis, placement in enumerate(placements) if mesh.size(axis) > 1 and not placement.is_replicate()]
    return tuple(Ranks(mesh, axis) for axis in split)


def ranks_of(tensor: Tensor) -> Ranks | None:
    """The ranks among which a tensor is split; None if this rank has all of it.

    Raises: UserError for a tensor that is split along several axes of its mesh.
    """
    axes = axes_of(tensor)
    if not axes:
        return None
    assert isinstance(tensor, DTensor)
    if len(axes) > 1 or type(tensor.placements[axes[0].axis]) is not Shard:
        raise UserError(
            f"a parameter of shape {tuple(tensor.shape)} is placed on its mesh as {tensor.placements}; LowRank can "
            "step one that is split along a single axis of the mesh. Shard it without tensor parallelism (strategy "
            "FSDP2), or use AdamW"
        )
    return axes[0]


def splits_of(tensors: Iterable[Tensor]) -> list[Ranks]:
    """The different groups of ranks among which some of the tensors are split; empty in a run that shards nothing."""
    every = dict.fromkeys(ranks_of(tensor) for tensor in tensors)
    return [ranks for ranks in every if ranks is not None]


def split_axis(tensor: Tensor, ranks: Ranks) -> int:
    """The axis along which `tensor` is split among these ranks, its `ranks_of`."""
    assert isinstance(tensor, DTensor)
    placement = tensor.placements[ranks.axis]
    assert isinstance(placement, Shard)
    return placement.dim


def own_part(whole: Tensor, like: Tensor) -> Tensor:
    """The view of a plain tensor shaped like `like` that this rank has of `like`; all of it if that is not split.

    Raises: UserError as `ranks_of` does.
    """
    ranks = ranks_of(like)
    if ranks is None:
        return whole
    axis = split_axis(like, ranks)
    return RowShards(ranks, like.shape[axis], moved=False).own(whole, axis)


def whole_of(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor, on every rank, of which this rank has `part`, split like `like`. All ranks must call it."""
    ranks = ranks_of(like)
    return part if ranks is None else from_local(part, ranks, split_axis(like, ranks), like.shape).full_tensor()


def total_over(parts: Iterable[tuple[Ranks | None, Tensor]]) -> Tensor:
    """Sum of `parts`, vectors or 0-d, in float64 if the device has it; zero if there is none.

    Each part counts once over the ranks that share its tensor.
    """
    by_ranks: dict[Ranks | None, list[Tensor]] = {}
    for ranks, part in parts:
        by_ranks.setdefault(ranks, []).append(part.reshape(-1))
    sums = []
    for ranks, members in by_ranks.items():
        device = members[0].device
        mine = torch.cat([part.to(device) for part in members]).sum(dtype=widest_float(device))
        sums.append(mine if ranks is None else ranks.total(mine))
    return torch.stack([part.to(sums[0].device) for part in sums]).sum() if sums else torch.zeros(())


def row_norms(matrix: Tensor) -> Tensor:
    """Euclidean norms [m 1] of the rows of which this rank has a part, be the matrix split along rows or columns. All
    ranks must call it.
    """
    part, ranks = local(matrix), ranks_of(matrix)
    if ranks is None or split_axis(matrix, ranks) == 0:
        return part.norm(dim=1, keepdim=True)
    return ranks.total(part.square().sum(dim=1, keepdim=True)).sqrt()


def square_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Squared Euclidean norms [T] in float32 or wider, in no particular order; infinite if a sum of squares is
    beyond that format, even if torch summed it in a wider one.
    """
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_kind[tensor.device, wide_type(tensor.dtype)].append(tensor)
    parts = [torch.stack(torch._foreach_norm(part, 2, dtype=dtype)) for (_, dtype), part in by_kind.items()]
    return torch.cat([part.to(parts[0].device) for part in parts]).square() if parts else torch.zeros(0)


def squares_by_ranks(gradients: Iterable[tuple[Ranks | None, Tensor]]) -> list[tuple[Ranks | None, Tensor]]:
    """Squared norms of gradients, each with the ranks among which it is split; together for those split alike."""
    alike: dict[Ranks | None, list[Tensor]] = defaultdict(list)
    for ranks, gradient in gradients:
        alike[ranks].append(gradient)
    return [(ranks, square_norms(together)) for ranks, together in alike.items()]


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, 0-d; of sharded ones over all their parts.

    All ranks must call it, also those without a gradient: the parameters alone decide what is exchanged.
    """
    alike: dict[tuple[Ranks, ...], list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        alike[axes_of(parameter)].append(parameter)
    squares = []
    for axes, members in alike.items():
        given = [local_numbers(parameter.grad) for parameter in members if parameter.grad is not None]
        device = local(members[0]).device
        square = square_norms(given).to(device).sum(dtype=widest_float(device))
        for ranks in axes:
            square = ranks.total(square)
        squares.append(square)
    return (
        torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt() if squares else torch.zeros(())
    )


def local_numbers(tensor: Tensor) -> Tensor:
    """This rank's numbers of a tensor, dense and real."""
    part = local(tensor)
    part = part.coalesce().values() if part.is_sparse else part
    return torch.view_as_real(part.resolve_conj()) if part.is_complex() else part
