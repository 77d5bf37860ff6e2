"""Which matrices a parameter holds, and how they are spread over ranks: asked when stacks of them are put together."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightspan.core.errors import UserError
from lightspan.core.sharded import RowShards, local, ranks_of
from lightspan.optim.matrices.stacks import gradient_of, matrix_of


def require_shapes(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Raises: UserError for parameters that get their shape in the first forward pass, by their names, if they have
    any: they would be taken for vectors.
    """
    if lazy := [name or "a parameter" for name, parameter in parameters if is_lazy(parameter)]:
        raise UserError(
            f"no shape is known yet of {', '.join(lazy[:3])}, so matrices and vectors look alike; call the model, "
            "whose layers such as nn.LazyLinear get theirs then, on one batch before the optimiser is built"
        )


def is_matrix(parameter: Tensor) -> bool:
    """Whether a subspace can hold a parameter's state: it has two or more axes, and its numbers are real."""
    return parameter.ndim > 1 and not parameter.is_complex()


def count_of(parameter: Tensor, stacked: bool) -> int:
    """How many matrices this rank has of a parameter: one, or the slices of a stack [E out in]."""
    return len(local(parameter)) if stacked else 1


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
    """This rank's rows [m N] of a parameter as the step sees it, see `lightspan.optim.matrices.stacks.matrix_of`."""
    shards = shards_of(weight)
    return matrix_of(_held(weight, shards), is_wide(weight), shards)


def canonical_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient as `canonical` shows the weight, with the same strides; a view if its memory allows one."""
    shards = shards_of(weight)
    return gradient_of(_held(gradient, shards), _held(weight, shards), is_wide(weight), shards)


def _held(tensor: Tensor, shards: RowShards | None) -> Tensor:
    return tensor if shards is not None and shards.moved else local(tensor)


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor fills its memory from end to end, in some order of its axes."""
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.is_contiguous() or tensor.permute(order).is_contiguous()
