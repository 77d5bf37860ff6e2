"""The 3x3 filters of networks: a health check of every layer, and how far networks are apart.

Source: Gavrikov, Keuper, "CNN Filter DB", CVPR 2022, arXiv 2203.15331; equations in `lightspan.analysis.filters`. What
it says is read off weights alone and is correlational: a flagged layer is one to look at.
Shapes: N filters, J = 9 components, Q bins.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightspan.analysis.filters import (
    SIZE,
    FilterBasis,
    counts,
    divergence,
    filters_of,
    has_filters,
    noise_floor,
    orthogonality,
    random_entropy,
    scaled,
    sparsity,
    variance_entropy,
)
from lightspan.analysis.moments import Moments
from lightspan.drawing import SOFT
from lightspan.errors import UserError
from lightspan.estimators.estimator import Estimator
from lightspan.merging.weights import Weights
from lightspan.patterns import matches, require_matches
from lightspan.results import Figure, Result

FEWEST = 10
"""Filters that a layer needs for its entropy to tell anything: fewer have too low a rank."""

BatchNorm = nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


@dataclass(frozen=True)
class FilterReport(Result):
    """Layers of every model, the common principal components, and distances.

    Attributes:
        models: {name: {"filters", "layers", "flagged", "explained"}}; `explained`: variance shares of the model's own
            filters along their own components.
        layers: one mapping a layer, models one after the other: model, name, shape, depth in [0, 1], filters, sparsity,
            entropy, threshold (T_H), orthogonality, folded, flags.
        mean, basis, explained: the principal components of all models together, see `FilterBasis`.
        distances: one mapping a pair: first, second, distance, and the noise floor of sets of these sizes: its mean
            (`floor`) and its 95 % quantile (`floor_95`).
    """

    models: dict[str, Any]
    layers: tuple[dict[str, Any], ...]
    mean: tuple[float, ...]
    basis: tuple[tuple[float, ...], ...]
    explained: tuple[float, ...]
    distances: tuple[dict[str, Any], ...]

    def figures(self) -> tuple[Figure, ...]:
        found = []
        for name, model in self.models.items():
            layers = self._layers(name)
            found += [
                Figure(f"{name}: layers flagged", len([one for one in layers if one["flags"]])),
                Figure(f"{name}: layers", len(layers)),
                Figure(f"{name}: 3x3 filters", model["filters"]),
                Figure(f"{name}: sparsity, mean", _mean(one["sparsity"] for one in layers)),
                Figure(f"{name}: H / T_H, mean", _mean(one["entropy"] / one["threshold"] for one in judged(layers))),
            ]
        for pair in self.distances:
            label = f"D of {pair['first']} and {pair['second']}"
            found += [Figure(label, pair["distance"]), Figure(f"{label}, noise floor", pair["floor"])]
        return tuple(found)

    def table(self) -> tuple[dict[str, Any], ...]:
        shown = {"shape": "x".join, "flags": " ".join}
        return tuple({k: shown[k](map(str, v)) if k in shown else v for k, v in one.items()} for one in self.layers)

    def draw(self, axes: Any) -> None:
        for name in self.models:
            layers = judged(self._layers(name))
            depth, ratio = ([f(one) for one in layers] for f in (lambda x: x["depth"], _ratio))
            (line,) = axes.plot(depth, ratio, "-o", markersize=3, linewidth=1, label=name)
            flagged = [one for one in layers if one["flags"]]
            axes.plot([one["depth"] for one in flagged], [*map(_ratio, flagged)], "x", color=line.get_color())
        axes.axhline(1, color=SOFT, linewidth=0.8, linestyle="--")
        axes.set(xlabel="depth", ylabel="variance entropy over its value in noise")
        axes.legend(frameon=False)

    def _layers(self, model: str) -> list[dict[str, Any]]:
        return [one for one in self.layers if one["model"] == model]


def judged(layers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Layers of enough filters for an entropy."""
    return [one for one in layers if one["filters"] >= FEWEST]


def _ratio(layer: dict[str, Any]) -> float:
    return float(layer["entropy"] / layer["threshold"])


