"""Mixtures, the search over them and its proxies, against planted optima, loops and independent implementations."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_processes
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import LightningModule
from scipy.optimize import minimize
from scipy.stats import spearmanr
from sklearn.cluster import AgglomerativeClustering
from sklearn.ensemble import HistGradientBoostingRegressor
from torch import Tensor, nn

from lightspan.backbones.ngram_counts import NgramCounts
from lightspan.core.errors import UserError
from lightspan.datamodules.loading.sample_sets import SampleSets
from lightspan.datamodules.loading.selection import DataSelection
from lightspan.datamodules.text.forms import Padded
from lightspan.datamodules.text.library import LibraryTexts
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.features.store import FeatureStore
from lightspan.selection.climb import ClimbMixture, merged_clusters
from lightspan.selection.mixture_search import boosted_trees, climbed, rank_correlation
from lightspan.selection.mixtures import GRID, STRENGTHS, caps, drawn_mixtures, stepped
from lightspan.selection.proxies import Losses, MixtureLosses, TrainedOn
from lightspan.selection.sampling import allocated
from lightspan.selection.selected import NamedSamples, TrainingSamples
from lightspan.selection.trained_proxies import TrainedProxy
from lightspan.selection.trigrams import TokenWindows, TrigramModel, TrigramProxy

# Mixtures


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), groups=st.integers(1, 12), repeats=st.floats(1.5, 20), temper=st.floats(0, 1))
def test_mixtures_are_different_on_the_grid_and_within_their_limits(
    seed: int, groups: int, repeats: float, temper: float
) -> None:
    generator = np.random.default_rng(seed)
    prior_G = generator.dirichlet(np.full(groups, 5.0))
    steps_MG = drawn_mixtures(prior_G, 20, repeats, temper, generator)
    assert (steps_MG.sum(axis=1) == GRID).all()
    assert (steps_MG >= 0).all()
    assert (steps_MG <= np.maximum(repeats * GRID * prior_G, np.ceil(GRID * prior_G))).all()
    assert len(np.unique(steps_MG, axis=0)) == len(steps_MG)
    assert np.abs((steps_MG / GRID).sum(axis=1) - 1).max() < 1e-9


def test_shares_are_rounded_to_the_grid_by_largest_remainders() -> None:
    share_MG = np.random.default_rng(0).dirichlet(np.full(7, 0.3), size=50)
    assert stepped(share_MG).tolist() == [allocated(share_G, GRID).tolist() for share_G in share_MG]
    assert stepped(np.array([[3.0, 0.0, 1.0]])).tolist() == [[GRID * 3 // 4, 0, GRID // 4]]


def test_temper_moves_the_centre_of_the_draws_from_the_natural_shares_to_equal_ones() -> None:
    prior_G = np.array([0.6, 0.3, 0.1])
    for temper, centre_G in ((1.0, prior_G), (0.0, np.full(3, 1 / 3))):
        steps_MG = drawn_mixtures(prior_G, 4000, 1000, temper, np.random.default_rng(0))
        assert (steps_MG / GRID).mean(axis=0) == pytest.approx(centre_G, abs=0.07)


# The search


def quadratic(seed: int, groups: int = 6) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Natural shares, and 2 + |w - target|^2 + 0.3 c w of steps, without noise."""
    generator = np.random.default_rng(seed)
    prior_G, cost_G = generator.dirichlet(np.full(groups, 3)), generator.random(groups)
    target_G = generator.dirichlet(np.ones(groups))
    return prior_G, lambda w: 2 + np.square(w / GRID - target_G).sum(axis=-1) + 0.3 * (w / GRID) @ cost_G


SMALL: dict[str, Any] = {"rounds": (48, 24, 12), "repeats": 5.0, "temper": 0.5, "candidates": 5000}


def test_the_answer_is_within_a_hundredth_of_a_planted_optimum_and_better_than_as_many_random_mixtures() -> None:
    for seed in (0, 1):
        prior_G, loss = quadratic(seed)
        within = minimize(
            lambda w, loss=loss: float(loss(GRID * w)),
            prior_G,
            bounds=[(0, most) for most in np.minimum(1, SMALL["repeats"] * prior_G)],
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        ).fun
        found = climbed(prior_G, loss, **SMALL, seed=seed)
        assert within <= found.loss_M[found.best] <= 1.01 * within
        assert found.loss_M.tolist() == loss(found.steps_MG).tolist()
        assert (found.steps_MG <= caps(prior_G, SMALL["repeats"])).all()
        assert len(np.unique(found.steps_MG, axis=0)) == 48 + 24 + 12 + 1
        at_random = [
            loss(drawn_mixtures(prior_G, 85, SMALL["repeats"], 0.5, np.random.default_rng(s))).min() for s in range(9)
        ]
        assert found.loss_M[found.best] < np.median(at_random)


