"""How far apart two sets of features are."""

from dataclasses import dataclass

from lightspan.core.errors import UserError
from lightspan.core.results import Figure, Result
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.geometry.frechet import gaussian_distance


@dataclass(frozen=True)
class Distance(Result):
    """The distance between two sets, and how many rows each had: distances between small sets are too large."""

    distance: float
    first_rows: int
    second_rows: int

    def figures(self) -> tuple[Figure, ...]:
        return (
            Figure("Fréchet distance", self.distance),
            Figure("rows of first", self.first_rows),
            Figure("rows of second", self.second_rows),
        )


class FrechetDistance(Estimator):
    """The Fréchet distance between two sets as Gaussians, from one pass over each and over all ranks."""

    def fit(self, first: Features, second: Features) -> Distance:
        """Raises: UserError for fewer than 2 rows, different widths, or features that are not finite."""
        if first.rows().shape[1] != second.rows().shape[1]:
            raise UserError(
                f"FrechetDistance: {first.rows().shape[1]} features in first and {second.rows().shape[1]} in second; "
                "take both from the same encoder"
            )
        a, b = first.moments(), second.moments()
        value = gaussian_distance(a.mean_CD[0], a.covariance(), b.mean_CD[0], b.covariance())
        return Distance(value, a.count, b.count)
