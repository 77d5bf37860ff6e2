"""Probes of classes, tags and numbers against scikit-learn, and honest choices among settings."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, r2_score
from sklearn.neighbors import KNeighborsRegressor
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.probes.attentive_probe import fit_attentive_heads
from lightspan.evaluation.probes.knn import knn_mean
from lightspan.evaluation.probes.linear_probe import fit_linear_probe
from lightspan.evaluation.probes.probe_scores import probe_scores, rows_to_choose_by
from lightspan.evaluation.probes.probes import KNN, AttentiveProbe, LinearProbe

N, M = 80, 40


def sides(kind: str, width: int = 6) -> tuple[Features, Features]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N + M, width, generator=generator)
    z = x @ torch.randn(width, 3, generator=generator) + 0.5 * torch.randn(N + M, 3, generator=generator)
    label = {"classes": z.argmax(dim=1), "tags": z > 0.5, "numbers": z}[kind]
    return Features(x[:N], label[:N]), Features(x[N:], label[N:])


def test_numbers_are_ridge_regression_on_standardised_features() -> None:
    bank, query = sides("numbers")
    bank.x[:, 2] = 0.1  # constant
    scaler = StandardScaler().fit(bank.x.numpy())
    oracle = Ridge(alpha=3.0).fit(scaler.transform(bank.x.numpy()), bank.label_N.numpy())
    weight, bias = fit_linear_probe(bank.x, bank.label_N, l2=3.0)
    expected = oracle.predict(scaler.transform(query.x.numpy()))
    kept = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(weight[2], torch.zeros(3, dtype=torch.float64))
    np.testing.assert_allclose(
        bank.x.double() @ weight + bias, oracle.predict(scaler.transform(bank.x.numpy())), atol=1e-5
    )
    assert expected.shape == (M, 3)
    one = fit_linear_probe(bank.x[:, kept], bank.label_N[:, 0], l2=3.0)
    torch.testing.assert_close(one[0], weight[kept][:, :1])


@pytest.mark.parametrize("probe", [KNN, LinearProbe, partial(AttentiveProbe, steps=2)])
def test_another_field_is_read_as_labels_are(probe: Any) -> None:
    bank, query = sides("numbers")
    named = [Features(side.x, torch.zeros(len(side)), fields={"turn": side.label_N}) for side in (bank, query)]
    assert probe(field="turn").reads == ("turn",)
    assert probe(field="turn").fit(*named).scores == probe().fit(bank, query).scores
    with pytest.raises(UserError, match="needs a move for each sample"):
        probe(field="move").fit(*named)
    with pytest.raises(UserError, match="of no known kind"):
        probe(field="turn").require(Features(bank.x, fields={"turn": torch.zeros(N, 3, 3)}))


def test_tags_are_a_logistic_regression_each() -> None:
    bank, query = sides("tags")
    bank, query = Features(bank.x.double(), bank.label_N), Features(query.x.double(), query.label_N)
    scaler = StandardScaler().fit(bank.x.numpy())
    weight, bias = fit_linear_probe(bank.x, bank.label_N, l2=2.0, max_iterations=400)
    ours = query.x.double() @ weight + bias
    for tag in range(3):
        oracle = LogisticRegression(C=0.5, tol=1e-10, max_iter=5000)
        oracle.fit(scaler.transform(bank.x.numpy()), bank.label_N[:, tag].numpy())
        np.testing.assert_allclose(ours[:, tag], oracle.decision_function(scaler.transform(query.x.numpy())), atol=1e-4)


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_neighbours_average_what_is_known_of_them(temperature: float | None) -> None:
    bank, query = sides("numbers")

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.ones_like(distances) if temperature is None else np.exp(-(distances**2) / 2 / temperature)

    unit = [torch.nn.functional.normalize(side.x.double()).numpy() for side in (bank, query)]
    oracle = KNeighborsRegressor(7, weights=weights).fit(unit[0], bank.label_N.numpy())
    ours = knn_mean(bank.x, bank.label_N, query.x, k=7, temperature=temperature, chunk=9)
    np.testing.assert_allclose(ours, oracle.predict(unit[1]), rtol=1e-3, atol=1e-4)


def test_scores_by_hand() -> None:
    labels = torch.tensor([0, 1, 1])
    assert probe_scores(torch.eye(3)[[0, 1, 2]], labels) == {"accuracy": pytest.approx(2 / 3)}
    tags = torch.tensor([[True, False], [False, False]])  # no row has the second one
    assert probe_scores(torch.tensor([[0.1, 9.0], [0.9, 1.0]]), tags) == {"mean_average_precision": pytest.approx(0.5)}
    numbers = torch.tensor([1.0, 3.0])
    assert probe_scores(torch.tensor([[1.0], [2.0]]), numbers) == {"r2": pytest.approx(0.5), "mae": pytest.approx(0.5)}
    assert probe_scores(torch.full((2, 1), 2.0), numbers)["r2"] == pytest.approx(0)
    assert probe_scores(torch.ones(1, 1), torch.ones(1)) == {"r2": 1, "mae": 0}
    with pytest.raises(UserError, match="no validation sample has any tag"):
        probe_scores(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["classes", "tags", "numbers"])
@pytest.mark.parametrize(
    "probe", [KNN(), LinearProbe(), AttentiveProbe(rate=1e-2, steps=60)], ids=lambda p: type(p).__name__
)
def test_every_probe_reads_every_kind_of_label_better_than_chance(probe, kind: str) -> None:
    (first, *_) = probe.fit(*sides(kind)).scores.values()
    assert first > {"classes": 0.6, "tags": 0.5, "numbers": 0.4}[kind]


def test_a_setting_is_chosen_on_the_bank_alone_and_told() -> None:
    bank, query = sides("classes")
    probe = LinearProbe(l2=[1e-3, 1.0, 1e4])
    result = probe.fit(bank, query)
    held = rows_to_choose_by(N)
    assert int(held.sum()) == N // 5
    on_held = []
    for l2 in probe.l2:
        weight, bias = fit_linear_probe(bank.x[~held], bank.label_N[~held], l2)
        on_held.append(
            ((bank.x[held].double() @ weight + bias).argmax(dim=1) == bank.label_N[held]).double().mean().item()
        )
    assert result.chosen == {"l2": probe.l2[on_held.index(max(on_held))]}
    assert result.scores == LinearProbe(l2=result.chosen["l2"]).fit(bank, query).scores  # fitted on all of the bank
    shuffled = Features(query.x, query.label_N.roll(1))
    assert probe.fit(bank, shuffled).chosen == result.chosen
    with pytest.raises(UserError, match="takes a bank of at least 5 rows, but got 4"):
        probe.fit(Features(bank.x[:4], bank.label_N[:4]), query)


# The attentive probe.


def hidden_in_one_token(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """One of eight tokens is marked and holds the class; the others hold any, so their mean tells little."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(2, (count,), generator=generator)
    classes = torch.randint(2, (count, 8), generator=generator)
    place = torch.randint(8, (count,), generator=generator)
    rows = torch.arange(count)
    classes[rows, place] = label
    marked = torch.zeros(count, 8).index_put((rows, place), torch.ones(count))
    x = torch.stack([classes * 2.0 - 1, marked * 3, 1 - marked, torch.ones_like(marked)], dim=2)
    return x, label


