"""CLIMB (arXiv 2504.13161) on code and docstrings of Python's standard library, for docstrings of other files.

The pool is 200 files in pieces of 500 bytes, of which about one in six is of docstrings, in ten groups of an embedding
by n-grams that knows neither; a proxy is a smoothed model of three bytes in a row, trained on 200,000 bytes of a
mixture. 16, 8 and 4 proxies and one for the answer are searched by half of the target's pieces, and the figure is the
loss on the other half, in nats a byte, of eight proxies that are trained anew, with seeds that no search has seen, so
that no arm is paid for lucky draws. The baseline is the natural mixture; beside it stands the best of as many random
mixtures, drawn in the same way. Floor: all groups alike, and a predictor that is fitted on losses of other mixtures.
Ceiling: the best of 400 random mixtures by the reported half itself, and in place of predictions the losses of proxies
with another seed.

The control is a target like the pool, pieces of the files held out of both kinds: nothing is to be gained there, and
the search has to say so or to lose nothing.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
from scipy.stats import spearmanr

from lightspan.backbones.ngram_counts import NgramCounts
from lightspan.datamodules.loading.selection import DataSelection
from lightspan.datamodules.text.forms import Padded
from lightspan.datamodules.text.library import LibraryTexts
from lightspan.evaluation.features.encoded import Encoded
from lightspan.evaluation.features.store import FeatureStore
from lightspan.selection.climb import merged_clusters
from lightspan.selection.design import design_matrix
from lightspan.selection.mixture_search import Searched, boosted_trees, climbed
from lightspan.selection.mixtures import GRID, drawn_mixtures
from lightspan.selection.proxies import TrainedOn
from lightspan.selection.trigrams import TrigramProxy

SEEDS, SEARCH_SEED = (0, 1, 2, 3, 4), 100
ROUNDS, CANDIDATES, REPEATS, TEMPER = (16, 8, 4), 20_000, 15.0, 0.5
TOKENS = 200_000
CLUSTERS, GROUPS, COMPONENTS = 50, 10, 50
MANY, FRESH = 400, 60
OTHER = 1000  # added to a seed where losses are reported: proxies that no search has seen
ANEW, SHORT_LIST = 8, 20
UNTRAINED = float(np.log(256))


def texts(parts: tuple) -> LibraryTexts:
    return LibraryTexts(parts, files=200, val_fraction=0.25, batch_size=64, form=Padded(500))


@cache
def embedded() -> torch.Tensor:
    features = Encoded(NgramCounts(), texts(("code", "docstrings"))).load(FeatureStore(Path(mkdtemp())))
    return design_matrix(features, COMPONENTS, constant=False)


@cache
def proxy(parts: tuple) -> TrainedOn:
    return TrigramProxy(texts(("code", "docstrings")), texts(parts), tokens=TOKENS).trained_on()


@dataclass(frozen=True)
class World:
    """Groups by a seed, and the losses of mixtures over them."""

    group_N: np.ndarray
    parts: tuple
    seed: int

    @classmethod
    def of(cls, parts: tuple, seed: int) -> "World":
        return cls(merged_clusters(embedded(), CLUSTERS, GROUPS, seed), parts, seed)

    @property
    def prior_G(self) -> np.ndarray:
        return np.bincount(self.group_N) / len(self.group_N)

    def losses(self, share_MG: np.ndarray, seed: int) -> np.ndarray:
        """Searched and reported, [M 2]."""
        count, train = len(self.group_N), proxy(self.parts).losses
        mixed = [DataSelection(count, "", "", group_N=self.group_N, mixture_G=share_G) for share_G in share_MG]
        return np.array([train(each, seed) for each in mixed])

    def searched(self, steps_MG: np.ndarray) -> np.ndarray:
        return self.losses(steps_MG / GRID, self.seed)[:, 0]

    def reported(self, share_G: np.ndarray) -> float:
        seeds = range(self.seed + OTHER, self.seed + OTHER + 100 * ANEW, 100)
        return float(np.mean([self.losses(share_G[None], seed)[0, 1] for seed in seeds]))

    def drawn(self, count: int, stream: int) -> np.ndarray:
        return drawn_mixtures(self.prior_G, count, REPEATS, TEMPER, np.random.default_rng([self.seed, stream]))

    def climbed(self) -> Searched:
        return climbed(self.prior_G, self.searched, ROUNDS, REPEATS, TEMPER, CANDIDATES, self.seed)

    def at_random(self) -> Searched:
        steps_MG = self.drawn(sum(ROUNDS) + 1, 1)
        return Searched(steps_MG, self.searched(steps_MG))


@dataclass(frozen=True)
class Measured:
    """Reported losses by arm, what the search gained on its own half, and rank correlations of the predictor."""

    loss: dict[str, float]
    gained: dict[str, float]
    correlation: dict[str, float]


@cache
def measured(parts: tuple, seed: int) -> Measured:
    world = World.of(parts, seed)
    prior_G = world.prior_G
    found, random = world.climbed(), world.at_random()
    many_MG = world.drawn(MANY, 2)
    short = many_MG[world.losses(many_MG / GRID, seed + OTHER)[:, 1].argsort()[:SHORT_LIST]]
    oracle = min(short, key=lambda steps_G: world.reported(steps_G / GRID))
    natural = float(world.losses(prior_G[None], seed)[0, 0])
    shares = {
        "natural": prior_G,
        "equal": np.full(len(prior_G), 1 / len(prior_G)),
        "random": random.steps_MG[random.best] / GRID,
        "CLIMB": found.steps_MG[found.best] / GRID,
        "CLIMB, last answer untried": found.steps_MG[-1] / GRID,
        "best of many": oracle / GRID,
    }
    fresh_MG = world.drawn(FRESH, 3)
    true_M = world.searched(fresh_MG)
    shuffled_M = np.random.default_rng(seed).permutation(found.loss_M)
    said = {
        "predictor": boosted_trees(found.steps_MG, found.loss_M, seed)(fresh_MG),
        "fitted on losses of other mixtures": boosted_trees(found.steps_MG, shuffled_M, seed)(fresh_MG),
        "proxies of another seed": world.losses(fresh_MG / GRID, seed + OTHER)[:, 0],
    }
    return Measured(
        {arm: world.reported(share_G) for arm, share_G in shares.items()},
        {"random": natural - float(random.loss_M.min()), "CLIMB": natural - float(found.loss_M.min())},
        {name: float(spearmanr(true_M, said_M).statistic) for name, said_M in said.items()},
    )


DOCSTRINGS, BOTH = ("docstrings",), ("code", "docstrings")


def over_natural(arm: str, parts: tuple = DOCSTRINGS) -> dict[int, float]:
    return {seed: measured(parts, seed).loss[arm] / measured(parts, seed).loss["natural"] for seed in SEEDS}


def below_random(arm: str) -> dict[int, float]:
    """Thousandths of a nat."""
    return {s: 1000 * (measured(DOCSTRINGS, s).loss["random"] - measured(DOCSTRINGS, s).loss[arm]) for s in SEEDS}


def test_a_search_over_mixtures_serves_a_target_of_few_samples(evidence) -> None:
    torch.set_num_threads(1)
    for seed in SEEDS:
        one = measured(DOCSTRINGS, seed)
        for arm, loss in one.loss.items():
            evidence.figure(f"loss, {arm}", loss, seed, "nats")
        for name, correlation in one.correlation.items():
            evidence.figure(f"rank correlation, {name}", correlation, seed)
    for arm in ("CLIMB", "random"):
        gained = {seed: measured(DOCSTRINGS, seed).gained[arm] for seed in SEEDS}
        evidence.gate(arm, gained, dict.fromkeys(SEEDS, 0.0), by=0.02)
    trained = {seed: -measured(DOCSTRINGS, seed).loss["natural"] for seed in SEEDS}
    evidence.gate("proxy", trained, dict.fromkeys(SEEDS, -UNTRAINED), by=2.0)
    evidence.claim(
        "loss of CLIMB over the natural mixture",
        over_natural("CLIMB"),
        at_most=0.97,
        floor=over_natural("equal"),
        ceiling=over_natural("best of many"),
        arms=("CLIMB", "proxy"),
    )
    for seed, thousandths in below_random("CLIMB").items():
        evidence.figure("CLIMB below the best of as many random mixtures", thousandths, seed, "millinats")
    for seed, thousandths in below_random("best of many").items():
        evidence.figure("best of many below the best of as many random mixtures", thousandths, seed, "millinats")
    evidence.note(
        "No margin is set for CLIMB against random mixtures: on search seeds the best of 400 was 0.5 to 18 thousandths "
        "of a nat better than the best of 29, so that such a margin could not be kept by anything. With 20 or 30 "
        "groups and the same 29 proxies, where random mixtures leave more to be found, the predictor has too few "
        "mixtures and CLIMB was the worse one about as often as the better one."
    )
    evidence.claim(
        "rank correlation of the predictor on fresh mixtures",
        {seed: measured(DOCSTRINGS, seed).correlation["predictor"] for seed in SEEDS},
        at_least=0.5,
        floor={seed: measured(DOCSTRINGS, seed).correlation["fitted on losses of other mixtures"] for seed in SEEDS},
        ceiling={seed: measured(DOCSTRINGS, seed).correlation["proxies of another seed"] for seed in SEEDS},
        arms=("proxy",),
    )


def test_a_target_like_the_pool_gains_nothing(evidence) -> None:
    torch.set_num_threads(1)
    for seed in SEEDS:
        one = measured(BOTH, seed)
        for arm, loss in one.loss.items():
            evidence.figure(f"loss on both kinds, {arm}", loss, seed, "nats")
    evidence.note(
        "On a target of both kinds, in the shares of the pool, CLIMB is expected to gain next to nothing over the "
        "natural mixture, and so is any other search."
    )


if __name__ == "__main__":
    for search_seed in (SEARCH_SEED, SEARCH_SEED + 1, SEARCH_SEED + 2):
        print(measured(DOCSTRINGS, search_seed))
    print(measured(BOTH, SEARCH_SEED))
