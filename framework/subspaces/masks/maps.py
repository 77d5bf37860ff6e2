"""Masks as maps of the one algebra, see `lightspan.subspaces.maps`. Shapes: S, any; k open entries."""

from torch import Tensor


class Selected:
    """The coordinate subspace of an index set: k coordinates go to their places, all other numbers are zero.

    Args:
        open_S: bool; an empty set is the map of no coordinates.
    """

    def __init__(self, open_S: Tensor) -> None:
        self.shape, self.places_k = open_S.shape, open_S.reshape(-1).nonzero().flatten()

    def push(self, z_k: Tensor) -> Tensor:
        """[S], in the order of rows first."""
        return z_k.new_zeros(self.shape.numel()).index_copy_(0, self.places_k, z_k).view(self.shape)

    def pull(self, g_S: Tensor) -> Tensor:
        return g_S.reshape(-1).index_select(0, self.places_k)


class Masked:
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
