"""What the 3x3 filters of a convolution look like, and how far the filters of two networks are apart.

Source: Gavrikov, Keuper, "CNN Filter DB: An Empirical Investigation of Trained Convolutional Filters", CVPR 2022, arXiv
2203.15331: scaling and principal components (section 4), the weighted symmetric divergence (section 4.2), sparsity,
variance entropy and its threshold of randomness (section 5). Orthogonality is that of the authors' later measurements
of layers. The equations are theirs; no table or other content of their database is used here.

What they leave open is decided here: each filter is divided by its own largest magnitude, as their notebook does, where
the text scales whole layers; a bank of zeros has sparsity 1 and entropy 0; singular values of 0 add nothing to an
entropy; all is computed in float64, for half precision loses small filters.

Shapes: N filters, O output channels, J = 9 components, Q bins. A filter is a row of 9 numbers.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightspan.core.drawing import SOFT
from lightspan.core.errors import UserError
from lightspan.core.patterns import matches, require_matches
from lightspan.core.results import Figure, Result
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.geometry.moments import Moments
from lightspan.evaluation.geometry.spectra import energy_shares, gram_singular_values
from lightspan.evaluation.rows import unit_rows
from lightspan.merging.weights import Weights

SIZE = 9
MOST_ENTROPY = math.log10(SIZE)
EMPTY = torch.finfo(torch.float32).eps
"""Of a bin without filters, before its histogram is brought to a sum of 1 again."""


def has_filters(shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape is one of 3x3 filters: [O I 3 3], or [O I D 3 3] for volumes, slice by slice."""
    return len(shape) >= 4 and shape[-2:] == (3, 3)


def filters_of(weight: Tensor) -> Tensor:
    """The filters of a weight [O I 3 3] or [O I D 3 3], float64 [N 9]."""
    return weight.detach().to(torch.float64).reshape(-1, SIZE)


def scaled(filters_N9: Tensor) -> Tensor:
    """Each filter over its largest magnitude, which brings it to [-1, 1]; filters of zeros stay."""
    largest_N1 = filters_N9.abs().amax(dim=1, keepdim=True)
    return filters_N9 / torch.where(largest_N1 > 0, largest_N1, 1)


def sparsity(filters_N9: Tensor, share: float = 0.01) -> float:
    """Share of the filters whose numbers all lie below `share` of the layer's largest; 1 for zeros and no filter."""
    largest_N = filters_N9.abs().amax(dim=1)
    return float((largest_N < share * largest_N.max()).double().mean()) if largest_N.any() else 1.0


def variance_shares(filters_N9: Tensor) -> Tensor:
    """sigma_j^2 over their sum, falling [9], of the filters less their mean; zeros where all filters are equal."""
    largest = filters_N9.abs().max() if filters_N9.numel() else filters_N9.new_zeros(())
    scatter_JJ = Moments.of(filters_N9 / torch.where(largest > 0, largest, 1)).within_DD
    return energy_shares(gram_singular_values(scatter_JJ))


def variance_entropy(filters_N9: Tensor) -> float:
    """H = -sum_j p_j log10 p_j over `variance_shares`, in [0, log10 9]: low where few patterns repeat, high in noise.

    n filters have rank n - 1 at most: below 10 of them H is at most log10(n - 1), whatever they are.
    """
    return float(torch.special.entr(variance_shares(filters_N9)).sum()) / math.log(10)


def random_entropy(filters: int) -> float:
    """T_H(n): at this entropy and above, n filters cannot be told from independent draws. Tends to 0.951."""
    return 1.2618047 / (1 + math.exp(-0.88767525 * (math.log2(filters) - 2.30436435))) - 0.31050834


def orthogonality(weight: Tensor) -> float:
    """1 - sum |W W^T - I| / (O (O - 1)), W [O ...] flattened to rows of norm 1; 1 for orthogonal rows and for one.

    A row of zeros stays one: its place on the diagonal counts as a deviation of 1.
    """
    rows = unit_rows(weight.detach().flatten(1))
    count = len(rows)
    if count < 2:
        return 1.0
    deviation = rows @ rows.T
    deviation.diagonal().sub_(1)
    return 1 - float(deviation.abs().sum(dtype=torch.float64)) / (count * (count - 1))


