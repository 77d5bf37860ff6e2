"""How a layer of sparse Gaussian weights answers: by its mean weights, by a draw of weights, or by a draw of outputs.

Every draw is a function of a seed, a number (the step, or which sampled network) and what it is drawn for, a coordinate
or a sample of the data set: the same on any number of ranks and in any micro-batch, and bit for bit in a resumed run.
Source of drawing outputs (local reparameterisation): Kingma, Salimans, Welling 2015, arXiv 1506.02557, equation 6.
Shapes: B samples, k active coordinates.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.subspaces.masks.draws import uniform

if TYPE_CHECKING:
    from lightspan.adapters.sparse_gaussian.layer import SparseGaussian

FLOOR = 1e-8
"""Added to a variance under its square root, which would have an infinite slope where no active weight reaches."""


def normal(seed: int, step: int, name: str, shape: Sequence[int], rows: Tensor) -> Tensor:
    """Standard normal numbers [*shape] in float32, row i of them those of row `rows[i]`; see `masks.draws.uniform`."""
    drawn = uniform(seed, step, name, shape, device=rows.device, rows=rows)
    return torch.erfinv(2 * drawn - 1) * math.sqrt(2)


class Draw(ABC):
    """Of all layers of a network, in one pass or several."""

    @abstractmethod
    def output(self, layer: "SparseGaussian", x: Tensor) -> Tensor:
        """What the layer gives for an input."""


class Mean(Draw):
    """The weights' means: the posterior mean network."""

    def output(self, layer: "SparseGaussian", x: Tensor) -> Tensor:
        return layer.mean_output(x)


class OneDraw(Draw):
    """One sampled network, the same for every input.

    Args:
        number: which one.
    """

    def __init__(self, seed: int, number: int) -> None:
        self.seed, self.number = seed, number

    def output(self, layer: "SparseGaussian", x: Tensor) -> Tensor:
        noise_k = normal(self.seed, self.number, f"{layer.name}.weight", layer.places.shape, layer.places)
        return layer.output(x, wide(layer.mu) + layer.std * noise_k)


class Outputs(Draw):
    """Local reparameterisation: each output of each sample from its own Gaussian, with mean and variance of drawing
    weights anew for every output.

    A layer that is called several times in a pass draws the same noise each time.

    Args:
        number: the step.
        index_B: int64, the samples' numbers in their data set.
    """

    def __init__(self, seed: int, number: int, index_B: Tensor) -> None:
        self.seed, self.number, self.index_B = seed, number, index_B

    def output(self, layer: "SparseGaussian", x: Tensor) -> Tensor:
        mean, variance = layer.mean_output(x), wide(layer.variance(x))
        noise = normal(self.seed, self.number, f"{layer.name}.output", mean.shape, self._rows(len(mean), layer.name))
        # Fast convolutions may give a variance that is a little below 0.
        return (wide(mean) + (variance.clamp_min(0) + FLOOR).sqrt() * noise).to(mean.dtype)

    def _rows(self, rows: int, name: str) -> Tensor:
        """The number of each row of a layer's input: of a sample, or of one of the equally many parts it was cut in."""
        samples = len(self.index_B)
        if rows == samples:
            return self.index_B
        if not samples or rows % samples:
            raise UserError(
                f"{name} sees {rows} rows of a batch of {samples} samples, so its noise cannot be told by sample; "
                "leave the layer out of match"
            )
        parts = rows // samples
        return (self.index_B[:, None] * parts + torch.arange(parts, device=self.index_B.device)).flatten()
