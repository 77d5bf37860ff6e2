"""The span of a matrix' singular directions, one number each.

Shapes: O rows, I columns, R directions.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SingularFrame:
    """The `SubspaceMap` z -> U diag(z) V^T of fixed left [O R] and right = V^T [R I]; computed in the dtype of z."""

    left_OR: Tensor
    right_RI: Tensor

    def push(self, z_R: Tensor) -> Tensor:
        return (self.left_OR * z_R) @ self.right_RI.to(z_R.dtype)

    def pull(self, g_OI: Tensor) -> Tensor:
        """diag(U^T g V)."""
        return ((self.left_OR.to(g_OI.dtype).mT @ g_OI) * self.right_RI).sum(dim=1)