def _mean(values: Iterator[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else 0.0


class FilterStatistics(Estimator):
    """Reads networks layer by layer, three times, and holds one layer at a time.

    Flags of a layer: "sparse" from a sparsity of `sparse_from` on; "random" at the entropy of independent draws and
    above, as before training; "repeated" below `repeated_below` of that entropy; "few" where a layer has fewer than 10
    filters (first layers, narrow depthwise ones), of which neither is said. The first and the third limit are choices
    made here; the paper names none.

    Args:
        match: patterns of tensor names; None takes every weight of 3x3 filters. A transposed convolution keeps its
            input channels first, whose orthogonality is then measured.
        zero: a filter counts as zero below this share of the layer's largest magnitude, in (0, 1).
        sparse_from: sparsity in (0, 1].
        repeated_below: share of T_H in [0, 1).
        bins: of the histograms of each component, over the range of all models together. Outliers widen it.
        resamples: of the noise floor.
        fold: multiply each filter with what the batch norm behind it makes of its output channel, gamma / sqrt(var +
            eps). Which that is, a network tells by the order of its modules, and a checkpoint does not.
        seed: of the noise floor.
    """

    def __init__(
        self,
        match: list[str] | None = None,
        zero: float = 0.01,
        sparse_from: float = 0.5,
        repeated_below: float = 0.5,
        bins: int = 70,
        resamples: int = 100,
        fold: bool = False,
        seed: int = 0,
    ) -> None:
        if not 0 < zero < 1:
            raise UserError(f"FilterStatistics zero={zero} must be above 0 and below 1, a share of the largest number")
        if not 0 < sparse_from <= 1:
            raise UserError(f"FilterStatistics sparse_from={sparse_from} must be above 0 and at most 1")
        if not 0 <= repeated_below < 1:
            raise UserError(f"FilterStatistics repeated_below={repeated_below} must be at least 0 and below 1")
        if bins < 2:
            raise UserError(f"FilterStatistics bins={bins} must be at least 2")
        if resamples < 1:
            raise UserError(f"FilterStatistics resamples={resamples} must be at least 1")
        if seed < 0:
            raise UserError(f"FilterStatistics seed={seed} must be at least 0")
        self.match, self.zero, self.fold, self.seed = match, zero, fold, seed
        self.sparse_from, self.repeated_below = sparse_from, repeated_below
        self.bins, self.resamples = bins, resamples

    def fit(self, **models: Weights | nn.Module) -> FilterReport:
        """Raises: UserError for no model, a model without 3x3 filters or with numbers that are not finite, a pattern
        that matches nothing, or `fold` for a checkpoint.
        """
        if not models:
            raise UserError("FilterStatistics got no model; name one or more under `inputs`")
        sources = {name: _Source(name, model, self.match, self.fold) for name, model in models.items()}
        layers: list[dict[str, Any]] = []
        moments: dict[str, Moments] = {}
        for name, source in sources.items():
            for i, tensor in enumerate(source.names):
                layer, of_layer = self._layer(source.bank(tensor), i / max(len(source.names) - 1, 1))
                layers.append({"model": name, "name": tensor, **layer, "folded": tensor in source.norms})
                moments[name] = moments[name] + of_layer if i else of_layer
        basis = FilterBasis.of(reduce(Moments.__add__, moments.values()))
        return FilterReport(
            {name: self._model(moments[name], [one for one in layers if one["model"] == name]) for name in models},
            tuple(layers),
            tuple(basis.mean_J.tolist()),
            tuple(tuple(row) for row in basis.basis_JJ.tolist()),
            tuple(basis.explained_J.tolist()),
            tuple(self._distances(sources, basis)) if len(models) > 1 else (),
        )

    def _layer(self, weight: Tensor, depth: float) -> tuple[dict[str, Any], Moments]:
        filters_NJ = filters_of(weight)
        count, zeros, entropy = len(filters_NJ), sparsity(filters_NJ, self.zero), variance_entropy(filters_NJ)
        threshold = random_entropy(max(count, FEWEST))
        flags = ["sparse"] * (zeros >= self.sparse_from)
        if count < FEWEST:
            flags.append("few")
        elif entropy >= threshold:
            flags.append("random")
        elif entropy < self.repeated_below * threshold:
            flags.append("repeated")
        layer = {
            "shape": tuple(weight.shape),
            "depth": depth,
            "filters": count,
            "sparsity": zeros,
            "entropy": entropy,
            "threshold": threshold,
            "orthogonality": orthogonality(weight),
            "flags": tuple(flags),
        }
        return layer, Moments.of(scaled(filters_NJ))

    def _model(self, moments: Moments, layers: list[dict[str, Any]]) -> dict[str, Any]:
        names = ("sparse", "random", "repeated", "few")
        return {
            "filters": moments.count,
            "layers": len(layers),
            "flagged": {flag: sum(flag in one["flags"] for one in layers) for flag in names},
            "explained": tuple(FilterBasis.of(moments).explained_J.tolist()),
        }

    def _distances(self, sources: Mapping[str, "_Source"], basis: FilterBasis) -> Iterator[dict[str, Any]]:
        least_J = torch.full((SIZE,), torch.inf, dtype=torch.float64)
        greatest_J = -least_J
        places = [(source, tensor) for source in sources.values() for tensor in source.names]
        for source, tensor in places:
            c_NJ = source.coefficients(tensor, basis)
            least_J, greatest_J = least_J.minimum(c_NJ.amin(dim=0)), greatest_J.maximum(c_NJ.amax(dim=0))
        histograms = {name: torch.zeros(SIZE, self.bins, dtype=torch.float64) for name in sources}
        for source, tensor in places:
            histograms[source.model] += counts(source.coefficients(tensor, basis), least_J, greatest_J, self.bins)
        generator = torch.Generator().manual_seed(self.seed)
        for first, second in combinations(histograms, 2):
            pair = histograms[first], histograms[second]
            floor_R = noise_floor(*pair, basis.explained_J, self.resamples, generator)
            yield {
                "first": first,
                "second": second,
                "distance": float(divergence(*pair, basis.explained_J)),
                "floor": float(floor_R.mean()),
                "floor_95": float(floor_R.quantile(0.95)),
            }


class _Source:
    """The banks of filters of one model, read anew each time."""

    def __init__(self, model: str, source: Weights | nn.Module, match: list[str] | None, fold: bool) -> None:
        self.model, self.source = model, source
        self.norms: dict[str, Any] = {}
        if isinstance(source, nn.Module):
            self.tensors = dict(source.named_parameters())
            if absent := [n for n, p in self.tensors.items() if isinstance(p, UninitializedParameter) or p.is_meta]:
                raise UserError(f"{absent[0]} of {model} has no numbers; run a lazy network once, or load its weights")
            forms = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
            self.norms = norms_behind(source) if fold else {}
        elif fold:
            raise UserError(
                f"{model} is a checkpoint, whose names do not say which batch norm follows which convolution; give the "
                "network as the input (lightspan.backbones.weights.with_weights loads it), or leave fold out"
            )
        else:
            forms = {name: form.shape for name, form in source.forms.items() if name not in source.aliases}
        self.names = [name for name in _by_depth(forms) if has_filters(forms[name]) and 0 not in forms[name]]
        if match is not None:
            require_matches(match, self.names, f"weight of 3x3 filters of {model}")
            self.names = [name for name in self.names if matches(name, match)]
        if not self.names:
            raise UserError(
                f"{model} has no weight of 3x3 filters, [out, in, 3, 3]: of its {len(forms)} tensors the first are "
                f"{', '.join(list(forms)[:3]) or 'none'}"
            )

    def bank(self, name: str) -> Tensor:
        """A weight on the CPU, what is folded into it included. Raises: UserError unless it is of finite floats."""
        norm = self.norms.get(name)
        weight = self.tensors[name].detach() if isinstance(self.source, nn.Module) else self.source.read(name)
        weight = weight.cpu() if norm is None else folded_into(weight, norm).cpu()
        if not (weight.is_floating_point() and weight.double().isfinite().all()):
            raise UserError(
                f"{name} of {self.model} is {weight.dtype} or holds NaN or infinite numbers, which have no statistics; "
                "take a checkpoint of floats from before the run diverged"
            )
        return weight.float() if weight.itemsize == 1 else weight

    def coefficients(self, name: str, basis: FilterBasis) -> Tensor:
        return basis.coefficients(scaled(filters_of(self.bank(name))))


def norms_behind(network: nn.Module) -> dict[str, BatchNorm]:
    """{name of a convolution's weight: the batch norm with running statistics that comes next in the order of modules}.

    Between them may stand identities and dropouts; both have as many channels. Modules do not tell what a network adds
    between them, as pre-activation networks do, or in which order it calls them: fold none of these.
    """
    found: dict[str, BatchNorm] = {}
    last: tuple[str, int] | None = None
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            last = f"{name}.weight".removeprefix("."), module.out_channels
        elif isinstance(module, BatchNorm):
            if last is not None and module.num_features == last[1] and module.running_var is not None:
                found[last[0]] = module
            last = None
        elif not (isinstance(module, nn.Identity | nn.Dropout | nn.Dropout2d) or any(True for _ in module.children())):
            last = None
    return found


def folded_into(weight: Tensor, norm: BatchNorm) -> Tensor:
    """W_o gamma_o / sqrt(var_o + eps): the convolution that gives what the batch norm makes of it, but for a shift."""
    assert norm.running_var is not None, "norms_behind takes norms with running statistics"
    factor_O = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor_O = factor_O * norm.weight.detach().double()
    return weight.double() * factor_O.view(-1, *[1] * (weight.ndim - 1))


def _by_depth(forms: Mapping[str, Any]) -> list[str]:
    """Names in their order; if that is the alphabet's, as in safetensors files, numbers in it count as numbers."""
    names = list(forms)
    if names != sorted(names):
        return names
    return sorted(
        names, key=lambda name: [(part.isdecimal(), int(part) if part.isdecimal() else part) for part in _parts(name)]
    )


def _parts(name: str) -> list[str]:
    return [part for part in re.split(r"(\d+)", name) if part]
