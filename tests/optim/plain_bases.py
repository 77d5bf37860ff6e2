"""Frames of which every number is known beforehand, for tests that work a step out by hand."""

import torch
from torch import Tensor

from lightspan.optim.low_rank.bases import ColumnSelection, DrawnBasis
from lightspan.optim.low_rank.carries import Rotate
from lightspan.optim.matrices.stacks import Layout
from lightspan.subspaces import frames


class RandomBasis(DrawnBasis):
    """Random orthonormal frames, independent of the gradient."""

    def __init__(self) -> None:
        super().__init__(Rotate())

    def draw(self, layout: Layout) -> Tensor:
        return frames.random_frame(layout.seeds, layout.size, layout.rank, dtype=layout.dtype, device=layout.device)


class IdentityBasis(ColumnSelection):
    """The weight's own columns: those with the largest gradients train, the others stay."""

    def build_matrix(self, size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.eye(size, dtype=dtype, device=device)
