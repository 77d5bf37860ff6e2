"""Neurons of feed-forward layers that memorised prompts share, and the weights attached to them.

Source: Chavhan et al., "Memorized Images in Diffusion Models share a Subspace that can be Located and Deleted", 2024,
arXiv 2406.18566, section 3; their scores are those of Sun et al., "A Simple and Effective Pruning Approach for Large
Language Models" (Wanda), 2023, arXiv 2306.11695, equation 1.

One difference: the paper sums squares over all tokens of a set of prompts, so that a set of more prompts has larger
norms. Here they are means over tokens. Within one set nothing changes; between two sets of unequal size the comparison
is then of prompts and not of their number.

Shapes: the second linear layer of a feed-forward block has weights [O I] and an input of I hidden units; T steps.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.drawing import COLOURS
from lightspan.core.errors import UserError
from lightspan.core.patterns import matches, require_matches
from lightspan.core.results import Figure, Result
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.weights.prompts import DrawnImages, Prompts


class ColumnNorms:
    """a_i = sqrt(mean over tokens of x_i^2), x being a token's hidden units at norm 1; step by step, in float64."""

    def __init__(self) -> None:
        self._squares: dict[int, Tensor] = {}
        self._tokens: dict[int, int] = {}

    def add(self, step: int, hidden: Tensor) -> None:
        """Hidden units [... I] of one call. A token whose hidden units are all zero counts, and adds nothing."""
        rows = wide(hidden.detach()).flatten(0, -2)
        largest = rows.abs().amax(dim=1, keepdim=True)  # first, so that squares of tiny rows do not vanish
        rows = (rows / torch.where(largest > 0, largest, 1)).double().cpu()
        squares = rows.square()
        norm = squares.sum(dim=1, keepdim=True)
        seen = (squares / torch.where(norm > 0, norm, 1)).sum(dim=0)
        self._squares[step] = self._squares[step] + seen if step in self._squares else seen
        self._tokens[step] = self._tokens.get(step, 0) + len(rows)

    @property
    def seen(self) -> bool:
        """Whether there was a token."""
        return any(self._tokens.values())

    def steps(self) -> Tensor:
        """[T I] of the steps there were, in order."""
        return torch.stack([(self._squares[t] / max(self._tokens[t], 1)).sqrt() for t in sorted(self._squares)])


class Recording:
    """What `recorded` yields: which step the network is at, and the norms by name of the layer."""

    def __init__(self, names: list[str]) -> None:
        self.step = 0
        self.norms = {name: ColumnNorms() for name in names}

    def enter(self, step: int) -> None:
        self.step = step


@contextmanager
def recorded(network: nn.Module, names: list[str]) -> Iterator[Recording]:
    """Inside, whatever enters these linear layers of the network joins the norms of the step that is set."""
    recording = Recording(names)

    def hook(name: str) -> torch.utils.hooks.RemovableHandle:
        layer = network.get_submodule(name)
        return layer.register_forward_pre_hook(lambda _, given: recording.norms[name].add(recording.step, given[0]))

    handles = [hook(name) for name in names]
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def wanda_scores(weight_OI: Tensor, norms_I: Tensor) -> Tensor:
    """S_oi = |W_oi| a_i, float64 [O I]."""
    return weight_OI.detach().double().cpu().abs() * norms_I


def memorised_entries(weight_OI: Tensor, target_I: Tensor, base_I: Tensor, share: float) -> Tensor:
    """Of the floor(share I) highest scores of each row on the target, those above the score on the base: bool [O I]."""
    target_OI, base_OI = (wanda_scores(weight_OI, norms_I) for norms_I in (target_I, base_I))
    highest = target_OI.topk(int(share * target_OI.shape[1]), dim=1).indices
    chosen_OI = torch.zeros(target_OI.shape, dtype=torch.bool).scatter_(1, highest, True)
    return chosen_OI & (target_OI > base_OI)


def voted(chosen_TOI: Tensor, ratio: float) -> Tensor:
    """Entries that were chosen in more than ratio * T of the steps, bool [O I]; 0 takes the union."""
    return chosen_TOI.sum(dim=0) > ratio * len(chosen_TOI)


def overlap(first: Tensor, second: Tensor) -> tuple[float, float]:
    """(IoU of two masks, that of independent ones of their densities p and q: pq / (p + q - pq)); 0 for empty ones."""
    union = int((first | second).sum())
    p, q = (float(mask.double().mean()) if mask.numel() else 0.0 for mask in (first, second))
    return int((first & second).sum()) / union if union else 0.0, p * q / (p + q - p * q) if p + q else 0.0


@torch.no_grad()
def prune(network: nn.Module, keep: Mapping[str, Tensor]) -> None:
    """Sets the entries of parameters that `keep` does not name true to zero, for good: W <- W * keep.

    Args:
        keep: by the parameter's name, of its shape; other parameters stay.
    Raises: UserError for a name or a shape that the network has not; nothing is changed then.
    """
    parameters = dict(network.named_parameters())
    for name, mask in keep.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            own = list(parameters[name].shape) if name in parameters else "none of that name"
            raise UserError(
                f"the mask of {name} is {list(mask.shape)}, and {type(network).__name__} has {own}; take a mask that "
                "was made for this network"
            )
    for name, mask in keep.items():
        parameters[name].masked_fill_(~mask.to(parameters[name].device).bool(), 0)