def test_attention_finds_what_the_mean_of_tokens_hides() -> None:
    (x, label), (other, others) = hidden_in_one_token(600, 0), hidden_in_one_token(200, 1)
    attentive = AttentiveProbe(rate=0.03, steps=300, heads=2).fit(Features(x, label), Features(other, others))
    mean = LinearProbe().fit(Features(x.mean(dim=1), label), Features(other.mean(dim=1), others))
    assert attentive.accuracy > 0.95
    assert mean.accuracy < 0.75


def test_heads_that_train_at_once_are_those_that_train_alone_and_no_random_state_moves() -> None:
    x, label = hidden_in_one_token(50, 0)
    before = torch.get_rng_state()
    together = fit_attentive_heads(x, label, [1e-3, 1e-2], steps=5, batch_size=16)
    assert torch.equal(torch.get_rng_state(), before)
    for rate, head in zip([1e-3, 1e-2], together, strict=True):
        (alone,) = fit_attentive_heads(x, label, [rate], steps=5, batch_size=16)
        torch.testing.assert_close(head(x), alone(x))
        assert not any(p.requires_grad for p in head.parameters())


def test_the_order_of_tokens_and_inference_mode_change_nothing() -> None:
    x, label = hidden_in_one_token(50, 0)
    (head,) = fit_attentive_heads(x, label, [1e-2], steps=5)
    torch.testing.assert_close(head(x.flip(1)), head(x))
    with torch.inference_mode():
        (inside,) = fit_attentive_heads(x.clone(), label.clone(), [1e-2], steps=5)
    torch.testing.assert_close(inside(x), head(x))


def test_numbers_come_back_in_their_own_unit() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 2, 4, generator=generator)
    y = 1000 + 50 * x[:, 0, 0] + 50 * x[:, 1, 0]
    result = AttentiveProbe(rate=0.02, steps=300).fit(Features(x[:200], y[:200]), Features(x[200:], y[200:]))
    assert result.scores["r2"] > 0.5
    assert result.scores["mae"] < 50


def test_labels_of_two_kinds_are_refused() -> None:
    bank, query = sides("classes")
    with pytest.raises(UserError, match="labels are classes in bank and numbers in query"):
        KNN().fit(bank, Features(query.x, query.label_N.float()))
    for probe in (KNN(), LinearProbe(), AttentiveProbe(steps=1)):
        with pytest.raises(UserError, match=r"finite"):
            probe.fit(Features(bank.x, torch.full((N,), math.nan)), Features(query.x, torch.ones(M)))


def test_average_precision_and_r2_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(3)
    predicted, truth = torch.randn(30, 4, generator=generator), torch.randn(30, 4, generator=generator)
    assert probe_scores(predicted, truth)["r2"] == pytest.approx(r2_score(truth.numpy(), predicted.numpy()), rel=1e-5)
    expected = average_precision_score((truth > 0).numpy(), predicted.numpy())
    assert probe_scores(predicted, truth > 0)["mean_average_precision"] == pytest.approx(expected)
