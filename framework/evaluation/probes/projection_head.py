"""What a projection head does to features: what probes read before it and behind it, and how evenly it weighs.

Source: Xue et al., "Investigating the Benefits of Projection Head for Representation Learning", ICLR 2024, arXiv
2403.11391. Features are counted by the singular values of centred rows: the more unequal these, the fewer features
weigh. In their theory of two linear layers those behind are the squares of those before, and the ratio of spreads is
0.5.
"""

import math
from dataclasses import dataclass
from typing import Any

from lightspan.core.drawing import COLOURS
from lightspan.core.errors import UserError
from lightspan.core.results import Figure, Result
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.geometry.spectra import effective_rank, singular_values
from lightspan.evaluation.probes.probes import LinearProbe


@dataclass(frozen=True)
class HeadComparison(Result):
    """Accuracies in [0, 1]; singular values over the largest one, and standard deviations of their logarithms over as
    many as both sides have, which are 0 of a single one.
    """

    accuracy_before: float
    accuracy_behind: float
    rank_before: float
    rank_behind: float
    spread_before: float
    spread_behind: float
    values_before: tuple[float, ...]
    values_behind: tuple[float, ...]

    def figures(self) -> tuple[Figure, ...]:
        return (
            Figure("accuracy before the head", 100 * self.accuracy_before, "%"),
            Figure("accuracy behind the head", 100 * self.accuracy_behind, "%"),
            Figure("effective rank before the head", self.rank_before),
            Figure("effective rank behind the head", self.rank_behind),
            Figure("spread of log singular values before the head", self.spread_before),
            Figure("spread of log singular values behind the head", self.spread_behind),
        )

    def draw(self, axes: Any) -> None:
        for values, name, colour in zip(
            (self.values_before, self.values_behind), ("before the head", "behind the head"), COLOURS, strict=False
        ):
            axes.semilogy(range(1, len(values) + 1), values, color=colour, linewidth=1.5, label=name)
        axes.set(xlabel="singular value", ylabel="over the largest")
        axes.legend(frameon=False)


class CompareHead(Estimator):
    """Linear probes and singular values of features before a head and behind it.

    Args:
        l2: penalty of both probes, above 0 and finite, see `lightspan.evaluation.probes.probes.LinearProbe`.
    """

    def __init__(self, l2: float = 1.0) -> None:
        if not 0 < l2 < math.inf:
            raise UserError(f"CompareHead l2={l2} must be above 0 and finite")
        self.probe = LinearProbe(l2)

    def fit(self, bank: Features, query: Features, bank_behind: Features, query_behind: Features) -> HeadComparison:
        """Raises: UserError as `LinearProbe`, of either side, and for labels that are no classes."""
        before, behind = self.probe.fit(bank, query), self.probe.fit(bank_behind, query_behind)
        if "accuracy" not in before.scores or "accuracy" not in behind.scores:
            raise UserError("CompareHead compares accuracies, and these labels are no classes; give it classes")
        sides = [singular_values(features.rows(), center=True).double() for features in (bank, bank_behind)]
        ranks = [float(effective_rank(values_S)) for values_S in sides]
        relative = [values_S / values_S.amax().clamp_min(1e-300) if len(values_S) else values_S for values_S in sides]
        # Values that rounding alone leaves are no features.
        kept = [values_S[values_S > 1e-6] for values_S in relative]
        shared = min(map(len, kept))
        spreads = [float(values_S[:shared].log().std(correction=0)) if shared else 0.0 for values_S in kept]
        (rank_before, rank_behind), (spread_before, spread_behind) = ranks, spreads
        values_before, values_behind = (tuple(values_S.tolist()) for values_S in relative)
        return HeadComparison(
            accuracy_before=before.accuracy,
            accuracy_behind=behind.accuracy,
            rank_before=rank_before,
            rank_behind=rank_behind,
            spread_before=spread_before,
            spread_behind=spread_behind,
            values_before=values_before,
            values_behind=values_behind,
        )
