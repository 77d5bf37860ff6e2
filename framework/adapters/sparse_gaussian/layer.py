"""A linear layer or convolution with a Gaussian posterior over few of its weights; all others are exactly zero.

Source: SSVI, ICLR 2024, arXiv 2402.11025, equations 4 to 6: theta_i ~ N(mu_i, sigma_i^2) for i in S, theta_i = 0
otherwise, sigma = softplus(rho).
Stored are the active coordinates alone: where they are, and mu and rho of each. That a coordinate is active is never
told by a value, so mu or rho of exactly zero are numbers like any other. The dense weight exists while its layer
computes, forward and again backward, and is not kept in between.
A layer answers by its mean weights, by a draw of weights, or by a draw of outputs (local reparameterisation: Kingma,
Salimans, Welling 2015, arXiv 1506.02557, equation 6). Every draw is a function of a seed, a number (the step, or which
sampled network) and what it is drawn for, a coordinate or a sample of the data set: the same on any number of ranks and
in any micro-batch, and bit for bit in a resumed run.
Shapes: S the weight's, B samples, k active coordinates.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.adapters.layers import LayerShape, weight_of
from lightspan.core.devices import wide
from lightspan.core.distributed import register_replicated
from lightspan.core.errors import UserError
from lightspan.subspaces.masks.draws import uniform
from lightspan.subspaces.masks.maps import Selected
from lightspan.subspaces.sparse_gaussian.statistics import kl_to_prior, rho_of, std_of

LARGEST_INT32 = 2**31 - 1
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
                f"{name} sees {rows} rows of a batch of {samples} samples, so its noise cannot be drawn for "
                "each sample; leave the layer out of match"
            )
        parts = rows // samples
        return (self.index_B[:, None] * parts + torch.arange(parts, device=self.index_B.device)).flatten()


class SparseGaussian(nn.Module):
    """Takes the place of `base`, whose weight it lets go and whose bias trains on as one number each.

    Args:
        base: nn.Linear, or a convolution of torch.
        name: of the layer in its network; draws depend on it.
        places_k: int64, ascending; which weights are active, counted with rows first.
        mu_k, std_k: of these; std above 0.
    Attributes:
        draw: how it answers; the mean weights at first. `inject.drawing` changes it.
        watching: whether the backward pass adds dL/dmu of all coordinates to `gradient_S`, also of inactive ones.
    """

    parameter_kinds: ClassVar = {"mu": "matrices", "rho": "vectors"}  # decay for the means alone
    places: Tensor
    gradient_S: Tensor | None

    def __init__(self, base: nn.Module, name: str, places_k: Tensor, mu_k: Tensor, std_k: Tensor) -> None:
        super().__init__()
        self.name, self.shape = name, LayerShape.of(base)
        self.count = weight_of(base).numel()
        weight: Any = None
        base.weight = weight
        self.base, self.mu, self.rho = base, nn.Parameter(mu_k), nn.Parameter(rho_of(std_k).to(mu_k.dtype))
        register_replicated(self, "places", places_k.to(torch.int32 if self.count <= LARGEST_INT32 else torch.int64))
        self.draw: Draw = Mean()
        self.watching, self.gradient_S = False, None

    def extra_repr(self) -> str:
        return f"{len(self.mu)} of {self.count} weights active"

    @property
    def std(self) -> Tensor:
        """sigma [k], in float32 or wider."""
        return std_of(self.rho)

    @property
    def subspace(self) -> Selected:
        """Coordinates to weights and back."""
        return Selected.at(self.places.long(), self.shape.weight)

    def kl(self, prior_std: float) -> Tensor:
        """Equation 6's second term: the divergence from N(0, prior_std^2) of the active coordinates, in nats."""
        return kl_to_prior(self.mu, self.std, prior_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.draw.output(self, x)

    def mean_output(self, x: Tensor) -> Tensor:
        """With the means as weights; what is watched is its gradient."""
        return self.output(x, self.mu, self._note if self.watching else None)

    def output(self, x: Tensor, weight_k: Tensor, note: Callable[[Tensor], None] | None = None) -> Tensor:
        """With these weights and the bias; `note` gets the gradient of the dense weight."""
        y = self._product(x, weight_k, note)
        bias: Any = self.base.bias
        return y if bias is None else y + bias.to(y.dtype).view(-1, *(1,) * len(self.shape.stride))

    def variance(self, x: Tensor) -> Tensor:
        """Of the output where every weight is drawn: x^2 times sigma^2."""
        # A variance of 1e-7 is no number that float16 can hold.
        narrow, kind = _compute_type(x) == torch.float16, x.device.type
        with torch.autocast(kind, enabled=torch.is_autocast_enabled(kind) and not narrow):
            return self._product((wide(x) if narrow else x).square(), self.std.square(), None)

    def _product(self, x: Tensor, weight_k: Tensor, note: Callable[[Tensor], None] | None) -> Tensor:
        subspace, dtype = self.subspace, _compute_type(x)
        weight_S = subspace.push(weight_k)
        if note is not None and weight_S.requires_grad:
            weight_S.register_hook(note)
        weight_S, kept_k = weight_S.to(dtype), weight_k.detach()
        with _made_again(weight_S, lambda: subspace.push(kept_k).to(dtype)):
            return F.linear(x, weight_S) if self.shape.linear else self.shape.convolve(x, weight_S)

    def _note(self, gradient_S: Tensor) -> None:
        gradient_S = wide(gradient_S.detach())
        self.gradient_S = gradient_S.clone() if self.gradient_S is None else self.gradient_S + gradient_S

    @torch.no_grad()
    def move(self, places_k: Tensor) -> Tensor:
        """Makes other coordinates the active ones, as many. Those that stay keep mu and rho; a new one starts at mu = 0
        and at the mean rho of those that were active.

        Args:
            places_k: int64, ascending.
        Returns: int64 [k], where each coordinate was before among the active ones; -1 for a new one.
        """
        before_k = self.places.long()
        if not len(before_k):
            return before_k
        at_k = torch.searchsorted(before_k, places_k).clamp_max(len(before_k) - 1)
        source_k = torch.where(before_k[at_k] == places_k, at_k, -1)
        stays_k, from_k = source_k >= 0, source_k.clamp_min(0)
        fresh = wide(self.rho).mean().to(self.rho.dtype)
        self.rho.copy_(torch.where(stays_k, self.rho[from_k], fresh))
        self.mu.copy_(torch.where(stays_k, self.mu[from_k], 0))
        self.places.copy_(places_k)
        return source_k

    @torch.no_grad()
    def plain(self) -> nn.Module:
        """The base layer with the means as its dense weight."""
        weight: Any = nn.Parameter(self.subspace.push(self.mu.detach()))
        self.base.weight = weight
        return self.base.train(self.training)


def _compute_type(x: Tensor) -> torch.dtype:
    """In which a product with `x` is computed."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _made_again(weight: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager[Any]:
    """Within, what autograd would keep of `weight`, which no one else holds, is made again when the backward pass needs
    it.
    """
    storage = weight.untyped_storage()._cdata

    def pack(tensor: Tensor) -> Any:
        if tensor.untyped_storage()._cdata != storage:
            return tensor
        return tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else make().as_strided(*kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
