"""Bases of columns that are Kronecker products of two small factors, with kernels that never form them.

Shapes: B matrices, M rows (kept), N columns (projected, N <= M), R rank.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightspan.experiments.kronecker_energies import kronecker_energies
from lightspan.experiments.kronecker_gather import kronecker_gather
from lightspan.experiments.kronecker_scatter_update import kronecker_scatter_update
from lightspan.experiments.transforms import hadamard_factors, kronecker_dct_factors, kronecker_matrix
from lightspan.optim.bases import ColumnSelection
from lightspan.optim.carries import Gather, Keep, Rotate
from lightspan.optim.layout import Layout, State


class _KroneckerColumns(ColumnSelection):
    """Columns of a Kronecker product of two small orthonormal factors: on a GPU the transform costs two products with
    the factors, and neither D nor the frame is formed.
    """

    def __init__(self, norm: Literal[1, 2] = 2, carry: Gather | Rotate | Keep = Gather()) -> None:  # noqa: B008 - frozen
        super().__init__(norm, carry)
        self._factors: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    @abstractmethod
    def build_factors(self, size: int, *, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Orthonormal factors [a a] and [b b], a b = N."""

    def factors(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """The factors, made once per size, dtype and device."""
        key = (layout.size, layout.dtype, layout.device)
        if key not in self._factors:
            self._factors[key] = self.build_factors(layout.size, dtype=layout.dtype, device=layout.device)
        return self._factors[key]

    def build_matrix(self, size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return kronecker_matrix(*self.build_factors(size, dtype=dtype, device=device))

    def energies(self, gradients: Sequence[Tensor], layout: Layout) -> Tensor:
        return kronecker_energies(gradients, *self.factors(layout))

    def materialised(self, state: State, layout: Layout) -> State:
        return state if layout.device.type == "cuda" else super().materialised(state, layout)

    def project(
        self, gradients: Sequence[Tensor], state: State, layout: Layout, *, energy: bool
    ) -> tuple[Tensor, Tensor]:
        if layout.device.type == "cuda":
            return kronecker_gather(gradients, state["columns"], *self.factors(layout), energy)
        return super().project(gradients, state, layout, energy=energy)

    def update(
        self,
        weights: Sequence[Tensor],
        coefficients_BMR: Tensor,
        state: State,
        layout: Layout,
        /,
        *step: Any,
    ) -> None:
        if layout.device.type != "cuda" or coefficients_BMR.shape[-1] == 0:
            super().update(weights, coefficients_BMR, state, layout, *step)
        else:
            kronecker_scatter_update(weights, coefficients_BMR, state["columns"], *self.factors(layout), *step)


class HadamardBasis(_KroneckerColumns):
    """Columns of a Hadamard matrix for powers of two; for other sizes, of Hadamard times DCT of the odd part."""

    def build_factors(self, size: int, *, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        return hadamard_factors(size, dtype=dtype, device=device)


class KroneckerDCTBasis(_KroneckerColumns):
    """Columns of the Kronecker product of two DCTs, of the two most balanced factors of N; for a prime N the DCT."""

    def build_factors(self, size: int, *, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        return kronecker_dct_factors(size, dtype=dtype, device=device)