@dataclass(frozen=True)
class FilterBasis:
    """The principal components of filters.

    Attributes:
        mean_J: the mean filter.
        basis_JJ: a component each row, the strongest first; the sign makes the number of largest magnitude positive.
        explained_J: their shares of the variance; zeros where all filters are equal.
    """

    mean_J: Tensor
    basis_JJ: Tensor
    explained_J: Tensor

    @classmethod
    def of(cls, moments: Moments) -> Self:
        """From the moments of scaled filters, of all networks that are to be compared."""
        values_J, vectors_JJ = torch.linalg.eigh(moments.within_DD)
        basis_JJ = vectors_JJ.T.flip(0)
        sign_J1 = basis_JJ.gather(1, basis_JJ.abs().argmax(dim=1, keepdim=True)).sign()
        return cls(moments.mean_CD[0], basis_JJ * sign_J1, energy_shares(values_J.clamp_min(0).sqrt().flip(0)))

    def coefficients(self, filters_NJ: Tensor) -> Tensor:
        """c = (f - mean) V^T of scaled filters, [N J]."""
        return (filters_NJ - self.mean_J) @ self.basis_JJ.T


def counts(coefficients_NJ: Tensor, least_J: Tensor, greatest_J: Tensor, bins: int) -> Tensor:
    """How many coefficients of each component lie in each of `bins` equal parts of [least, greatest], float64 [J Q]."""
    width_J = greatest_J - least_J
    place_NJ = (coefficients_NJ - least_J) / torch.where(width_J > 0, width_J, 1) * bins
    place_NJ = place_NJ.floor().long().clamp(0, bins - 1)  # the greatest belongs to the last part
    one_each_JN = torch.ones(place_NJ.T.shape, dtype=torch.float64)
    return torch.zeros(place_NJ.shape[1], bins, dtype=torch.float64).scatter_add_(1, place_NJ.T, one_each_JN)


def divergence(first_JQ: Tensor, second_JQ: Tensor, explained_J: Tensor) -> Tensor:
    """D = sum_j explained_j (KL(p_j || q_j) + KL(q_j || p_j)), natural logarithm, of counts [... J Q]: [...]."""
    p, q = (_distribution(x) for x in (first_JQ, second_JQ))
    return (explained_J * ((p - q) * (p.log() - q.log())).sum(dim=-1)).sum(dim=-1)


def noise_floor(
    first_JQ: Tensor, second_JQ: Tensor, explained_J: Tensor, resamples: int, generator: torch.Generator
) -> Tensor:
    """D of `resamples` pairs of the same sizes, all drawn with replacement from both sets together: [resamples].

    What D would be if both were of one distribution: small sets look far apart. Components are drawn one by one.
    """
    pooled_JQ = first_JQ + second_JQ
    first, second = (_drawn(pooled_JQ, int(x_JQ[0].sum()), resamples, generator) for x_JQ in (first_JQ, second_JQ))
    return divergence(first, second, explained_J)


def _distribution(counts_JQ: Tensor) -> Tensor:
    p = counts_JQ / counts_JQ.sum(dim=-1, keepdim=True)
    p = torch.where(p > 0, p, EMPTY)
    return p / p.sum(dim=-1, keepdim=True)


def _drawn(pooled_JQ: Tensor, size: int, resamples: int, generator: torch.Generator) -> Tensor:
    """Counts of `size` draws, [resamples J Q]: binomials of what is left, bin after bin, so that size costs nothing."""
    left_RJ = torch.full((resamples, len(pooled_JQ)), float(size), dtype=torch.float64)
    behind_JQ = pooled_JQ.flip(1).cumsum(1).flip(1)
    share_JQ = torch.where(behind_JQ > 0, pooled_JQ / torch.where(behind_JQ > 0, behind_JQ, 1), 0).clamp(max=1)
    drawn = []
    for share_J in share_JQ.T:
        here_RJ = torch.binomial(left_RJ, share_J.expand_as(left_RJ), generator=generator)
        drawn.append(here_RJ)
        left_RJ = left_RJ - here_RJ
    return torch.stack(drawn, dim=-1)


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
