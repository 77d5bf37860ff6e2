"""Newton-Schulz orthogonalisation: X <- X (a I + b G + c G^2), G = X^T X, from X divided by its Frobenius norm. It
brings singular values near 1 and keeps singular vectors.

All iterates are X times polynomials of its first Gram matrix: G <- Q G Q with Q = a I + b G + c G^2, and X can be
multiplied once, by the product of the Q. For matrices at least twice as long as wide that takes fewer operations than
iterating X, and of rows on several ranks only one Gram [N N] must travel. It needs exact products, because an error of
the Gram grows by a^2 = 12 a step: in float32, five steps are within 0.002 of exact ones in spectral norm, however
ill-conditioned X is (iterating X: 2e-5; iterating X in bfloat16, as published: 0.4). Where float32 products are rounded
to TF32, and in bfloat16, the Gram is therefore made anew in every step.

Shapes: B matrices, M rows, N columns, N <= M; m rows of this rank, b matrices that it owns.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from lightspan.core.sharded import RowShards, Total
from lightspan.optim.matrices.stacks import Layout

Coefficients = tuple[float, float, float]
COEFFICIENTS: Coefficients = (3.4445, -4.7750, 2.0315)
STEPS = 5
Precision = Literal["float32", "bfloat16"]
"""Of products. "bfloat16", as in published code, is what tensor cores are made for, and halves what travels between
ranks; it moves singular values by up to 0.4. "float32" is float64 for float64 weights."""


def direction_of(x_BmN: Tensor, layout: Layout, precision: Precision, steps: int = STEPS) -> Tensor:
    """This rank's rows of the orthogonalised matrices, or of each of their heads, a new tensor of the same dtype."""
    given_BmN = x_BmN.to(torch.bfloat16) if precision == "bfloat16" else x_BmN
    if layout.heads:
        axis = -1 if layout.wide else -2
        found_BmN = orthogonalised_parts(given_BmN, layout.heads, axis, layout.shards, steps, COEFFICIENTS)
    else:
        found_BmN = orthogonalised(given_BmN, layout.shards, steps, COEFFICIENTS)
    return found_BmN.to(x_BmN.dtype)


def by_iterating(x_BMN: Tensor, steps: int, coefficients: Coefficients, total: Total | None = None) -> Tensor:
    """The orthogonalised matrices, a new tensor; zeros for those whose squares overflow.

    Args:
        x_BMN: any rows of the matrices, if `total` has the others.
        total: continues sums over rows to those of other ranks; None if there are none.
    """
    a, b, c = coefficients
    for step in range(steps):
        gram_BNN = _gram(x_BMN, total)
        if not step:
            gram_BNN, scale_B11 = _normalised(gram_BNN)
            x_BMN = x_BMN * scale_B11
        change_BNN = torch.baddbmm(gram_BNN, gram_BNN, gram_BNN, beta=b, alpha=c)
        x_BMN = torch.baddbmm(x_BMN, x_BMN, change_BNN, beta=a)
    return x_BMN


def by_one_gram(x_BMN: Tensor, steps: int, coefficients: Coefficients, total: Total | None = None) -> Tensor:
    """The same in exact arithmetic, with all iterates as multiples of X."""
    a, b, c = coefficients
    gram_BNN, scale_B11 = _normalised(_gram(x_BMN, total))
    product_BNN: Tensor | None = None
    for left in reversed(range(steps)):
        factor_BNN = torch.baddbmm(gram_BNN, gram_BNN, gram_BNN, beta=b, alpha=c)
        factor_BNN.diagonal(dim1=-2, dim2=-1).add_(a)
        product_BNN = factor_BNN if product_BNN is None else product_BNN @ factor_BNN
        if left:
            gram_BNN = factor_BNN @ (gram_BNN @ factor_BNN)
    assert product_BNN is not None, "at least one step"
    return x_BMN @ (product_BNN * scale_B11)


def _gram(x_BMN: Tensor, total: Total | None) -> Tensor:
    gram_BNN = x_BMN.mT @ x_BMN
    return gram_BNN if total is None else total(gram_BNN)


def _normalised(gram_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """The Gram matrices of X / |X|, and 1 / |X| [B 1 1]; both are zero where squares overflow."""
    scale_B11 = 1 / (gram_BNN.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[:, None, None].sqrt() + 1e-7)
    return torch.where(scale_B11 > 0, gram_BNN * scale_B11 * scale_B11, 0.0), scale_B11


def orthogonalised(x_BmN: Tensor, shards: RowShards | None, steps: int, coefficients: Coefficients) -> Tensor:
    """This rank's rows of the orthogonalised matrices, a new tensor. Matrices wider than tall must not be sharded.

    What is computed depends on the shape of the whole matrices, so that ranks and one process do the same. What travels
    is what makes fewer bytes: Gram matrices, after which all ranks multiply by the same polynomials; or rows, to one
    rank a matrix and back.
    """
    rows, columns = x_BmN.shape[-2] if shards is None else shards.total, x_BmN.shape[-1]
    if rows < columns:
        return orthogonalised(x_BmN.mT, None, steps, coefficients).mT.contiguous()
    exact = x_BmN.dtype == torch.float64 or (x_BmN.dtype == torch.float32 and _is_float32_exact())
    method, grams = (by_one_gram, 1) if exact and rows >= 2 * columns else (by_iterating, steps)
    if shards is None:
        return method(x_BmN, steps, coefficients)
    if bytes_of_grams(len(x_BmN), columns, grams, shards) <= bytes_of_rows(len(x_BmN), columns, shards):
        return method(x_BmN, steps, coefficients, shards.ranks.total)
    return shards.from_owners(method(shards.to_owners(x_BmN), steps, coefficients), len(x_BmN))


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
    x_BmN: Tensor, parts: Sequence[int], axis: int, shards: RowShards | None, steps: int, coefficients: Coefficients
) -> Tensor:
    """As `orthogonalised`, with each of several parts of a matrix as a matrix of its own.

    Args:
        parts: sizes along `axis`, which add up to that of the whole matrices.
        axis: -1 for parts with some columns each, or -2 with some rows. Rows of one part can be on several ranks, so
            these go to owners of whole matrices.
    """
    if axis == -2 and shards is not None:
        whole_bMN = shards.to_owners(x_BmN)
        return shards.from_owners(orthogonalised_parts(whole_bMN, parts, axis, None, steps, coefficients), len(x_BmN))
    runs = [(len(list(alike)), size) for size, alike in groupby(parts)]
    found = []
    for run, some in zip(runs, x_BmN.split([count * size for count, size in runs], dim=axis), strict=True):
        # Parts become matrices of the batch: their axis moves beside it, and back.
        apart = some.unflatten(axis, run).movedim(axis - 1, 1)
        apart = orthogonalised(apart.flatten(0, 1), shards, steps, coefficients).unflatten(0, apart.shape[:2])
        found.append(apart.movedim(1, axis - 1).flatten(axis - 1, axis))
    return torch.cat(found, dim=axis)


@torch.compiler.assume_constant_result  # compiled code is made again when it changes
def _is_float32_exact() -> bool:
    return torch.get_float32_matmul_precision() == "highest"


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