@pytest.mark.usefixtures("few_trees")
def test_an_answer_that_is_tried_is_no_worse_than_the_best_of_the_rounds() -> None:
    """The predictor's best alone may be: the case in which the method without its last proxy loses."""
    worse = 0
    for seed in range(4):
        prior_G, loss = quadratic(seed)
        found = climbed(prior_G, loss, (8, 4), 5.0, 0.5, 300, seed)
        assert found.loss_M[found.best] == found.loss_M.min()
        worse += found.loss_M[-1] > found.loss_M[:-1].min()
    assert worse


@pytest.mark.usefixtures("few_trees")
def test_a_search_follows_from_its_seed() -> None:
    prior_G, loss = quadratic(3)
    one, two, other = (climbed(prior_G, loss, (6, 4), 5.0, 0.5, 200, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.steps_MG, two.steps_MG)
    assert not np.array_equal(one.steps_MG, other.steps_MG)


def test_the_predictor_does_not_depend_on_the_unit_of_the_loss_and_ranks_what_it_has_not_seen() -> None:
    prior_G, loss = quadratic(0)
    steps_MG = drawn_mixtures(prior_G, 60, 5.0, 0.5, np.random.default_rng(0))
    seen, rest = steps_MG[:40], steps_MG[40:]
    one, other = boosted_trees(seen, loss(seen), 0)(rest), boosted_trees(seen, 1000 * loss(seen), 0)(rest)
    assert other == pytest.approx(1000 * one, rel=1e-6)
    assert spearmanr(one, loss(rest)).statistic > 0.5
    assert rank_correlation(seen, loss(seen), 0) > 0.5
    assert rank_correlation(seen, np.ones(40), 0) == 0
    by_chance = [rank_correlation(seen, np.random.default_rng(s).permutation(loss(seen)), 0) for s in range(4)]
    assert np.mean(by_chance) < 0.3
    assert rank_correlation(seen[:4], loss(seen[:4]), 0) == 0
    assert np.isfinite(boosted_trees(seen[:2], np.ones(2), 0)(rest)).all()


def test_a_round_is_drawn_from_the_best_predicted_and_predictions_rest_on_all_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of four mixtures, from the best 128; the answer is the best of all."""
    known, asked, weight_G = list[int](), list[np.ndarray](), np.array([1.0, 0.617, 0.331, 0.127])

    def predictor(steps_MG: np.ndarray, loss_M: np.ndarray, seed: int) -> Callable[[np.ndarray], np.ndarray]:
        assert loss_M.tolist() == steps_MG[:, 1].tolist()
        known.append(len(steps_MG))
        return lambda asked_MG: (asked.append(asked_MG @ weight_G), asked[-1])[1]

    monkeypatch.setattr("lightspan.selection.mixture_search.boosted_trees", predictor)
    prior_G = np.array([0.3, 0.3, 0.2, 0.2])
    found = climbed(prior_G, lambda steps_MG: steps_MG[:, 1], (20, 4, 4), 5.0, 0.5, 1000, 0)
    assert known == [20, 24, 28]
    said_M = found.steps_MG @ weight_G
    for at, asked_M in zip((20, 24), asked, strict=False):
        ranks = [int((asked_M < said - 1e-9).sum()) for said in said_M[at : at + 4]]
        assert max(ranks) < 128
        assert max(ranks) > 8  # the best alone would not explore
    assert said_M[-1] == pytest.approx(asked[-1].min())


def test_a_large_round_is_drawn_from_the_square_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, weight_G = list[np.ndarray](), np.array([1.0, 0.617, 0.331, 0.127])

    def predictor(steps_MG: np.ndarray, loss_M: np.ndarray, seed: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda asked_MG: (asked.append(asked_MG @ weight_G), asked[-1])[1]

    monkeypatch.setattr("lightspan.selection.mixture_search.boosted_trees", predictor)
    prior_G = np.array([0.3, 0.3, 0.2, 0.2])
    found = climbed(prior_G, lambda steps_MG: steps_MG[:, 1], (2, 20), 5.0, 0.5, 2000, 0)
    ranks = [int((asked[0] < said - 1e-9).sum()) for said in found.steps_MG[2:22] @ weight_G]
    assert 128 < max(ranks) < 400


def test_the_trees_and_the_grid_are_those_of_the_published_code() -> None:
    assert 1 / GRID == 2e-4
    assert pytest.approx(STRENGTHS[[0, -1]].tolist()) == [0.1, 5]
    assert len(STRENGTHS) == 15
    settings = {"learning_rate": 0.01, "max_iter": 1000, "max_depth": 4, "l2_regularization": 1.0, "tol": 0.0}
    settings["random_state"] = 3
    generator = np.random.default_rng(0)
    for count, more in (
        (19, {"min_samples_leaf": 4, "early_stopping": False, "validation_fraction": None}),
        (40, {"min_samples_leaf": 5, "early_stopping": True, "validation_fraction": 0.1, "n_iter_no_change": 20}),
    ):
        share_MG = generator.dirichlet(np.ones(3), count)
        loss_M = generator.standard_normal(count)
        loss_M = (loss_M - loss_M.mean()) / loss_M.std()
        trees = HistGradientBoostingRegressor(**settings, **more).fit(share_MG, loss_M)
        got_M = boosted_trees(share_MG * GRID, loss_M, 3)(share_MG * GRID)
        assert got_M == pytest.approx(trees.predict(share_MG), abs=1e-6)


def test_strengths_of_draws_are_spread_evenly_by_logarithm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variance of a share is c (1 - c) / (s + 1), here of draws that are not told apart."""
    monkeypatch.setattr("lightspan.selection.mixtures.distinct", lambda steps_MG: steps_MG)
    share_MG = drawn_mixtures(np.full(4, 0.25), 20_000, 1000, 0.5, np.random.default_rng(0)) / GRID
    expected = (0.25 * 0.75 / (1 + np.geomspace(0.1, 5, 15))).mean()
    assert share_MG.var(axis=0) == pytest.approx(np.full(4, expected), rel=0.03)


def test_of_one_group_there_is_one_mixture() -> None:
    found = climbed(np.ones(1), lambda steps_MG: steps_MG[:, 0] / GRID, (4, 2), 5.0, 0.5, 10, 0)
    assert found.steps_MG.tolist() == [[GRID]]


# Groups


def blobs(groups: int = 3, rows: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.eye(groups, 5)
    return torch.cat([centres[g] + 0.1 * torch.randn(rows * (g + 1), 5, generator=generator) for g in range(groups)])


def test_groups_are_the_blobs_the_largest_first() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        group_N = merged_clusters(blobs().to(dtype), clusters=9, groups=3, seed=0)
        assert group_N.tolist() == [2] * 20 + [1] * 40 + [0] * 60


def test_clusters_are_joined_as_scikit_learn_joins_centroids() -> None:
    x_ND = torch.randn(60, 3, generator=torch.Generator().manual_seed(1))
    fine_N = merged_clusters(x_ND, 12, 12, seed=0)
    centroids = np.stack([x_ND.numpy()[fine_N == k].astype(np.float64).mean(axis=0) for k in range(12)])
    joined = AgglomerativeClustering(4, linkage="ward").fit_predict(centroids)[fine_N]
    pairs = set(zip(merged_clusters(x_ND, 12, 4, seed=0).tolist(), joined.tolist(), strict=True))
    assert len(pairs) == 4


# Losses in the store


class Counting:
    """A proxy whose loss is a function of the shares; it fails at a number of calls."""

    def __init__(self, loss: Callable[[np.ndarray, int], float], fails_at: int | None = None) -> None:
        self.loss, self.fails_at, self.calls = loss, fails_at, 0

    def __call__(self, selection: DataSelection, seed: int) -> Losses:
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        assert selection.mixture_G is not None
        value = float(self.loss(selection.mixture_G, seed))
        return Losses(value, value + 1)

    def kept_in(self, folder: Path) -> MixtureLosses:
        return MixtureLosses(TrainedOn({"kind": "counting"}, self), FeatureStore(folder))


def far_from(target_G: list[float]) -> Callable[[np.ndarray, int], float]:
    """The largest group first; a seed adds up to a thousandth."""
    return lambda w, seed: 1 + np.square(w - np.array(target_G)).sum() + 1e-3 * math.sin(seed)


@pytest.fixture
def few_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightspan.selection.mixture_search.TREES", 60)
    monkeypatch.setattr("lightspan.selection.mixture_search.RATE", 0.1)


QUICK: dict[str, Any] = {"rounds": [6, 4], "clusters": 9, "groups": 3, "candidates": 200, "components": None}
X = Features(blobs(), index_N=torch.arange(120))
OF_X = NamedSamples(120, "0" * 32, (120,))


@pytest.mark.usefixtures("few_trees")
def test_a_search_that_was_interrupted_goes_on_where_it_was_and_ends_alike(tmp_path: Path) -> None:
    whole = Counting(far_from([0.1, 0.1, 0.8]))
    expected = ClimbMixture(**QUICK).fit(X, OF_X, whole.kept_in(tmp_path / "whole"))
    for fails_at in (3, 8, 13, 17):
        stopped, resumed = (Counting(far_from([0.1, 0.1, 0.8]), at) for at in (fails_at, None))
        folder = tmp_path / str(fails_at)
        with pytest.raises(KeyboardInterrupt):
            ClimbMixture(**QUICK).fit(X, OF_X, stopped.kept_in(folder))
        found = ClimbMixture(**QUICK).fit(X, OF_X, resumed.kept_in(folder))
        assert resumed.calls == whole.calls - (fails_at - 1)
        assert found == expected
        assert torch.equal(found.tensors["mixture"], expected.tensors["mixture"])
    again = Counting(far_from([0.1, 0.1, 0.8]))
    ClimbMixture(**QUICK).fit(X, OF_X, again.kept_in(tmp_path / "whole"))
    assert again.calls == 0


def mixtures_of_x(count: int) -> list[DataSelection]:
    group_N = np.arange(120) % 3
    share_MG = np.random.default_rng(0).dirichlet(np.ones(3), size=count)
    return [DataSelection(120, OF_X.name, "", group_N=group_N, mixture_G=share_G) for share_G in share_MG]


def one_rank(index: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2)
    proxy = Counting(far_from([0.1, 0.1, 0.8]))
    found = proxy.kept_in(Path(folder, "shared")).of(mixtures_of_x(5), [0, 1, 2, 3, 4])
    Path(folder, f"{index}.json").write_text(json.dumps([found.tolist(), proxy.calls]))
    dist.destroy_process_group()


@pytest.mark.ranks
def test_ranks_share_the_proxies_and_know_all_losses(tmp_path: Path) -> None:
    rank_processes.start(one_rank, 2, str(tmp_path))
    expected = Counting(far_from([0.1, 0.1, 0.8])).kept_in(tmp_path / "own").of(mixtures_of_x(5), [0, 1, 2, 3, 4])
    for index, calls in ((0, 3), (1, 2)):
        assert json.loads(Path(tmp_path, f"{index}.json").read_text()) == [expected.tolist(), calls]


@pytest.mark.usefixtures("few_trees")
def test_a_target_of_the_smallest_group_raises_its_share(tmp_path: Path) -> None:
    found = ClimbMixture(**QUICK).fit(X, OF_X, Counting(far_from([0.1, 0.1, 0.8])).kept_in(tmp_path))
    assert found.natural == pytest.approx((3 / 6, 2 / 6, 1 / 6))
    assert found.shares[2] > 0.5
    assert found.measured["better than the natural mixture, beyond noise"] == 1
    for mixture, share_G in (("natural mixture", [3 / 6, 2 / 6, 1 / 6]), ("equal shares", [1 / 3] * 3)):
        reported = 2 + np.square(np.array(share_G) - [0.1, 0.1, 0.8]).sum()
        assert found.measured[f"the same, {mixture}"] == pytest.approx(reported, abs=1e-3)
    reported = 2 + np.square(np.array(found.shares) - [0.1, 0.1, 0.8]).sum()
    assert found.measured["loss on held-out target samples"] == pytest.approx(reported, abs=1e-3)
    assert found.measured["loss on held-out target samples"] < found.measured["the same, natural mixture"]
    assert found.selection().group_N is not None
    assert found.picture("t") is not None


@pytest.mark.usefixtures("few_trees")
def test_a_target_like_the_natural_mixture_gains_nothing_and_keeps_it(tmp_path: Path) -> None:
    """The case in which the method loses: there is nothing to find, and it says so."""
    found = ClimbMixture(**QUICK).fit(X, OF_X, Counting(far_from([3 / 6, 2 / 6, 1 / 6])).kept_in(tmp_path))
    assert found.shares == pytest.approx(found.natural)
    assert found.measured["better than the natural mixture, beyond noise"] == 0
    assert found.measured["loss on held-out target samples"] == found.measured["the same, natural mixture"]


@pytest.mark.usefixtures("few_trees")
def test_a_proxy_that_is_nothing_but_luck_finds_nothing(tmp_path: Path) -> None:
    """The best of 21 mixtures is two deviations below their mean, and the half that is reported shares its luck."""
    said = []
    for world in range(6):

        def luck(w: np.ndarray, seed: int, world: int = world) -> float:
            own = [*np.rint(w * GRID).astype(np.int64).tolist(), seed, world]
            return 2 + 0.01 * float(np.random.default_rng(own).standard_normal())

        proxy = Counting(luck).kept_in(tmp_path / str(world))
        measured = ClimbMixture(**QUICK | {"rounds": [16, 4], "candidates": 60}).fit(X, OF_X, proxy).measured
        said.append(measured["better than the natural mixture, beyond noise"])
        assert measured["loss on held-out target samples"] > 2.98
    assert sum(said) <= 1


@pytest.mark.usefixtures("few_trees")
@pytest.mark.parametrize(("gain", "better"), [(1.9, 0), (2.1, 1)])
def test_a_mixture_is_better_from_two_deviations_of_three_proxies_with_seeds_of_their_own(
    gain: float, better: int, tmp_path: Path
) -> None:
    """Fresh seeds add -s, 0 and s to losses: a deviation of s. The reported half says the opposite and is ignored."""
    calls = list[tuple[bool, int]]()
    natural_G, s = np.array([3 / 6, 2 / 6, 1 / 6]), 0.01

    def losses(selection: DataSelection, seed: int) -> Losses:
        assert selection.mixture_G is not None
        known = bool(np.allclose(selection.mixture_G, natural_G)) or bool(np.allclose(selection.mixture_G, 1 / 3))
        calls.append((known, seed))
        value = 1 + s * (seed - 9) * (seed > 7) - (0 if known else gain * s)
        return Losses(value, -value)

    proxy = MixtureLosses(TrainedOn({"kind": "stepped"}, losses), FeatureStore(tmp_path))
    found = ClimbMixture(**QUICK, seed=7).fit(X, OF_X, proxy)
    assert found.measured["better than the natural mixture, beyond noise"] == better
    assert found.measured["standard deviation of a proxy"] == pytest.approx(s)
    assert Counter(calls) == {(True, 8): 2, (True, 9): 1, (True, 10): 1} | {
        (False, 7): 6 + 4 + 1,
        **{(False, seed): 1 for seed in (8, 9, 10)},
    }
    assert found.measured["mixtures tried"] == 11


def test_the_defaults_are_those_of_the_published_search_with_fewer_clusters() -> None:
    made = ClimbMixture()
    assert (made.rounds, made.repeats, made.temper, made.candidates) == ((64, 32, 16), 15.0, 0.5, 100_000)


def test_a_group_that_a_step_of_the_grid_would_repeat_too_often_is_left_out() -> None:
    prior_G = np.array([1e-5, 0.4 - 1e-5, 0.6])
    steps_MG = drawn_mixtures(prior_G, 200, 15.0, 0.5, np.random.default_rng(0))
    assert len(steps_MG) == 200
    assert (steps_MG[:, 0] == 0).all()
    assert (steps_MG.sum(axis=1) == GRID).all()
    # Where that leaves too little to the others, all stay.
    assert caps(np.full(10_000, 1e-4), 1.5).tolist() == [1] * 10_000
    assert drawn_mixtures(np.full(10_000, 1e-4), 2, 1.5, 0.5, np.random.default_rng(0)).sum() == 2 * GRID


@pytest.mark.usefixtures("few_trees")
def test_a_limit_on_repeats_holds_in_the_answer(tmp_path: Path) -> None:
    found = ClimbMixture(**QUICK | {"repeats": 2.0}).fit(X, OF_X, Counting(far_from([0, 0, 1.0])).kept_in(tmp_path))
    assert found.shares[2] <= 2 / 6
    assert found.heaviest <= 2 + 1e-9


def test_samples_that_are_all_alike_are_one_group_with_one_mixture(tmp_path: Path) -> None:
    for x in (torch.ones(40, 3), torch.zeros(40, 3, dtype=torch.bfloat16)):
        features = Features(x, index_N=torch.arange(40))
        proxy = Counting(lambda w, seed: 1.0).kept_in(tmp_path)
        found = ClimbMixture(**QUICK).fit(features, NamedSamples(40, "0" * 32, (40,)), proxy)
        assert found.shares == pytest.approx((1.0,))


# Trigrams


def pieces(texts: list[bytes], length: int) -> dict[str, Tensor]:
    rows = [torch.tensor([*text, *[0] * (length - len(text))]) for text in texts]
    masks = [torch.tensor([1] * len(text) + [0] * (length - len(text))) for text in texts]
    return {"tokens": torch.stack(rows), "mask": torch.stack(masks)}


TEXTS = [b"abracadabra", b"ab", b"banana", b"", b"cab"]


def test_trigrams_have_the_probabilities_of_the_equation_and_add_up_to_one() -> None:
    windows = TokenWindows.of([pieces(TEXTS[:2], 12), pieces(TEXTS[2:], 12)])
    assert windows.sample_W.tolist() == [0] * 9 + [2] * 4 + [4]
    times_N, k, vocabulary = np.array([1.0, 5, 2, 1, 3]), 0.7, 128
    counts: list[Counter[Any]] = [Counter() for _ in range(5)]
    for text, times in zip(TEXTS, times_N, strict=True):
        for a, b, c in zip(text, text[1:], text[2:], strict=False):
            for counter, key in zip(counts, ((a, b, c), (a, b), (b, c), b, c), strict=True):
                counter[key] += times
    asked = np.array([(*b"ab", c) for c in range(128)] + [(*b"zz", c) for c in range(128)])
    model = TrigramModel(windows, 5, asked, vocabulary, k)
    got_U = np.exp(model.log_probability(times_N))
    total = sum(counts[4].values())
    for (a, b, c), probability in zip(asked.tolist(), got_U, strict=True):
        one = (counts[4][c] + k / vocabulary) / (total + k)
        two = (counts[2][b, c] + k * one) / (counts[3][b] + k)
        assert probability == pytest.approx((counts[0][a, b, c] + k * two) / (counts[1][a, b] + k))
    assert got_U[:128].sum() == pytest.approx(1)
    assert got_U[128:].sum() == pytest.approx(1)
    assert np.exp(model.log_probability(np.zeros(5))) == pytest.approx(1 / 128)


SOURCE = (
    '"""Says {name} in words of this module."""\n\nclass A:\n    """Kept by {name}, as it were."""\n    x = {name!r}\n'
)


def library(folder: Path, files: int = 24) -> str:
    folder.mkdir(exist_ok=True)
    for number in range(files):
        (folder / f"m{number}.py").write_text(SOURCE.format(name="z" * (number % 7 + 1)), encoding="utf-8")
    (folder / "broken.py").write_text("def (", encoding="utf-8")
    return str(folder)


def texts(folder: str, *parts: Any) -> LibraryTexts:
    form = Padded(64)
    return LibraryTexts(parts or ("code", "docstrings"), folder, val_fraction=0.4, form=form, batch_size=8)


def test_a_mixture_of_docstrings_is_better_for_docstrings_than_one_of_code(tmp_path: Path) -> None:
    folder = library(tmp_path / "texts")
    data = texts(folder)
    proxy = TrigramProxy(data, texts(folder, "docstrings"), tokens=1500).load(FeatureStore(tmp_path / "store"))
    named = TrainingSamples(data).load(proxy.store)
    documented_N = np.array([bool(data.train.sample(i, 0)["tokens"][0] != ord("c")) for i in range(named.count)])  # type: ignore[union-attr]
    group_N = documented_N.astype(np.int64)
    mixed = [
        DataSelection(named.count, named.name, "", group_N=group_N, mixture_G=np.array([1 - share, share]))
        for share in (0.0, 0.5, 1.0)
    ]
    loss_M2 = proxy.of([*mixed, mixed[1]], [0, 0, 0, 1])
    assert (np.diff(loss_M2[:3], axis=0) < 0).all()
    assert (loss_M2[1] != loss_M2[3]).all()


# Trained proxies


class Numbers(SampleSets):
    """0 for the first 30 of 40 samples, and 1; the target is 0.7."""

    def setup(self, stage: str | None = None) -> None:
        self.train = self.train or Column([0.0] * 30 + [1.0] * 10)
        self.bank, self.val = self.train, getattr(self, "val", None) or Column([0.7] * 8)


class Column:
    def __init__(self, numbers: list[float]) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        return {"x": torch.tensor(self.numbers[index]), "index": torch.tensor(index)}


class Mean(LightningModule):
    """Learns the mean of what it sees in an epoch of one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(5.0))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return (batch["x"] - self.mean).square().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/mean", self.mean, batch_size=1)
        self.log("val/loss", (batch["x"] - self.mean).square().mean(), batch_size=len(batch["x"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def test_a_proxy_is_trained_on_the_shares_of_its_mixture_from_the_same_start(tmp_path: Path) -> None:
    method, data = Mean(), Numbers(batch_size=40)
    target = Numbers(batch_size=4)
    before = torch.random.get_rng_state()
    proxy = TrainedProxy(method, data, target, "val/mean", steps=2).load(FeatureStore(tmp_path))
    group_N = np.array([0] * 30 + [1] * 10)
    mixed = [
        DataSelection(40, TrainingSamples(data).load(proxy.store).name, "", group_N=group_N, mixture_G=np.array(w))
        for w in ([0.75, 0.25], [0.3, 0.7])
    ]
    assert proxy.of(mixed, [0, 0]) == pytest.approx(np.array([[0.25, 0.25], [0.7, 0.7]]), abs=1e-6)
    loss = TrainedProxy(method, data, target, "val/loss", steps=2).load(FeatureStore(tmp_path))
    assert loss.of(mixed, [0, 0])[:, 0] == pytest.approx([0.45**2, 0], abs=1e-6)
    halves = Numbers(batch_size=4)
    halves.val = Column([0.7] * 4 + [0.1] * 4)
    by_turns = TrainedProxy(method, data, halves, "val/loss", steps=2).load(FeatureStore(tmp_path))
    assert by_turns.of(mixed[1:], [0])[0] == pytest.approx([0, 0.6**2], abs=1e-6)
    assert method.mean.item() == 5
    assert data.selection is None
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(UserError, match="metric='val/other'"):
        TrainedProxy(method, data, target, "val/other", steps=1).load(FeatureStore(tmp_path)).of(mixed[:1], [0])
    with pytest.raises(UserError, match="1 validation batches"):
        TrainedProxy(method, data, steps=1).load(FeatureStore(tmp_path))


class Spelled(SampleSets):
    """Texts as bytes; the target is all of them."""

    num_tokens = 128

    def setup(self, stage: str | None = None) -> None:
        self.train = self.bank = self.val = Pieces()


class Pieces:
    def __len__(self) -> int:
        return len(TEXTS)

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        return {name: column[0] for name, column in pieces(TEXTS[index : index + 1], 12).items()}


def test_a_mixture_without_three_tokens_in_a_row_is_a_guess(tmp_path: Path) -> None:
    """A search goes on where all of a mixture is in a group of empty texts."""
    proxy = TrigramProxy(Spelled(batch_size=2), Spelled(batch_size=2)).load(FeatureStore(tmp_path))
    group_N = np.array([len(text) < 3 for text in TEXTS], np.int64)
    short, others = (
        DataSelection(len(TEXTS), "0" * 32, "", group_N=group_N, mixture_G=np.array(w))
        for w in ([0.0, 1.0], [1.0, 0.0])
    )
    guess, learned = proxy.of([short, others], [0, 0])
    assert guess == pytest.approx(math.log(128))
    assert (learned < 3).all()


def test_texts_of_the_target_are_searched_by_and_reported_by_turns(tmp_path: Path) -> None:
    """Of the texts with three tokens, the first and the third are searched by and the second is reported."""
    data = Spelled(batch_size=2)
    proxy = TrigramProxy(data, data, tokens=3_000_000, strength=2.0).load(FeatureStore(tmp_path))
    shared = DataSelection(5, "0" * 32, "", group_N=np.zeros(5, np.int64), mixture_G=np.ones(1))
    ((searched, reported),) = proxy.of([shared], [0])
    windows = TokenWindows.of([pieces(TEXTS, 12)])
    model = TrigramModel(windows, 5, windows.tokens_W3, 128, 2.0)
    log_W = model.log_probability(np.full(5, 3_000_000 / len(windows.sample_W)))
    second_W = windows.sample_W == 2
    assert reported == pytest.approx(-log_W[second_W].mean(), rel=1e-2)
    assert searched == pytest.approx(-log_W[~second_W].mean(), rel=1e-2)
    assert abs(searched - reported) > 0.1


def test_losses_of_other_settings_are_not_taken_from_the_store() -> None:
    data, other = Spelled(batch_size=2), Numbers(batch_size=4)
    trigrams = [TrigramProxy(data, data, **own) for own in ({}, {"tokens": 9}, {"strength": 1.0}, {"split": "bank"})]  # type: ignore[arg-type]
    trained = [TrainedProxy(Mean(), other, **own) for own in ({}, {"steps": 3}, {"metric": "val/mean"})]  # type: ignore[arg-type]
    names = {json.dumps(proxy.trained_on().identity, sort_keys=True) for proxy in (*trigrams, *trained)}
    assert len(names) == 7
    keys = [proxy.trained_on().identity for proxy in (trigrams[0], TrigramProxy(data, data))]
    assert keys[0] == keys[1]


# Data and embeddings


def test_code_and_docstrings_of_a_file_are_two_documents_on_one_side(tmp_path: Path, capsys: Any) -> None:
    folder = library(tmp_path / "texts")
    data = texts(folder)
    data.setup()
    assert "1 that cannot be parsed skipped" in capsys.readouterr().out
    for pieces_of in (data.train, data.val):
        assert [*Counter(pieces_of.names).values()] == [2] * (len(pieces_of.names) // 2)  # type: ignore[union-attr]
    assert not {*data.train.names} & {*data.val.names}  # type: ignore[union-attr]
    whole = {bytes(data.train.piece(i).tokens.astype(np.uint8)) for i in range(2)}  # type: ignore[union-attr]
    name = "z" * (int(data.train.names[0][1:-3]) % 7 + 1)  # type: ignore[union-attr]
    said = f"Says {name} in words of this module.\n\nKept by {name}, as it were."
    assert b"class A:" in next(text for text in whole if b"Says" not in text)
    assert any(text in said.encode() for text in whole)
    docstrings = texts(folder, "docstrings")
    docstrings.setup()
    assert docstrings.val.names == sorted({*data.val.names})  # type: ignore[attr-defined]


def test_fewer_files_are_a_part_of_more(tmp_path: Path) -> None:
    folder = library(tmp_path / "texts")
    few, more = (LibraryTexts(folder=folder, files=n, val_fraction=0.4) for n in (12, 20))
    few.setup()
    more.setup()
    assert {*few.train.names} < {*more.train.names}  # type: ignore[union-attr]


def test_a_row_of_counts_is_that_of_the_n_grams_of_its_text() -> None:
    encoder = NgramCounts(longest=2, width=100_003)
    tokens = torch.tensor([[1, 2, 1, 2, 0, 0], [7, 7, 7, 7, 7, 7], [0] * 6])
    x = encoder(tokens)
    # 1, 2, (1 2) twice and (2 1) once of seven; six times 7 and five times (7 7) of eleven; nothing.
    assert sorted(x[0][x[0] > 0].square().mul(7).round().tolist()) == [1, 2, 2, 2]
    assert sorted(x[1][x[1] > 0].square().mul(11).round().tolist()) == [5, 6]
    assert not x[2].any()
    assert torch.allclose(x.square().sum(dim=1), torch.tensor([1.0, 1.0, 0.0]))
    assert torch.equal(encoder(torch.cat([tokens, torch.zeros(3, 2, dtype=torch.int64)], dim=1)), x)
    assert encoder(torch.ones(2, 1, dtype=torch.int64)).isfinite().all()


def no_mixture(**wrong: Any) -> Callable[[], Any]:
    return lambda: ClimbMixture(**QUICK | wrong)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (no_mixture(rounds=[]), "rounds=\\[\\]"),
        (no_mixture(rounds=[4, 1]), "rounds=\\[4, 1\\]"),
        (no_mixture(clusters=0), "clusters=0"),
        (no_mixture(groups=10), "groups=10"),
        (no_mixture(components=0), "components=0"),
        (no_mixture(repeats=1.0), "repeats=1.0"),
        (no_mixture(temper=1.5), "temper=1.5"),
        (no_mixture(candidates=0), "candidates=0"),
        (no_mixture(candidates=10**12), "candidates=1000000000000"),
        (no_mixture(seed=-1), "seed=-1"),
        (lambda: LibraryTexts(()), "parts=\\[\\]"),
        (lambda: LibraryTexts(("prose",)), "parts=\\['prose'\\]"),  # type: ignore[arg-type]
        (lambda: LibraryTexts(files=0), "files=0"),
        (lambda: NgramCounts(longest=0), "longest=0"),
        (lambda: NgramCounts(width=0), "width=0"),
        (lambda: TrigramProxy(Numbers(), Numbers(), tokens=0), "tokens=0"),
        (lambda: TrigramProxy(Numbers(), Numbers(), strength=0.0), "strength=0.0"),
        (lambda: TrigramProxy(Numbers(), Numbers()).trained_on(), "None and None numbers of tokens"),
        (lambda: TokenWindows.of([{"x": torch.zeros(1)}]), "tokens and mask"),
        (lambda: TrainedProxy(Mean(), Numbers(), steps=0), "steps=0"),
    ],
)
def test_bad_input_is_refused_with_its_name(wrong: Callable[[], Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        wrong()


def test_features_of_some_samples_and_losses_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    part = Features(X.x[:50], index_N=torch.arange(50))
    with pytest.raises(UserError, match="50 features are not of all 120"):
        ClimbMixture(**QUICK).fit(part, OF_X, Counting(lambda w, seed: 1.0).kept_in(tmp_path))
    with pytest.raises(UserError, match="loss of a proxy is nan"):
        ClimbMixture(**QUICK).fit(X, OF_X, Counting(lambda w, seed: math.nan).kept_in(tmp_path))
    with pytest.raises(UserError, match="clusters=200"):
        ClimbMixture(**QUICK | {"clusters": 200}).fit(X, OF_X, Counting(lambda w, seed: 1.0).kept_in(tmp_path))
