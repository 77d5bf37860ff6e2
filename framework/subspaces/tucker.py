"""Tucker form: a tensor as a small core times one matrix along each of its axes.

Source: De Lathauwer, De Moor, Vandewalle, "A Multilinear Singular Value Decomposition", 2000, equations 8 and 24-26.
Shapes: a tensor of sizes d_1 ... d_N, a core of sizes r_1 ... r_N, factors [d_n r_n].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def mode_product(tensor: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Every fibre of `tensor` along `axis` multiplied by `matrix` [any, size of that axis]."""
    return torch.tensordot(tensor, matrix, dims=([axis], [1])).movedim(-1, axis)


def compose(core: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """core x_1 U_1 ... x_N U_N; None means the identity."""
    for axis, factor in enumerate(factors):
        core = core if factor is None else mode_product(core, factor, axis)
    return core


@dataclass(frozen=True)
class TuckerFrame:
    """The `SubspaceMap` from a core [r_1 ... r_N] to a tensor [d_1 ... d_N] by factors; None means the identity."""

    factors: Sequence[Tensor | None]

    def push(self, core: Tensor) -> Tensor:
        return compose(core, self.factors)

    def pull(self, tensor: Tensor) -> Tensor:
        return compose(tensor, [None if factor is None else factor.mT for factor in self.factors])
