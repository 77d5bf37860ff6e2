"""Clusters of frozen features, and how well they match the classes: what deep clustering is measured against."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lightspan.analysis.clustering import agreement, kmeans, spectral_of_neighbours
from lightspan.errors import UserError
from lightspan.estimators.estimator import Estimator
from lightspan.features.features import Features
from lightspan.results import Figure, Result


@dataclass(frozen=True)
class ClusterAgreement(Result):
    """How well clusters match classes, see `lightspan.analysis.clustering.agreement`. `tensors` has the `cluster` of
    each row.
    """

    accuracy: float
    nmi: float
    ari: float
    clusters: int
    rows: int

    def figures(self) -> tuple[Figure, ...]:
        return (
            Figure("accuracy with the best matching", 100 * self.accuracy, "%"),
            Figure("normalised mutual information", self.nmi),
            Figure("adjusted Rand index", self.ari),
            Figure("clusters", self.clusters),
            Figure("rows", self.rows),
        )


class KMeansClusters(Estimator):
    """k-means, the best of 10 starts, by scikit-learn.

    Args:
        clusters: at least 1; None takes as many as there are classes.
        seed: of the starts.
    """

    def __init__(self, clusters: int | None = None, seed: int = 0) -> None:
        _require_sound("KMeansClusters", clusters, seed)
        self.clusters, self.seed = clusters, seed

    def fit(self, features: Features) -> ClusterAgreement:
        """Raises: UserError for fewer rows than clusters, rows that are not finite, and features without classes."""
        return _clustered(features, self.clusters, lambda x_ND, count: kmeans(x_ND, count, self.seed))


class SpectralClusters(Estimator):
    """Normalised spectral clustering of the graph of nearest neighbours, by scikit-learn; O(N^2) memory.

    Args:
        clusters: at least 1; None takes as many as there are classes.
        neighbours: of each row in the graph, at least 1.
        seed: of the k-means in it.
    """

    def __init__(self, clusters: int | None = None, neighbours: int = 10, seed: int = 0) -> None:
        _require_sound("SpectralClusters", clusters, seed)
        if neighbours < 1:
            raise UserError(f"SpectralClusters neighbours={neighbours} must be at least 1")
        self.clusters, self.neighbours, self.seed = clusters, neighbours, seed

    def fit(self, features: Features) -> ClusterAgreement:
        """Raises: UserError as `KMeansClusters`."""
        return _clustered(
            features,
            self.clusters,
            lambda x_ND, count: spectral_of_neighbours(x_ND, count, self.neighbours, self.seed),
        )


def _require_sound(name: str, clusters: int | None, seed: int) -> None:
    if clusters is not None and clusters < 1:
        raise UserError(f"{name} clusters={clusters} must be at least 1, or null for the number of classes")
    if not 0 <= seed < 2**32:
        raise UserError(f"{name} seed={seed} must be in [0, 2^32)")


def _clustered(features: Features, clusters: int | None, cluster: Callable[[Tensor, int], Tensor]) -> ClusterAgreement:
    label_N = features.classes()
    count = len(label_N.unique()) if clusters is None else clusters
    found_N = cluster(features.rows(), count)
    scores = agreement(found_N, label_N)
    return ClusterAgreement(**scores, clusters=count, rows=len(label_N), tensors={"cluster": found_N})
