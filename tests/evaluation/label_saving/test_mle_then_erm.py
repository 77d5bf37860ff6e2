"""Two stages in worlds that are known: exact risks against sampled ones and against theory."""

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.evaluation.label_saving.factor_world import FactorWorld, least_squares
from lightspan.evaluation.label_saving.mle_then_erm import MLEThenERM
from lightspan.nn.latent_models import fitted_factors, posterior_map


def test_the_exact_excess_is_that_of_many_samples() -> None:
    for control in (False, True):
        generator = torch.Generator().manual_seed(0)
        truth = FactorWorld(6, 2).drawn(generator, control)
        x, y = truth.samples(400_000, generator)
        guess = torch.ones(6, dtype=torch.float64) / 4
        guessed, best = (float((x @ w - y).square().mean()) for w in (guess, truth.best_D))
        assert best == pytest.approx(truth.floor, rel=0.01)
        assert guessed - best == pytest.approx(truth.excess(guess), rel=0.03)
        assert truth.excess(truth.best_D) == 0
        torch.testing.assert_close(least_squares(x, y), truth.best_D, atol=0.02, rtol=0)


def test_a_control_tells_nothing_of_the_factors() -> None:
    truth = FactorWorld(6, 2).drawn(torch.Generator().manual_seed(0), control=True)
    assert (truth.best_D @ truth.factors_DR).abs().max() < 1e-12


@pytest.mark.parametrize("labels", [100, 200])
def test_least_squares_have_the_excess_of_theory(labels: int) -> None:
    """v D / (N - D - 1), v being the risk of the best predictor, for Gaussian samples without a mean."""
    world, found, said = FactorWorld(20, 3), 0.0, 0.0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        truth = world.drawn(generator)
        x, y = truth.samples(labels, generator)
        found += truth.excess(least_squares(x, y)) / 200
        said += truth.floor * 20 / (labels - 20 - 1) / 200
    assert found == pytest.approx(said, rel=0.1)


def test_a_rotation_of_the_factors_changes_no_prediction() -> None:
    generator = torch.Generator().manual_seed(1)
    truth = FactorWorld(8, 3).drawn(generator)
    x, y = truth.samples(50, generator)
    factors, _ = fitted_factors(x.T @ x / 50, 3, 1.0)
    turned = factors @ torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    first, second = (
        map_DR @ least_squares(x @ map_DR, y) for map_DR in (posterior_map(each, 1.0) for each in (factors, turned))
    )
    torch.testing.assert_close(first, second)


def test_pretraining_saves_labels_where_factors_tell_of_them_and_loses_in_the_control() -> None:
    found = MLEThenERM(unlabelled=(100, 1000), labels=(60, 100, 400), seeds=4).fit(FactorWorld())
    rows = {(row["method"], row["unlabelled"], row["labels"]): row for row in found.rows}
    pretrained, direct = rows["pretrained", 1000, 100], rows["direct", 0, 100]
    assert pretrained["excess"] < direct["excess"] / 8
    assert pretrained["excess"] < rows["best ridge", 0, 100]["excess"] / 3
    assert rows["pretrained", 1000, 400]["control"] > 3 * rows["direct", 0, 400]["control"]
    assert found.saving > 3
    assert found.sample_slope["value"] < 0
    assert found.label_slopes["direct"]["high"] < 0
    assert found.floor == pytest.approx(1.2)  # 1 + 1 / (1 + 2^2)


def test_the_best_ridge_has_the_penalty_of_the_least_true_risk() -> None:
    world, labels = FactorWorld(12, 2), (8, 30)
    found = MLEThenERM(unlabelled=(50,), labels=labels, seeds=1).fit(world)
    generator = torch.Generator().manual_seed(0)
    truth = world.drawn(generator)
    x, y = truth.samples(30, generator)
    for count in labels:
        few, eye = x[:count], torch.eye(12, dtype=torch.float64)
        solved = (torch.linalg.solve(few.T @ few + 10.0**k * eye, few.T @ y[:count]) for k in range(-2, 5))
        (row,) = [row for row in found.rows if (row["method"], row["labels"]) == ("best ridge", count)]
        assert row["excess"] == pytest.approx(min(truth.excess(w) for w in solved))


def test_one_seed_has_no_interval_and_one_number_of_samples_no_slope() -> None:
    found = MLEThenERM(unlabelled=(50,), labels=(10, 20), seeds=1).fit(FactorWorld(5, 2))
    assert found.label_slopes["direct"]["low"] is None
    assert found.sample_slope["value"] == 0
    assert found.figures()


def test_wrong_worlds_and_ranks_are_refused() -> None:
    for wrong in ({"factors": 0}, {"dimensions": 3, "factors": 3}, {"length": 0.0}, {"noise": -1.0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            FactorWorld(**wrong)
    with pytest.raises(UserError, match="rank=9"):
        MLEThenERM(rank=9, seeds=1).fit(FactorWorld(5, 2))
