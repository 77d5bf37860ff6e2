"""The span of task vectors: the one equation of which averages, sums and masks of models are cases.

    theta = theta_0 + m * sum_i c_i tau_i,    tau_i = theta_i - theta_0

for each tensor, with one coefficient c_i a model or one an entry, and a mask m. It is linear in c: `TaskSpan` is that
map. `in_span` is the whole equation for numbers of any dtype, in float64, and `in_span_as` rounds it once.

Shapes: K models; tensors have any shape S.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CHUNK = 2**20
"""How many numbers of a tensor are computed at a time, in float64."""


class TaskSpan:
    """The map from coefficients to a change of one tensor, see `lightspan.subspaces.maps`.

    Args:
        vectors_S: tau_1 ... tau_K, of one shape.
    """

    def __init__(self, vectors_S: Sequence[Tensor]) -> None:
        self.vectors_S = vectors_S

    def push(self, c: Tensor) -> Tensor:
        """sum_i c_i tau_i [S]. c: [K], or [K S] for one an entry."""
        change_S = torch.zeros_like(self.vectors_S[0])
        for tau_S, coefficient in zip(self.vectors_S, c, strict=True):
            change_S = change_S + coefficient * tau_S
        return change_S

    def pull(self, g_S: Tensor) -> Tensor:
        """<g, tau_i> [K], what a gradient in the tensor is in the coefficients."""
        return torch.stack([(g_S * tau_S).sum() for tau_S in self.vectors_S])


def widest(x: Tensor) -> Tensor:
    """In float64, or complex128 if it is complex."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def difference(model_S: Tensor, base_S: Tensor) -> Tensor:
    """tau = theta_i - theta_0, and 0 where both are equal, infinite entries of a mask of attention included."""
    return torch.where(model_S == base_S, 0, model_S - base_S)


def in_span(base_S: Tensor, models_S: Sequence[Tensor], coefficients: Tensor, mask_S: Tensor | None = None) -> Tensor:
    """The equation above, in float64, complex128 for complex tensors; gradients reach coefficients and mask.

    What a model shares with the base, it leaves as it is.

    Args:
        base_S, models_S: of the same shape; dtypes may differ.
        coefficients: [K], or [K S] for one per entry.
        mask_S: broadcasts to S.
    """
    wide = torch.complex128 if base_S.is_complex() else torch.float64
    base_S = base_S.to(wide)
    if not models_S:
        return base_S
    change_S = TaskSpan([difference(model_S.to(wide), base_S) for model_S in models_S]).push(coefficients)
    return base_S + (change_S if mask_S is None else mask_S * change_S)


def in_span_as(
    dtype: torch.dtype, base_S: Tensor, models_S: Sequence[Tensor], coefficients: Tensor, mask_S: Tensor | None = None
) -> Tensor:
    """`in_span` rounded once, to `dtype`. Beyond what it is given it needs one tensor, and `CHUNK` numbers a model."""
    each = coefficients.ndim > 1
    count = len(models_S)
    entries = [c_S.expand(base_S.shape) for c_S in coefficients] if each else []
    masks = [] if mask_S is None else [mask_S.expand(base_S.shape)]

    def piece(base: Tensor, *others: Tensor) -> Tensor:
        models, shares = others[:count], others[count : count + len(entries)]
        mask = others[-1] if masks else None
        return in_span(base, models, torch.stack(shares) if each else coefficients, mask)

    return in_pieces(dtype, piece, base_S, *models_S, *entries, *masks)


@torch.no_grad()
def in_pieces(dtype: torch.dtype, function: Callable[..., Tensor], *tensors_S: Tensor) -> Tensor:
    """A function that works entry by entry, of tensors of one shape, `CHUNK` numbers at a time; rounded to `dtype`."""
    out_S = torch.empty(tensors_S[0].shape, dtype=dtype)
    flat = [x.reshape(-1) for x in tensors_S]
    for at in range(0, out_S.numel(), CHUNK):
        part = slice(at, at + CHUNK)
        out_S.view(-1)[part] = function(*(x[part] for x in flat))
    return out_S
