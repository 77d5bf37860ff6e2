"""What a coordinate is worth, from its weight and the gradient of the loss at it: one number an entry, higher is
better. A score of one's own is a subclass with one line.

Shapes: S, any.
"""

from abc import ABC, abstractmethod

from torch import Tensor


class Score(ABC):
    """A function of weight and gradient, entry by entry."""

    @abstractmethod
    def of(self, weight_S: Tensor, gradient_S: Tensor) -> Tensor:
        """Scores [S], from tensors of float32 or wider. `gradient_S` is that of the weight in use, mask included, also
        at entries that are closed.
        """


class Magnitude(Score):
    """|w|."""

    def of(self, weight_S: Tensor, gradient_S: Tensor) -> Tensor:
        return weight_S.abs()


class GradientMagnitude(Score):
    """|g|: how fast the loss falls where an entry opens (RigL, arXiv 1911.11134)."""

    def of(self, weight_S: Tensor, gradient_S: Tensor) -> Tensor:
        return gradient_S.abs()


class Sensitivity(Score):
    """|w g|, the change of the loss to first order where the entry closes (SNIP: Lee, Ajanthan, Torr 2018, arXiv
    1810.02340).
    """

    def of(self, weight_S: Tensor, gradient_S: Tensor) -> Tensor:
        return (weight_S * gradient_S).abs()


class Movement(Score):
    """-w g: above 0 while a step of gradient descent moves the weight away from 0. Summed over steps it is movement
    pruning (Sanh, Wolf, Rush 2020, arXiv 2005.07683, equation 3).
    """

    def of(self, weight_S: Tensor, gradient_S: Tensor) -> Tensor:
        return -weight_S * gradient_S
