"""The span of task vectors: the one equation of which averages, sums and masks of models are cases.

    theta = theta_0 + m * sum_i c_i (theta_i - theta_0)

for each tensor, with one coefficient c_i per model or per entry, and a mask m. It is linear in c: `in_span` without
theta_0 is the map's push, and its adjoint, which autograd gives, has <gradient, theta_i - theta_0> for the i-th.

Shapes: K models; tensors have any shape S.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 2**20
"""How many numbers of a tensor are computed at a time, in float64."""


def in_span(base_S: Tensor, models_S: Sequence[Tensor], coefficients: Tensor, mask_S: Tensor | None = None) -> Tensor:
    """The equation above, in float64, complex128 for complex tensors; gradients reach coefficients and mask.

    Entries in which a model equals the base stay as they are, infinite ones of an attention mask included.

    Args:
        base_S, models_S: of the same shape; dtypes may differ.
        coefficients: [K], or [K S] for one per entry.
        mask_S: broadcasts to S.
    """
    wide = torch.complex128 if base_S.is_complex() else torch.float64
    base_S = base_S.to(wide)
    change_S = torch.zeros_like(base_S)
    for model_S, coefficient in zip(models_S, coefficients, strict=True):
        model_S = model_S.to(wide)
        change_S = change_S + coefficient * torch.where(model_S == base_S, 0, model_S - base_S)
    return base_S + (change_S if mask_S is None else mask_S * change_S)


@torch.no_grad()
def in_span_as(
    dtype: torch.dtype, base_S: Tensor, models_S: Sequence[Tensor], coefficients: Tensor, mask_S: Tensor | None = None
) -> Tensor:
    """`in_span` rounded once, to `dtype`. Beyond its arguments it needs one tensor, and `CHUNK` numbers per model."""
    out_S = torch.empty(base_S.shape, dtype=dtype)
    flat = [x.reshape(-1) for x in (base_S, *models_S)]
    each = coefficients.ndim > 1
    if each:
        coefficients = coefficients.expand(len(models_S), *base_S.shape).reshape(len(models_S), -1)
    mask = None if mask_S is None else mask_S.expand(base_S.shape).reshape(-1)
    for at in range(0, base_S.numel(), CHUNK):
        part = slice(at, at + CHUNK)
        out_S.view(-1)[part] = in_span(
            flat[0][part],
            [x[part] for x in flat[1:]],
            coefficients[:, part] if each else coefficients,
            None if mask is None else mask[part],
        )
    return out_S
