"""Which layer of a vision transformer attends both near and far: the one to distil or to segment from.

Source: Zhang et al., "UNIP: Rethinking Pre-trained Attention Patterns for Infrared Semantic Segmentation",
ICLR 2025, arXiv 2502.02257, section 3; the measure is in `lightspan.evaluation.scores.attention_information`. The
authors' code names layers and does not choose them.
Shapes: H heads.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightspan.core.drawing import COLOURS, SOFT
from lightspan.core.errors import UserError
from lightspan.core.results import Figure, Result
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.scores.attention_information import information_of_layers
from lightspan.evaluation.weights.merging_statistics import NetworkOnData


@dataclass(frozen=True)
class AttentionReport(Result):
    """How local each layer's attention is.

    Attributes:
        images: how many were looked at.
        hybrid: the level that was asked for.
        chosen: the layer whose mean is nearest to it, from 0; of equal ones the first.
        layers: one mapping a layer: layer, heads, nmi (mean over images and heads), least and most (of its heads).
    """

    images: int
    hybrid: float
    chosen: int
    layers: tuple[dict[str, Any], ...]

    def figures(self) -> tuple[Figure, ...]:
        nmi = [one["nmi"] for one in self.layers]
        return (
            Figure("layer nearest the hybrid level", self.chosen),
            Figure("mutual information there", nmi[self.chosen]),
            Figure("least of a layer", min(nmi)),
            Figure("most of a layer", max(nmi)),
            Figure("images", self.images),
        )

    def table(self) -> tuple[dict[str, Any], ...]:
        return self.layers

    def draw(self, axes: Any) -> None:
        layers, nmi, least, most = ([one[key] for one in self.layers] for key in ("layer", "nmi", "least", "most"))
        axes.fill_between(layers, least, most, color=COLOURS[0], alpha=0.15, label="heads")
        axes.plot(layers, nmi, "o-", color=COLOURS[0], label="mean")
        axes.axhline(self.hybrid, color=SOFT, linestyle="--", label="hybrid level")
        axes.set(xlabel="layer", ylabel="normalised mutual information")
        axes.legend()


class AttentionPatterns(Estimator):
    """Normalised mutual information of queries and keys by layer: near 1 local, near 0 global, hybrid between.

    Args:
        hybrid: the level of a hybrid layer, in [0, 1]. 0.09 is for 197 tokens; with another number of tokens calibrate
            it: take that of a layer which is known to transfer well.
        most: images that are looked at on each rank, at least 1.
    """

    def __init__(self, hybrid: float = 0.09, most: int = 256) -> None:
        if not 0 <= hybrid <= 1:
            raise UserError(f"AttentionPatterns hybrid={hybrid} must be in [0, 1]")
        if most < 1:
            raise UserError(f"AttentionPatterns most={most} must be at least 1")
        self.hybrid, self.most = hybrid, most

    def fit(self, network: NetworkOnData) -> AttentionReport:
        """Raises: UserError for data without an image, attention that cannot be read, or is not finite."""
        with network.at_work() as batches:
            images, nmi = information_of_layers(network.network, self._first(batches))
        if not images:
            raise UserError("AttentionPatterns looks at a network's attention on images, and there is none; give one")
        if not all(nmi_H.isfinite().all() for nmi_H in nmi):
            raise UserError(
                "the network's attention is NaN or infinite, and tells nothing; take weights from before it diverged"
            )
        means = [float(nmi_H.mean()) for nmi_H in nmi]
        rows = tuple(
            {"layer": layer, "heads": len(nmi_H), "nmi": mean, "least": float(nmi_H.min()), "most": float(nmi_H.max())}
            for layer, (nmi_H, mean) in enumerate(zip(nmi, means, strict=True))
        )
        chosen = min(range(len(means)), key=lambda layer: abs(means[layer] - self.hybrid))
        return AttentionReport(images, self.hybrid, chosen, rows)

    def _first(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        left = self.most
        for image_BChw in batches:
            if left:
                yield image_BChw[:left]
            left = max(0, left - len(image_BChw))
            if not left:
                return
