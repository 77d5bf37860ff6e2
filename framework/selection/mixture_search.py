"""The search of CLIMB: mixtures that are tried, a regression on how they did, and further ones where it expects much.

Source: Diao et al., "CLIMB: CLustering-based Iterative Data Mixture Bootstrapping for Language Model Pre-training",
2025, arXiv 2504.13161: rounds of proxies, gradient-boosted trees on those of all rounds, the best predicted mixtures as
a pool of which the next round is drawn at random, and the best prediction as the answer. Sizes, limits and settings of
the trees are those of the code that its authors published. Different here: later rounds are drawn around the same prior
as the first and within the same limits, where that code draws around the natural one without any, so that small
groups hardly rise; draws beyond the limits are moved and not rejected; trees have no L1 penalty, which those of
scikit-learn lack; and the answer is tried as well.

Shapes: M mixtures, G groups.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr
from sklearn.ensemble import HistGradientBoostingRegressor

from lightspan.selection.mixtures import GRID, distinct, drawn_mixtures

Losses = Callable[[np.ndarray], np.ndarray]
"""Steps of mixtures [M G] -> float64 [M], of which less is better."""
POOL = 128
FOLDS = 5
TREES, RATE, PATIENCE = 1000, 0.01, 20


def boosted_trees(steps_MG: np.ndarray, loss_M: np.ndarray, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """A regression from mixtures to losses, by gradient-boosted trees of depth 4.

    A tenth of 20 or more mixtures tells where further trees no longer help; of fewer all are fitted.
    """
    enough = len(loss_M) >= PATIENCE
    trees = HistGradientBoostingRegressor(
        learning_rate=RATE,
        max_iter=TREES,
        max_depth=4,
        min_samples_leaf=min(5, max(1, len(loss_M) // 4)),
        l2_regularization=1.0,
        early_stopping=enough,
        validation_fraction=0.1 if enough else None,
        n_iter_no_change=PATIENCE,
        tol=0.0,
        random_state=seed,
    )
    # The penalty and the tolerance are of losses of variance 1.
    middle, spread = loss_M.mean(), loss_M.std() or 1.0
    trees.fit(steps_MG / GRID, (loss_M - middle) / spread)
    return lambda asked_MG: trees.predict(asked_MG / GRID) * spread + middle


@dataclass(frozen=True)
class Searched:
    """What a search tried.

    Attributes:
        steps_MG: mixtures in the order in which they were tried; the last is the predictor's best.
        loss_M: of each.
    """

    steps_MG: np.ndarray
    loss_M: np.ndarray

    @property
    def best(self) -> int:
        """The first of the least loss."""
        return int(self.loss_M.argmin())


def climbed(
    prior_G: np.ndarray,
    losses: Losses,
    rounds: Sequence[int],
    repeats: float,
    temper: float,
    candidates: int,
    seed: int,
) -> Searched:
    """Rounds of so many mixtures each, and the one that is predicted to be best.

    The mixtures of a round are a function of seed and losses before it. A mixture is tried once; where the grid has no
    further ones, a round is smaller.

    Args:
        prior_G: above 0, with a sum of 1: the natural shares.
        losses: called once a round.
        candidates: mixtures whose loss is predicted in each round.
        repeats, temper: as in `lightspan.selection.mixtures.drawn_mixtures`.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 60])))

    def drawn(count: int) -> np.ndarray:
        return drawn_mixtures(prior_G, count, repeats, temper, generator)

    steps_MG = drawn(rounds[0])
    loss_M = losses(steps_MG)
    for count in (*rounds[1:], 1):
        asked_MG = without(drawn(candidates), steps_MG)
        if not len(asked_MG):
            break
        order = np.argsort(boosted_trees(steps_MG, loss_M, seed)(asked_MG), kind="stable")
        pool = order[:1] if count == 1 else generator.permutation(order[: max(count**2, POOL)])[:count]
        loss_M = np.concatenate([loss_M, losses(asked_MG[pool])])
        steps_MG = np.concatenate([steps_MG, asked_MG[pool]])
    return Searched(steps_MG, loss_M)


def without(steps_MG: np.ndarray, others_MG: np.ndarray) -> np.ndarray:
    """Those that are not among others."""
    return distinct(np.concatenate([others_MG, steps_MG]))[len(others_MG) :]


def rank_correlation(steps_MG: np.ndarray, loss_M: np.ndarray, seed: int) -> float:
    """Spearman's, in [-1, 1], of losses and what the predictor says of them when it is fitted on other mixtures; 0 for
    losses or predictions that are all equal, and for fewer than `FOLDS` mixtures.
    """
    fold_M = np.random.Generator(np.random.PCG64(seed)).permutation(len(loss_M)) % FOLDS
    said_M = np.zeros(len(loss_M))
    if len(loss_M) < FOLDS or np.ptp(loss_M) == 0:
        return 0.0
    for fold in range(FOLDS):
        known_M = fold_M != fold
        said_M[~known_M] = boosted_trees(steps_MG[known_M], loss_M[known_M], seed)(steps_MG[~known_M])
    return 0.0 if np.ptp(said_M) == 0 else float(spearmanr(loss_M, said_M).statistic)
