"""Masks as maps of the one algebra, see `lightspan.subspaces.maps`. Shapes: S, any; k open entries."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor


class Selected:
    """The coordinate subspace of an index set: k coordinates go to their places, all other numbers are zero.

    Args:
        open_S: bool; an empty set is the map of no coordinates.
    """

    def __init__(self, open_S: Tensor) -> None:
        self.shape, self.places_k = open_S.shape, open_S.reshape(-1).nonzero().flatten()

    @classmethod
    def at(cls, places_k: Tensor, shape: Sequence[int]) -> Self:
        """Of the entries at `places_k`, int64, each counted with rows first and none twice."""
        selected = cls.__new__(cls)
        selected.shape, selected.places_k = torch.Size(shape), places_k
        return selected

    def push(self, z_k: Tensor) -> Tensor:
        """[S], in the order of rows first."""
        return z_k.new_zeros(self.shape.numel()).index_copy_(0, self.places_k, z_k).view(self.shape)

    def pull(self, g_S: Tensor) -> Tensor:
        return g_S.reshape(-1).index_select(0, self.places_k)


class SoftMask:
    """A soft mask or a gate: every number times its factor. It is its own adjoint.

    Args:
        factor: broadcasts to S, so that one of [R 1] is a gate for each row of a matrix.
    """

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor

    def push(self, z_S: Tensor) -> Tensor:
        return z_S * self.factor.to(z_S.dtype)

    def pull(self, g_S: Tensor) -> Tensor:
        return g_S * self.factor.to(g_S.dtype)