def random_control(chosen_OI: Tensor, generator: torch.Generator) -> Tensor:
    """As many entries as `chosen`, anywhere in the matrix: bool [O I]."""
    places = torch.randperm(chosen_OI.numel(), generator=generator)[: int(chosen_OI.sum())]
    return torch.zeros(chosen_OI.numel(), dtype=torch.bool).index_fill_(0, places, True).view(chosen_OI.shape)


def largest_control(chosen_OI: Tensor, weight_OI: Tensor) -> Tensor:
    """As many entries as `chosen`, those of the largest |W|: bool [O I]."""
    places = weight_OI.detach().cpu().abs().flatten().topk(int(chosen_OI.sum())).indices
    return torch.zeros(chosen_OI.numel(), dtype=torch.bool).index_fill_(0, places, True).view(chosen_OI.shape)


def pixel_distances(images_BD: Tensor, references_ND: Tensor) -> Tensor:
    """sqrt(mean over entries of (x - y)^2) of every image and every reference, [B N]: the field's normalised distance.

    Source: Carlini et al., "Extracting Training Data from Diffusion Models", 2023, arXiv 2301.13188, section 4.1.
    """
    # By differences: products would leave a copy at the rounding error of its norm.
    apart_BN = torch.cdist(images_BD.double(), references_ND.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return apart_BN / math.sqrt(max(images_BD.shape[1], 1))


@dataclass(frozen=True)
class MemorisedWeights(Result):
    """Which entries to prune. `tensors` holds what stays: a boolean mask by the parameter's name, false where pruned.

    `lightspan.merging.masked.Masked` writes the pruned checkpoint, `lightspan.evaluation.weights.memorisation.prune`
    edits a network in memory.

    Attributes:
        layers: one mapping a layer: name, pruned, density, and with a second group of prompts its own density, the
            overlap of both masks (`iou`) and what independent masks of these densities would have (`independent`).
        pruned, density: entries to prune, and their share of the layers' weights.
        of_network: their share of all parameters of the network.
        iou, independent: of all layers together; None without a second group.
    """

    layers: tuple[dict[str, Any], ...]
    pruned: int
    density: float
    of_network: float
    iou: float | None = None
    independent: float | None = None

    def figures(self) -> tuple[Figure, ...]:
        found = [
            Figure("weights to prune", self.pruned),
            Figure("of these layers", 100 * self.density, "%"),
            Figure("of the network", 100 * self.of_network, "%"),
            Figure("layers", len(self.layers)),
        ]
        if self.iou is not None and self.independent is not None:
            found += [Figure("IoU with the other group", self.iou), Figure("IoU by chance", self.independent)]
        return tuple(found)

    def table(self) -> tuple[dict[str, Any], ...]:
        return self.layers

    def draw(self, axes: Any) -> None:
        place = range(len(self.layers))
        axes.bar(place, [100 * one["density"] for one in self.layers], color=COLOURS[0])
        axes.set(xlabel="layer", ylabel="weights to prune, %")
        axes.set_xticks(list(place))


class MemorisedNeurons(Estimator):
    """Runs a network on memorised prompts and on others, and compares what enters the second feed-forward layers.

    Args:
        match: patterns of module names, each a linear layer.
        share: of the columns in every row of weights, in (0, 1]: the paper's k, 1 %. It has to leave one column.
        vote: entries count that more than this share of the steps choose, in [0, 1); 0 takes those of any step.
    """

    def __init__(self, match: list[str] | None = None, share: float = 0.01, vote: float = 0.0) -> None:
        if not 0 < share <= 1:
            raise UserError(f"MemorisedNeurons share={share} must be above 0 and at most 1")
        if not 0 <= vote < 1:
            raise UserError(f"MemorisedNeurons vote={vote} must be at least 0 and below 1")
        self.match, self.share, self.vote = match or ["*mlp.fc2"], share, vote

    def fit(self, network: nn.Module, target: Prompts, base: Prompts, other: Prompts | None = None) -> MemorisedWeights:
        """The mask of `target` against `base`; `other` are memorised prompts too, for the overlap alone.

        Equal prompts give an empty mask.

        Raises: UserError for a pattern that matches no linear layer, a `share` that is less than a column, layers that
        no prompt reaches, norms that are not finite, or unequal numbers of steps.
        """
        layers = self._layers(network)
        base_TI = _norms(network, list(layers), base, "base")
        chosen = self._chosen(layers, _norms(network, list(layers), target, "target"), base_TI)
        others = None if other is None else self._chosen(layers, _norms(network, list(layers), other, "other"), base_TI)
        rows = []
        for name, mask in chosen.items():
            row: dict[str, Any] = {"name": name, "pruned": int(mask.sum()), "density": float(mask.double().mean())}
            if others is not None:
                iou, independent = overlap(mask, others[name])
                density = float(others[name].double().mean())
                row |= {"other_density": density, "iou": iou, "independent": independent}
            rows.append(row)
        pruned, weights = sum(row["pruned"] for row in rows), sum(mask.numel() for mask in chosen.values())
        both = (None, None) if others is None else overlap(_flat(chosen), _flat(others))
        keep = {f"{name}.weight": ~mask for name, mask in chosen.items()}
        everything = sum(p.numel() for p in network.parameters())
        return MemorisedWeights(tuple(rows), pruned, pruned / weights, pruned / everything, *both, tensors=keep)

    def _layers(self, network: nn.Module) -> dict[str, nn.Linear]:
        linear = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
        require_matches(self.match, list(linear), f"linear layer of {type(network).__name__}")
        found = {name: module for name, module in linear.items() if matches(name, self.match)}
        for name, module in found.items():
            if int(self.share * module.in_features) < 1:
                raise UserError(
                    f"MemorisedNeurons share={self.share:g} of the {module.in_features} columns of {name} is less than "
                    f"one; give {1 / module.in_features:.3g} or more"
                )
        return found

    def _chosen(
        self, layers: Mapping[str, nn.Linear], target: Mapping[str, Tensor], base: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        chosen = {}
        for name, layer in layers.items():
            if len(target[name]) != len(base[name]):
                raise UserError(
                    f"{name} was seen in {len(target[name])} steps of memorised prompts and {len(base[name])} of base "
                    "ones; run both for as many"
                )
            pairs = zip(target[name], base[name], strict=True)
            masks = [memorised_entries(layer.weight, *pair, self.share) for pair in pairs]
            chosen[name] = voted(torch.stack(masks), self.vote)
        return chosen


def _norms(network: nn.Module, names: list[str], prompts: Prompts, which: str) -> dict[str, Tensor]:
    """{layer: [T I]}"""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with recorded(network, names) as recording, torch.no_grad():
            prompts.run(network, recording.enter)
    finally:
        for module, training in modes:
            module.training = training
    if missed := [name for name, norms in recording.norms.items() if not norms.seen]:
        raise UserError(f"the {which} prompts do not reach {', '.join(missed[:3])}; match layers that they run through")
    found = {name: norms.steps() for name, norms in recording.norms.items()}
    if broken := [name for name, norms_TI in found.items() if not norms_TI.isfinite().all()]:
        raise UserError(
            f"the {which} prompts give NaN or infinite numbers in {broken[0]}; take weights from before it diverged"
        )
    return found


def _flat(masks: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([mask.flatten() for mask in masks.values()])


@dataclass(frozen=True)
class Extracted(Result):
    """How many drawn images are copies; `distances` are quantiles of all, in the units of the images."""

    rate: float
    copies: int
    drawn: int
    prompts: int
    distances: tuple[float, ...]

    def figures(self) -> tuple[Figure, ...]:
        return (
            Figure("extracted", 100 * self.rate, "%"),
            Figure("copies", self.copies),
            Figure("images drawn", self.drawn),
            Figure("prompts", self.prompts),
            Figure("median distance", self.distances[len(self.distances) // 2]),
        )


class ExtractionAttack(Estimator):
    """Draws images from prompts, and counts those within `radius` of the image of that prompt.

    Args:
        radius: root mean square over pixels, finite and above 0, in the units that the network sees; see
            `pixel_distances`. 0.15 is that paper's for pixels in [0, 1]: of standardised images, divide it by their
            deviation.
    """

    def __init__(self, radius: float = 0.15) -> None:
        if not 0 < radius < math.inf:
            raise UserError(f"ExtractionAttack radius={radius} must be above 0 and finite")
        self.radius = radius

    def fit(self, network: nn.Module, prompts: DrawnImages, images: Features) -> Extracted:
        """`images` are flattened, of the size that is drawn; of several of one label the nearest counts.

        Raises: UserError for a label without an image, or images of another size.
        """
        rows_ND, classes_N = images.rows(), images.classes()
        if missing := sorted(set(prompts.labels) - set(classes_N.tolist())):
            raise UserError(
                f"ExtractionAttack: there is no image for the prompts {missing[:5]}; take those that have one"
            )
        label_B, drawn = prompts.images(network)
        drawn_BD = drawn.flatten(1)
        if rows_ND.shape[1] != drawn_BD.shape[1]:
            raise UserError(
                f"ExtractionAttack: {rows_ND.shape[1]} numbers an image, and {drawn_BD.shape[1]} are drawn; give "
                "images as they are, flattened"
            )
        nearest_B = torch.empty(len(drawn_BD), dtype=torch.float64)
        for label in set(prompts.labels):
            here = label_B == label
            nearest_B[here] = pixel_distances(drawn_BD[here], rows_ND[classes_N == label]).amin(dim=1)
        copies = int((nearest_B <= self.radius).sum())
        quantiles = nearest_B.quantile(torch.linspace(0, 1, 11, dtype=torch.float64))
        labels = len(set(prompts.labels))
        return Extracted(copies / len(nearest_B), copies, len(nearest_B), labels, tuple(quantiles.tolist()))
