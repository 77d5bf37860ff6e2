"""CLIMB: a mixture of data without any labels of domains, found by small models that are trained on mixtures.

Source: Diao et al., "CLIMB: CLustering-based Iterative Data Mixture Bootstrapping for Language Model Pre-training",
2025, arXiv 2504.13161. Samples are embedded, k-means and then Ward's linkage of the centroids divide them into groups,
and a search over the shares of groups looks for the least loss on a target; what the search does, see
`lightspan.selection.mixture_search`. Different here: a group's natural share is that of its samples, as an epoch counts
them, and not of its tokens; how many groups there are is set, where the paper cuts at a height; and texts are not rated
for quality and groups of poor ones not left out, for want of such raters.

Shapes: N samples, K clusters, G groups, M mixtures, F seeds.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in, require_numbers
from lightspan.datamodules.loading.selection import DataSelection
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.geometry.clustering import kmeans
from lightspan.selection.design import design_matrix
from lightspan.selection.mixture_search import climbed, rank_correlation
from lightspan.selection.mixtures import GRID
from lightspan.selection.proxies import MixtureLosses
from lightspan.selection.selected import NamedSamples, SelectedData

FRESH_SEEDS = 3
"""Of proxies that the search has not seen: the best of many is also the luckiest, and its loss there tells nothing."""
TOLD_APART = 2.0
"""Standard deviations of a proxy's loss by which a mixture has to be better than the natural one."""


def merged_clusters(x_ND: Tensor, clusters: int, groups: int, seed: int) -> np.ndarray:
    """The group of each row, int64 [N], from 0 up, the largest first: k-means, of whose centroids the nearest are
    joined by Ward's linkage until there are so many groups.

    Equal rows are in one group, so that there may be fewer.

    Raises: UserError for fewer rows than clusters, or rows that are not finite.
    """
    cluster_N = kmeans(x_ND, clusters, seed, starts=3).numpy()
    names_K, cluster_N = np.unique(cluster_N, return_inverse=True)
    if len(names_K) > 1:
        x = x_ND.double().numpy()
        centroid_KD = np.stack([x[cluster_N == number].mean(axis=0) for number in range(len(names_K))])
        cluster_N = fcluster(linkage(centroid_KD, "ward"), groups, criterion="maxclust")[cluster_N]
    _, group_N, size_G = np.unique(cluster_N, return_inverse=True, return_counts=True)
    place_G = np.argsort(np.argsort(-size_G, kind="stable"))
    return place_G[group_N].astype(np.int64)


class ClimbMixture(Estimator):
    """Finds shares of clusters of samples with which small models do best on a target.

    The selection is a mixture: the best that was tried, the predictor's last answer among them, if the natural shares
    are not as good; else the natural shares. That is decided by three proxies of each with seeds that the search has
    not seen, and by the part of the target that it sees: their mean loss has to be lower by two standard deviations of
    a proxy's. Figures are theirs on the other part.

    Args:
        rounds: proxies of each round; one for the last answer, three more for the best, and four on natural and equal
            shares come on top.
        clusters: K of k-means, at most the number of samples.
        groups: G, at most K.
        components: embeddings are reduced to their strongest principal components first; None keeps all.
        repeats: a group's share is at most so many times its natural one, above 1. It bounds how often an epoch repeats
            a sample; lower it for runs of many epochs.
        temper: in [0, 1], how far mixtures are drawn around the natural shares (1) or equal ones (0).
        candidates: mixtures that are predicted in each round.
        seed: of clusters, mixtures and proxies.
    Raises: UserError for settings out of range.
    """

    def __init__(
        self,
        rounds: Sequence[int] = (64, 32, 16),
        clusters: int = 100,
        groups: int = 16,
        components: int | None = 50,
        repeats: float = 15.0,
        temper: float = 0.5,
        candidates: int = 100_000,
        seed: int = 0,
    ) -> None:
        if not rounds:
            raise UserError("rounds=[] trains no proxy; give the number of proxies of each round")
        require_in("[2, inf)", rounds=list(rounds))
        require_in("[1, inf)", clusters=clusters, components=components, candidates=candidates)
        require_in(f"[1, {clusters}]", groups=groups)
        require_in("(1, inf)", repeats=repeats)
        require_in("[0, 1]", temper=temper)
        require_in("[0, 4294967295]", seed=seed)  # of scikit-learn
        require_numbers(4 * candidates * groups, candidates=candidates, groups=groups)
        self.rounds, self.clusters, self.groups, self.components = tuple(rounds), clusters, groups, components
        self.repeats, self.temper, self.candidates, self.seed = repeats, temper, candidates, seed

    def fit(self, features: Features, samples: NamedSamples, proxy: MixtureLosses) -> SelectedData:
        """Raises: UserError for features that are not of all samples, or not finite."""
        if len(samples.places(features)) < samples.count:
            raise UserError(
                f"{len(features):,} features are not of all {samples.count:,} training samples, and a mixture needs "
                "the group of each; take the features of the split `bank`"
            )
        group_N = merged_clusters(
            design_matrix(features, self.components, constant=False), self.clusters, self.groups, self.seed
        )
        prior_G = np.bincount(group_N) / samples.count
        rule = f"CLIMB, rounds of {', '.join(map(str, self.rounds))} proxies, seed {self.seed}"

        def mixed(share_G: np.ndarray) -> DataSelection:
            return DataSelection(samples.count, samples.name, rule, group_N=group_N, mixture_G=share_G)

        def losses(steps_MG: np.ndarray) -> np.ndarray:
            return proxy.of([mixed(share_G) for share_G in steps_MG / GRID], [self.seed] * len(steps_MG))[:, 0]

        natural, equal = mixed(prior_G), mixed(np.full(len(prior_G), 1 / len(prior_G)))
        fresh = [self.seed + 1 + number for number in range(FRESH_SEEDS)]
        plain_M2 = proxy.of([natural] * FRESH_SEEDS + [equal], [*fresh, fresh[0]])
        natural_F2 = plain_M2[:FRESH_SEEDS]
        found = climbed(prior_G, losses, self.rounds, self.repeats, self.temper, self.candidates, self.seed)
        best = mixed(found.steps_MG[found.best] / GRID)
        best_F2 = proxy.of([best] * FRESH_SEEDS, fresh)
        noise = math.sqrt(np.mean([one_F2[:, 0].var(ddof=1) for one_F2 in (natural_F2, best_F2)]))
        natural_2, best_2 = natural_F2.mean(axis=0), best_F2.mean(axis=0)
        better = bool(best_2[0] < natural_2[0] - TOLD_APART * noise)
        chosen = best if better else natural
        measured = {
            "loss on held-out target samples": best_2[1] if better else natural_2[1],
            "the same, natural mixture": natural_2[1],
            "the same, equal shares": plain_M2[-1, 1],
            "better than the natural mixture, beyond noise": int(better),
            "standard deviation of a proxy": noise,
            "rank correlation of the predictor": rank_correlation(found.steps_MG, found.loss_M, self.seed),
            "mixtures tried": len(found.loss_M),
            "groups": len(prior_G),
        }
        return SelectedData.of(chosen, samples, measured)
