"""Clusters of rows or of a graph, and how well they match known classes: scikit-learn's and SciPy's, in one place.

Shapes: N rows, D features, K clusters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.results import Figure, Result
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.labels import require_labels


def matched_accuracy(cluster_N: Tensor, label_N: Tensor) -> float:
    """Share of rows whose cluster is matched to their class, in [0, 1], with the best one-to-one matching of clusters
    and classes (Hungarian algorithm). With more clusters than classes, rows in the others count as wrong.
    """
    _require_pair(cluster_N, label_N)
    shared_CK = contingency_matrix(_array(label_N), _array(cluster_N))
    return float(shared_CK[linear_sum_assignment(-shared_CK)].sum() / len(label_N))


def agreement(cluster_N: Tensor, label_N: Tensor) -> dict[str, float]:
    """`accuracy` as above; `nmi`, the normalised mutual information in [0, 1]; `ari`, the adjusted Rand index, in
    [-0.5, 1]. Raises: UserError without rows, or for labels that are not one whole number from 0 for each.
    """
    accuracy = matched_accuracy(cluster_N, label_N)
    pair = _array(label_N), _array(cluster_N)
    return {
        "accuracy": accuracy,
        "nmi": float(normalized_mutual_info_score(*pair)),
        "ari": float(adjusted_rand_score(*pair)),
    }


def renumbered(cluster_N: Tensor, before_N: Tensor) -> Tensor:
    """The same clusters, int64 [N], under the numbers that overlap most with those before (Hungarian algorithm).

    Args:
        cluster_N, before_N: int64 >= 0 of the same rows. Numbers that only one of them has are matched to what is left.
    """
    if not len(cluster_N):
        return cluster_N
    count = int(torch.stack([cluster_N, before_N]).max()) + 1
    shared_KK = torch.zeros(count, count, dtype=torch.int64)
    ones_N = torch.ones(len(cluster_N), dtype=torch.int64)
    shared_KK.index_put_((cluster_N.cpu(), before_N.cpu()), ones_N, accumulate=True)
    number_K = torch.from_numpy(linear_sum_assignment(-shared_KK.numpy())[1])
    return number_K.to(cluster_N.device)[cluster_N]


def kmeans(x_ND: Tensor, clusters: int, seed: int = 0, starts: int = 10) -> Tensor:
    """The cluster of each row, int64 [N], the best of so many starts by k-means++.

    Raises: UserError for fewer rows than clusters, or rows that have no feature or are not finite.
    """
    _require_enough(x_ND, clusters)
    found = KMeans(clusters, n_init=starts, random_state=seed).fit_predict(_array(x_ND.double()))
    return torch.from_numpy(found.astype(np.int64))


def spectral(affinity_NN: Tensor, clusters: int, seed: int = 0) -> Tensor:
    """The cluster of each node of a graph, int64 [N], by normalised spectral clustering. It takes O(N^2) memory.

    Args:
        affinity_NN: weights >= 0; only their symmetric part counts.
    Raises: UserError as `kmeans`.
    """
    _require_enough(affinity_NN, clusters)
    symmetric_NN = _array((affinity_NN + affinity_NN.T).double() / 2)
    return _fitted(SpectralClustering(clusters, affinity="precomputed", random_state=seed), symmetric_NN)


def spectral_of_neighbours(x_ND: Tensor, clusters: int, neighbours: int = 10, seed: int = 0) -> Tensor:
    """`spectral` on the graph that joins each row to its nearest ones, at most N - 1 `neighbours`."""
    _require_enough(x_ND, clusters)
    near = min(neighbours, len(x_ND))
    model = SpectralClustering(clusters, affinity="nearest_neighbors", n_neighbors=near, random_state=seed)
    return _fitted(model, _array(x_ND.double()))


def _fitted(model: SpectralClustering, given: np.ndarray) -> Tensor:
    # Of less than K + 1 nodes the eigenvectors cannot be had, and each is a cluster.
    if len(given) <= model.n_clusters:
        return torch.arange(len(given))
    return torch.from_numpy(model.fit_predict(given).astype(np.int64))


def _require_pair(cluster_N: Tensor, label_N: Tensor) -> None:
    if not len(label_N):
        raise UserError("clusters of no rows agree with nothing; give at least one row")
    for what, column in (("clusters", cluster_N), ("classes", label_N)):
        require_labels(f"the agreement of {what}", label_N, column)


def _require_enough(x_ND: Tensor, clusters: int) -> None:
    if not 1 <= clusters <= len(x_ND):
        raise UserError(f"clusters={clusters} is outside [1, {len(x_ND)}], the rows to cluster; lower it or give more")
    if not x_ND.shape[1]:
        raise UserError("rows without a feature have no clusters; give at least one feature")
    if not x_ND.isfinite().all():
        raise UserError("features contain NaN or infinite values, which belong to no cluster; the model has diverged")


def _array(x: Tensor) -> Any:
    return x.detach().cpu().numpy()


@dataclass(frozen=True)
class ClusterAgreement(Result):
    """How well clusters match classes, see `lightspan.evaluation.geometry.clustering.agreement`. `tensors` has the
    `cluster` of each row.
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
        _require_valid("KMeansClusters", clusters, seed)
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
        _require_valid("SpectralClusters", clusters, seed)
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


def _require_valid(name: str, clusters: int | None, seed: int) -> None:
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
