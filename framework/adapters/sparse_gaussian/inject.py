"""Sparse Gaussian layers put into any model, and the way back to plain ones.

sparsify(model, ["*"], density=0.1, dense=["conv1"])

Source: SSVI, ICLR 2024, arXiv 2402.11025. How posteriors start is from the authors' code.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightspan.adapters.inject import READS_WEIGHTS
from lightspan.adapters.layers import is_open, known_kind, weight_of
from lightspan.adapters.sparse_gaussian.layer import Draw, SparseGaussian, normal
from lightspan.core.errors import UserError
from lightspan.core.patterns import matches, require_matches, require_patterns
from lightspan.core.ranges import require_in
from lightspan.subspaces.masks.allocation import PerTensorAllocation, Uniform
from lightspan.subspaces.masks.draws import uniform
from lightspan.subspaces.masks.top_k import top_k

TAKEN = "nn.Linear, nn.Conv1d, nn.Conv2d and nn.Conv3d with floating-point weights"
LEAST_START = 1e-6  # of sigma: softplus has no inverse at 0


@dataclass(frozen=True)
class Start:
    """Where posteriors start: mu at N(0, mean_std^2), sigma at |N(std, std_spread^2)|.

    Args:
        mean_std: None keeps the model's own weights as the means.
        std, std_spread: in units of a weight.
    """

    mean_std: float | None = 0.01
    std: float = 6.0e-4
    std_spread: float = 5.0e-4

    def __post_init__(self) -> None:
        require_in("[0, inf)", mean_std=self.mean_std, std=self.std, std_spread=self.std_spread)

    def means(self, weight_k: Tensor, places_k: Tensor, name: str, seed: int) -> Tensor:
        if self.mean_std is None:
            return weight_k
        return (self.mean_std * normal(seed, -1, f"{name}.mu", places_k.shape, places_k)).to(weight_k.dtype)

    def stds(self, places_k: Tensor, name: str, seed: int) -> Tensor:
        noise_k = normal(seed, -1, f"{name}.std", places_k.shape, places_k)
        return (self.std + self.std_spread * noise_k).abs().clamp_min(LEAST_START)


@torch.no_grad()
def sparsify(
    model: nn.Module,
    match: Sequence[str],
    density: float,
    dense: Sequence[str] = (),
    allocation: PerTensorAllocation | None = None,
    start: Start = Start(),
    seed: int = 0,
) -> dict[str, SparseGaussian]:
    """Gives every matched layer a Gaussian posterior over a random few of its weights, with which ones and where it
    starts functions of the seed and the layer's name.

    What a pattern matches beside linear layers and convolutions (a block, a norm) is passed over. Biases, norms and
    what is not matched train on as they are.

    Args:
        model: changed in place.
        match: shell-style patterns of module names (`*` crosses dots).
        density: share of active weights, in (0, 1]; at least one a layer.
        dense: patterns of matched layers that keep all their weights active, such as a network's first convolution.
        allocation: how the others share the density; None is the same for each.
    Returns: the new layers, by name.
    Raises: UserError for a density outside (0, 1], a pattern that matches no such layer, and layers whose weight others
        read or share; the model is then as it was.
    """
    found = {name: module for name, module in model.named_modules() if name and known_kind(module) is not None}
    require_patterns(match, "match")
    require_patterns(dense, "dense")
    require_matches([*match, *dense], list(found), f"linear layer or convolution of {type(model).__name__}")
    chosen = {name: module for name, module in found.items() if matches(name, [*match, *dense])}
    for name, module in chosen.items():
        _require_replaceable(model, name, module)
    shapes = {name: weight_of(module).shape for name, module in chosen.items()}
    sparse = {name: shape for name, shape in shapes.items() if not matches(name, dense)}
    counts = {name: shape.numel() for name, shape in shapes.items()}
    counts |= (allocation or Uniform()).counts(sparse, density)
    made = {name: _layer(module, name, counts[name], start, seed) for name, module in chosen.items()}
    for name, module in chosen.items():
        _replace(model, module, made[name])
    return made


def gaussian_layers(model: nn.Module) -> dict[str, SparseGaussian]:
    """The layers that `sparsify` made, by their present names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseGaussian)}


@contextmanager
def drawing(model: nn.Module, draw: Draw) -> Iterator[None]:
    """Inside, the model's sparse Gaussian layers answer by this draw."""
    layers = list(gaussian_layers(model).values())
    before = [layer.draw for layer in layers]
    for layer in layers:
        layer.draw = draw
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.draw = old


def plain_means(model: nn.Module) -> None:
    """Makes plain layers again, with the posterior means as dense weights: the same outputs, bit for bit."""
    for layer in gaussian_layers(model).values():
        _replace(model, layer, layer.plain())


def _layer(base: nn.Module, name: str, count: int, start: Start, seed: int) -> SparseGaussian:
    weight_S = weight_of(base).detach()
    chance_S = uniform(seed, -1, name, weight_S.shape, device=weight_S.device)
    places_k = top_k(chance_S, count).flatten().nonzero().flatten()
    mu_k = start.means(weight_S.flatten()[places_k], places_k, name, seed)
    return SparseGaussian(base, name, places_k, mu_k, start.stds(places_k, name, seed))


def _require_replaceable(model: nn.Module, name: str, layer: nn.Module) -> None:
    kind = type(layer).__name__
    if not is_open(layer) or known_kind(layer) not in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        raise UserError(
            f"{name} is a {kind}, which cannot be made sparse and Gaussian: that takes {TAKEN}; leave it out"
        )
    if weight_of(layer).is_meta:
        raise UserError(f"{name} is on the meta device, which holds no numbers; load the weights first")
    for other, module in model.named_modules():
        if isinstance(module, READS_WEIGHTS) and any(part is layer for part in module.modules()):
            raise UserError(
                f"{name} is part of {type(module).__name__}, which reads its weight instead of calling it; leave it out"
            )
        if module is not layer and any(t is layer.weight for t in module.parameters(recurse=False)):
            raise UserError(f"the weight of {name} is shared with {other}, which would keep it dense; untie them")


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` in every place where `old` stands, but for its place inside of `new`."""
    for parent in list(model.modules()):
        if parent is not new:
            for slot in [slot for slot, child in parent._modules.items() if child is old]:
                setattr(parent, slot, new)
