"""What an encoder of images and texts knows of all domains after each that it learned: transfer, average, last.

Source: Zheng et al., "Preventing Zero-Shot Transfer Degradation in Continual Learning of Vision-Language Models"
(ZSCL), ICCV 2023, arXiv 2303.06628, whose three figures these are; without the identity of the domain, so that an image
may be taken for a class of any domain (X-TAIL): Xu et al., "Advancing Cross-domain Discriminability in Continual
Learning of Vision-Language Models" (RAIL), NeurIPS 2024, arXiv 2406.18868.
"""

from dataclasses import dataclass
from statistics import mean
from typing import Any

from lightspan.core.errors import UserError
from lightspan.core.results import Figure, Result
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.features.stages import TextStages
from lightspan.evaluation.gaussians.closed_form import NearestMean, share_right


@dataclass(frozen=True)
class CrossDomainAccuracy(Result):
    """Shares of right answers among the classes of all domains.

    Attributes:
        domains: names, in the order in which they were learned.
        accuracy: after each domain, that on the test images of each.
    """

    domains: tuple[str, ...]
    accuracy: tuple[tuple[float, ...], ...]

    def transfer(self) -> float | None:
        """Mean over the domains but the first of the mean accuracy on it before it was learned; None for one domain."""
        before = [mean(row[domain] for row in self.accuracy[:domain]) for domain in range(1, len(self.domains))]
        return mean(before) if before else None

    def average(self) -> float:
        """Mean over all domains after each."""
        return mean(mean(row) for row in self.accuracy)

    def last(self) -> float:
        """Mean over all domains after the last."""
        return mean(self.accuracy[-1])

    def figures(self) -> tuple[Figure, ...]:
        transfer = self.transfer()
        return (
            Figure("last", 100 * self.last(), "%"),
            Figure("average", 100 * self.average(), "%"),
            *(() if transfer is None else (Figure("transfer", 100 * transfer, "%"),)),
            Figure("domains", len(self.domains)),
        )

    def table(self) -> tuple[dict[str, Any], ...]:
        return tuple(
            {"after": self.domains[stage], "on": self.domains[domain], "accuracy": share}
            for stage, row in enumerate(self.accuracy)
            for domain, share in enumerate(row)
        )

    def draw(self, axes: Any) -> None:
        """A row for each stage, a column for each domain."""
        axes.imshow(self.accuracy, vmin=0, vmax=1, cmap="viridis")
        places = range(len(self.domains))
        axes.set_xticks(places, self.domains, rotation=60, ha="right", fontsize=7)
        axes.set_yticks(places, self.domains, fontsize=7)
        axes.set(xlabel="accuracy on", ylabel="after learning")
        for stage, domain in ((stage, domain) for stage in places for domain in places):
            share = self.accuracy[stage][domain]
            axes.text(domain, stage, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color="white")


class CrossDomain(Estimator):
    """Classifies the test images of all domains after each, by the sentence that is nearest by cosine among those of
    the classes of all domains.
    """

    def fit(self, stages: TextStages) -> CrossDomainAccuracy:
        """Raises: UserError for another number of stages than of domains, a domain without test images, or features
        that are not finite.
        """
        if not stages.names or len(stages.texts) != len(stages.names):
            raise UserError(
                f"there are encoders after {len(stages.texts)} domains, and test images of {len(stages.names)}; give "
                "an encoder after each domain, in the order in which they were learned"
            )
        rows = []
        for text, queries in zip(stages.texts, stages.queries, strict=True):
            head = NearestMean(cosine=True).head(text.moments(by_class=True, unit=True))
            rows.append(tuple(share_right(head, query, True) for query in queries))
        return CrossDomainAccuracy(stages.names, tuple(rows))
