"""Discriminant analysis with texts on classes of which there are images, and on new ones of which there are none.

Source: Wang et al., "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation" (GDA-CLIP), ICLR 2024,
arXiv 2402.04087; what is done for new classes as its authors' code has it (`analysis.closed_form.new_class_head`).
"""

import math
from dataclasses import dataclass
from statistics import harmonic_mean

from lightspan.core.errors import UserError
from lightspan.core.results import Figure, Result
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.gaussians.closed_form import (
    Discriminant,
    EmpiricalBayes,
    NearestMean,
    Precision,
    chosen_alpha,
    combined_head,
    new_class_head,
    share_right,
)
from lightspan.evaluation.rows import unit_rows


@dataclass(frozen=True)
class BaseToNewAccuracy(Result):
    """Shares of the query's rows that are classified right: of base classes among these, of new ones among those, by
    both together and by the text alone.
    """

    base: float
    new: float
    base_text: float
    new_text: float
    alpha: float
    base_rows: int
    new_rows: int

    def figures(self) -> tuple[Figure, ...]:
        return (
            Figure("accuracy on base classes", 100 * self.base, "%"),
            Figure("accuracy on new classes", 100 * self.new, "%"),
            Figure("harmonic mean", 100 * harmonic_mean([self.base, self.new]), "%"),
            Figure("accuracy of the text head on base classes", 100 * self.base_text, "%"),
            Figure("accuracy of the text head on new classes", 100 * self.new_text, "%"),
            Figure("alpha", self.alpha),
            Figure("query rows of base classes", self.base_rows),
            Figure("query rows of new classes", self.new_rows),
        )


class GDABaseToNew(Estimator):
    """`GDAWithText` where only some classes have images. Base classes are those of the bank, new ones the others that
    the texts describe; alpha is chosen on the base classes of `val` and serves both.

    Args:
        scale, precision: as in `lightspan.evaluation.gaussians.closed_form.GDAWithText`.
        neighbours: images nearest to the text of a new class that stand for its own, at least 1.
        copies: of the text among them, when their mean is taken, at least 0.
    """

    def __init__(
        self, scale: float = 100.0, neighbours: int = 64, copies: int = 16, precision: Precision | None = None
    ) -> None:
        for name, value, least in (("neighbours", neighbours, 1), ("copies", copies, 0)):
            if value < least:
                raise UserError(f"GDABaseToNew {name}={value} must be at least {least}")
        if not 0 < scale < math.inf:
            raise UserError(f"GDABaseToNew scale={scale} must be finite and above 0")
        self.scale, self.neighbours, self.copies = scale, neighbours, copies
        self.precision = precision or EmpiricalBayes()

    def fit(self, bank: Features, val: Features, query: Features, text: Features) -> BaseToNewAccuracy:
        """Raises: UserError as `GDAWithText`, and without a new class or a test row of either kind."""
        base = bank.classes().unique().tolist()
        new = sorted(set(text.classes().tolist()) - set(base))
        if not new:
            raise UserError("the texts describe no class beside those of the bank; give new classes a text")
        base_text, new_text = (
            NearestMean(cosine=True).head(text.of_classes(part).moments(by_class=True, unit=True))
            for part in (base, new)
        )
        base_images = Discriminant(self.precision).head(bank.moments(by_class=True, unit=True))
        new_images = new_class_head(
            unit_rows(bank.rows()), new_text.weight_DC.T, new_text.class_C, self.neighbours, self.copies, self.precision
        )
        alpha = chosen_alpha(self.scale, base_text, base_images, val.of_classes(base))
        ofs = query.of_classes(base), query.of_classes(new)
        return BaseToNewAccuracy(
            base=share_right(combined_head(self.scale, base_text, alpha, base_images), ofs[0], True),
            new=share_right(combined_head(self.scale, new_text, alpha, new_images), ofs[1], True),
            base_text=share_right(base_text, ofs[0], True),
            new_text=share_right(new_text, ofs[1], True),
            alpha=alpha,
            base_rows=len(ofs[0]),
            new_rows=len(ofs[1]),
        )
