"""Newton-Schulz orthogonalisation: X <- X (a I + b G + c G^2), G = X^T X, from X divided by its Frobenius norm. It
brings singular values near 1 and keeps singular vectors.

All iterates are X times polynomials of its first Gram matrix: G <- Q G Q with Q = a I + b G + c G^2, and X can be
multiplied once, by the product of the Q. For matrices at least twice as long as wide that takes fewer operations than
iterating X, and of rows on several ranks only one Gram [N N] must travel. It needs exact products, because an error of
the Gram grows by a^2 = 12 a step: in float32, five steps are within 0.002 of exact ones in spectral norm, however
ill-conditioned X is (iterating X: 2e-5; iterating X in bfloat16, as published: 0.4). Where float32 products are rounded
to TF32, and in bfloat16, the Gram is therefore made anew in every step. To begin again once, after two steps, was tried
in bfloat16: directions err by twice as much as those of iterating X.

On a processor, matrices are taken one after the other, so that what is made of each stays in the caches, and float32
products go through oneDNN where torch has it: what torch calls for them by itself, MKL, uses half the width of the
registers of AMD's processors. Elsewhere Gram matrices and their polynomials are symmetric products, of which a GPU
computes half of the tiles.

Shapes: B matrices, M rows, N columns, N <= M; m rows of this rank, b matrices that it owns.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from lightspan.core.devices import float32_precision
from lightspan.core.sharded import RowShards, Total
from lightspan.optim.matrices.stacks import Layout
from lightspan.triton_kernels.symmetric_product import symmetric_product

Polynomials = tuple[tuple[float, float, float], ...]
"""(a, b, c) of each step."""
Coefficients = Literal["jordan", "polar_express"]
"""Names of polynomials: five steps of Jordan's for Muon, or the first four of Polar Express (Amsel et al. 2025, arXiv
2505.16932), which raise small singular values almost as much, by 424 instead of 485, in four fifths of the products,
and bring those from a hundredth between 0.43 and 1.57 instead of 0.68 and 1.14."""
JORDAN = (3.4445, -4.7750, 2.0315)
STEPS = 5


def _held_down(step: tuple[float, float, float], factor: float) -> tuple[float, float, float]:
    """The step of singular values divided by a factor."""
    a, b, c = step
    return a / factor, b / factor**3, c / factor**5


SAFETY = 1.01
"""By this the published code of Polar Express divides singular values before each step, against roundings, and once
more before the first."""
COEFFICIENTS: dict[Coefficients, Polynomials] = {
    "jordan": (JORDAN,) * STEPS,
    "polar_express": (
        _held_down((8.28721201814563, -23.595886519098837, 17.300387312530933), SAFETY**2),
        _held_down((4.107059111542203, -2.9478499167379106, 0.5448431082926601), SAFETY),
        _held_down((3.9486908534822946, -2.908902115962949, 0.5518191394370137), SAFETY),
        _held_down((3.3184196573706015, -2.488488024314874, 0.51004894012372), SAFETY),
    ),
}
SMALLEST_APART = 128
"""Columns of the narrowest matrices that a processor takes one after the other; of more and smaller ones it takes the
products of a stack at once, for which torch has one call."""
Method = Callable[..., Tensor]
"""From matrices, and what continues sums over their rows, to these orthogonalised."""
Precision = Literal["float32", "bfloat16"]
"""Of products. "bfloat16", as in published code, is what tensor cores are made for, and halves what travels between
ranks; it moves singular values by up to 0.4. "float32" is float64 for float64 weights."""


def direction_of(
    x_BmN: Tensor, layout: Layout, precision: Precision, polynomials: Polynomials = COEFFICIENTS["jordan"]
) -> Tensor:
    """This rank's rows of the orthogonalised matrices, or of each of their heads, a new tensor of the same dtype. Its
    precision is the same under autocast, as in modules that step their optimisers by hand.
    """
    given_BmN = x_BmN.to(torch.bfloat16) if precision == "bfloat16" else x_BmN
    kind = x_BmN.device.type
    with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
        if layout.heads:
            axis = -1 if layout.wide else -2
            found_BmN = orthogonalised_parts(given_BmN, layout.heads, axis, layout.shards, polynomials)
        else:
            found_BmN = orthogonalised(given_BmN, layout.shards, polynomials)
    return found_BmN.to(x_BmN.dtype)


def by_iterating(x_BMN: Tensor, polynomials: Polynomials, total: Total | None = None) -> Tensor:
    """The orthogonalised matrices, a new tensor; zeros for those whose squares overflow.

    Args:
        x_BMN: any rows of the matrices, if `total` has the others.
        total: continues sums over rows to those of other ranks; None if there are none.
    """
    for step, (a, b, c) in enumerate(polynomials):
        gram_BNN = _gram(x_BMN, total)
        if not step:
            gram_BNN, scale_B11 = _normalised(gram_BNN)
            x_BMN = x_BMN * scale_B11
        change_BNN = _change(gram_BNN, b, c)
        if _is_through_onednn(x_BMN):
            x_BMN = _times(x_BMN, change_BNN).add_(x_BMN, alpha=a)
        else:
            x_BMN = torch.baddbmm(x_BMN, x_BMN, change_BNN, beta=a)
    return x_BMN


def by_one_gram(x_BMN: Tensor, polynomials: Polynomials, total: Total | None = None) -> Tensor:
    """The same in exact arithmetic, with all iterates as multiples of X."""
    gram_BNN, scale_B11 = _normalised(_gram(x_BMN, total))
    product_BNN: Tensor | None = None
    for left, (a, b, c) in zip(reversed(range(len(polynomials))), polynomials, strict=True):
        factor_BNN = _change(gram_BNN, b, c)
        factor_BNN.diagonal(dim1=-2, dim2=-1).add_(a)
        product_BNN = factor_BNN if product_BNN is None else _times(product_BNN, factor_BNN)
        if left:
            gram_BNN = _times(factor_BNN, _times(gram_BNN, factor_BNN))
    assert product_BNN is not None, "at least one step"
    return _times(x_BMN, product_BNN * scale_B11)


def _gram(x_BMN: Tensor, total: Total | None) -> Tensor:
    if _is_through_onednn(x_BMN):
        gram_BNN = _stacked([_of_rows(x_MN.mT.contiguous()) for x_MN in x_BMN])
    elif x_BMN.device.type != "cpu":
        gram_BNN = symmetric_product(x_BMN, None, 1.0, 0.0)
    else:
        gram_BNN = x_BMN.mT @ x_BMN
    return gram_BNN if total is None else total(gram_BNN)


def _change(gram_BNN: Tensor, b: float, c: float) -> Tensor:
    """b G + c G^2."""
    if _is_through_onednn(gram_BNN):
        return _times(gram_BNN, gram_BNN).mul_(c).add_(gram_BNN, alpha=b)
    if gram_BNN.device.type != "cpu":
        return symmetric_product(gram_BNN, gram_BNN, c, b)
    return torch.baddbmm(gram_BNN, gram_BNN, gram_BNN, beta=b, alpha=c)


def _times(x_BMN: Tensor, y_BNN: Tensor) -> Tensor:
    if not _is_through_onednn(x_BMN):
        return x_BMN @ y_BNN
    return _stacked([_by_onednn(x_MN, y_NN.mT) for x_MN, y_NN in zip(x_BMN, y_BNN, strict=True)])


def _of_rows(x_NM: Tensor) -> Tensor:
    """x x^T, whose lower left quarter is the transpose of the upper right one."""
    size = len(x_NM)
    half, found_NN = size // 2, x_NM.new_empty(size, size)
    found_NN[:half] = _by_onednn(x_NM[:half], x_NM)
    found_NN[half:, half:] = _by_onednn(x_NM[half:], x_NM[half:])
    found_NN[half:, :half] = found_NN[:half, half:].mT
    return found_NN


def _by_onednn(x_MK: Tensor, y_NK: Tensor) -> Tensor:
    """x y^T by the operation that torch itself uses in compiled code. y may be transposed, but must have no gaps: with
    them it would go through a slow reference.
    """
    product_MN: Tensor = torch.ops.mkldnn._linear_pointwise(x_MK.contiguous(), y_NK, None, "none", [], "")
    return product_MN


def _stacked(matrices: list[Tensor]) -> Tensor:
    return matrices[0][None] if len(matrices) == 1 else torch.stack(matrices)


def _is_through_onednn(x_BMN: Tensor) -> bool:
    return (
        x_BMN.dtype == torch.float32 and x_BMN.device.type == "cpu"
        and x_BMN.shape[-1] >= SMALLEST_APART and x_BMN.numel() > 0 and _has_onednn()
    )  # fmt: skip


@torch.compiler.assume_constant_result
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _normalised(gram_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """The Gram matrices of X / |X|, and 1 / |X| [B 1 1]; both are zero where squares overflow."""
    scale_B11 = 1 / (gram_BNN.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[:, None, None].sqrt() + 1e-7)
    return torch.where(scale_B11 > 0, gram_BNN * scale_B11 * scale_B11, 0.0), scale_B11


def orthogonalised(x_BmN: Tensor, shards: RowShards | None, polynomials: Polynomials) -> Tensor:
    """This rank's rows of the orthogonalised matrices, a new tensor. Matrices wider than tall must not be sharded.

    What is computed depends on the shape of the whole matrices, so that ranks and one process do the same. What travels
    is what makes fewer bytes: Gram matrices, after which all ranks multiply by the same polynomials; or rows, to one
    rank a matrix and back.
    """
    rows, columns = x_BmN.shape[-2] if shards is None else shards.total, x_BmN.shape[-1]
    if rows < columns:
        return orthogonalised(x_BmN.mT, None, polynomials).mT.contiguous()
    exact = x_BmN.dtype == torch.float64 or (x_BmN.dtype == torch.float32 and float32_precision() == "highest")
    few = exact and rows >= 2 * columns
    method: Method = partial(by_one_gram if few else by_iterating, polynomials=polynomials)
    grams = 1 if few else len(polynomials)
    if shards is None:
        return _one_by_one(method, x_BmN)
    if bytes_of_grams(len(x_BmN), columns, grams, shards) <= bytes_of_rows(len(x_BmN), columns, shards):
        return method(x_BmN, total=shards.ranks.total)
    return shards.from_owners(_one_by_one(method, shards.to_owners(x_BmN)), len(x_BmN))


def _one_by_one(method: Method, x_BMN: Tensor) -> Tensor:
    """All at once on other devices, or if they are small."""
    if x_BMN.device.type != "cpu" or x_BMN.shape[-1] < SMALLEST_APART or len(x_BMN) < 2:
        return method(x_BMN)
    return torch.cat([method(x_1MN) for x_1MN in x_BMN.split(1)])


def operations(rows: int, columns: int, steps: int = STEPS) -> int:
    """Of one matrix, multiplications and additions, in exact arithmetic: of the shape alone, whatever products are made
    in, so that all ranks find the same.
    """
    longer, shorter = max(rows, columns), min(rows, columns)
    square, product = 2 * shorter**3, 2 * longer * shorter**2
    if longer >= 2 * shorter:
        return 2 * product + (steps + 3 * (steps - 1)) * square
    return steps * (2 * product + square)


def operations_of(layout: Layout, columns: int, steps: int = STEPS) -> int:
    """Of one matrix of this layout with so many columns, or of all its heads."""
    rows = layout.rows
    if not layout.heads:
        return operations(rows, columns, steps)
    return sum(
        operations(size, columns, steps) if not layout.wide else operations(rows, size, steps) for size in layout.heads
    )


def orthogonalised_parts(
    x_BmN: Tensor, parts: Sequence[int], axis: int, shards: RowShards | None, polynomials: Polynomials
) -> Tensor:
    """As `orthogonalised`, with each of several parts of a matrix as a matrix of its own.

    Args:
        parts: sizes along `axis`, which add up to that of the whole matrices.
        axis: -1 for parts with some columns each, or -2 with some rows. Rows of one part can be on several ranks, so
            these go to owners of whole matrices.
    """
    if axis == -2 and shards is not None:
        whole_bMN = shards.to_owners(x_BmN)
        return shards.from_owners(orthogonalised_parts(whole_bMN, parts, axis, None, polynomials), len(x_BmN))
    runs = [(len(list(alike)), size) for size, alike in groupby(parts)]
    found = []
    for run, some in zip(runs, x_BmN.split([count * size for count, size in runs], dim=axis), strict=True):
        # Parts become matrices of the batch: their axis moves beside it, and back.
        apart = some.unflatten(axis, run).movedim(axis - 1, 1)
        apart = orthogonalised(apart.flatten(0, 1), shards, polynomials).unflatten(0, apart.shape[:2])
        found.append(apart.movedim(1, axis - 1).flatten(axis - 1, axis))
    return torch.cat(found, dim=axis)


def bytes_of_grams(batch: int, columns: int, grams: int, shards: RowShards) -> int:
    """What a rank sends until all have the sums of B Gram matrices, `grams` times, in numbers times ranks: twice each
    number, as in a ring.
    """
    return 2 * grams * batch * columns**2 * (shards.ranks.count - 1)


def bytes_of_rows(batch: int, columns: int, shards: RowShards) -> int:
    """What the first rank, which owns most, sends in the same unit: rows that others own, and then what others hold of
    those it owns.
    """
    ranks = shards.ranks.count
    owned = -(-batch // ranks)
    return shards.total * columns * (batch - owned + owned * (ranks - 1))
