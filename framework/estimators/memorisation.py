"""Which weights of feed-forward layers hold what a network has memorised, and whether it still tells it.

Source: Chavhan et al., "Memorized Images in Diffusion Models share a Subspace that can be Located and Deleted", 2024,
arXiv 2406.18566; equations in `lightspan.analysis.memorisation`. The authors judge copies by SSCD, a network trained to
detect copies, whose weights no package ships; here it is the distance of pixels, of use where a memorised image comes
out as it went in. Later work recovers pruned images with optimised prompts: this mitigates, and proves no deletion.
Shapes: [O I] weights of the second linear layer of a feed-forward block; T steps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightspan.analysis.memorisation import memorised_entries, overlap, pixel_distances, recorded, voted
from lightspan.drawing import COLOURS
from lightspan.errors import UserError
from lightspan.estimators.estimator import Estimator
from lightspan.estimators.prompts import DrawnImages, Prompts
from lightspan.features.features import Features
from lightspan.patterns import matches, require_matches
from lightspan.results import Figure, Result


@dataclass(frozen=True)
class MemorisedWeights(Result):
    """Which entries to prune. `tensors` holds what stays: a boolean mask by the parameter's name, false where pruned.

    `lightspan.merging.masked.Masked` writes the pruned checkpoint, `lightspan.analysis.memorisation.prune` edits a
    network in memory.

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
    """Draws images from prompts, and counts those within `radius` of the image that stands under that prompt.

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
                f"ExtractionAttack: no image stands under the prompts {missing[:5]}; take those that have one"
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
