"""Frames that show what a choice of frames is worth: random ones, and columns of other fixed matrices than the DCT.

Shapes: B matrices, N columns (projected), R rank.
"""

from typing import Literal

import torch
from torch import Tensor

from lightspan.optim.bases import ColumnSelection, DrawnBasis
from lightspan.optim.carries import Gather, Keep, Rotate
from lightspan.optim.layout import Layout
from lightspan.subspaces import frames


class RandomBasis(DrawnBasis):
    """Random orthonormal frames, whatever the gradient.

    Args:
        carry: Rotate or Keep.
    """

    def __init__(self, carry: Rotate | Keep = Rotate()) -> None:  # noqa: B008 - frozen
        super().__init__(carry)

    def draw(self, layout: Layout) -> Tensor:
        return frames.random_frame(layout.seeds, layout.size, layout.rank, dtype=layout.dtype, device=layout.device)


class RandomColumns(ColumnSelection):
    """Columns of one random orthonormal matrix: shows the effect of selection alone, without the DCT.

    Args:
        seed: of the matrix.
        norm, carry: see ColumnSelection.
    """

    def __init__(
        self,
        seed: int = 0,
        norm: Literal[1, 2] = 2,
        carry: Gather | Rotate | Keep = Gather(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(norm, carry)
        self.seed = seed

    def build_matrix(self, size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return frames.random_frame([self.seed], size, size, dtype=dtype, device=device)[0]


class IdentityBasis(ColumnSelection):
    """The weight's own columns: those with the largest gradients train, the others do not."""

    def build_matrix(self, size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.eye(size, dtype=dtype, device=device)
