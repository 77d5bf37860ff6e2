"""Loki on features: labels without a sample, the choice of the temperature, and names that do not overlap."""

import math
from itertools import combinations

import pytest
import torch

from lightspan.core.drawing import canvas
from lightspan.core.errors import UserError
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.gaussians.closed_form import LinearHead, NearestMean
from lightspan.evaluation.label_spaces.label_metrics import EmbeddingMetric, GraphMetric, MatrixMetric, ring
from lightspan.evaluation.label_spaces.loki import Loki, frechet_labels
from lightspan.evaluation.probes.linear_probe import fit_linear_probe

LABELS, OBSERVED = 24, [0, 4, 8, 12, 16, 20]


def on_a_circle(seed: int, rows: int = 240, noise: float = 0.1) -> Features:
    label = torch.arange(rows) % LABELS
    at = 2 * math.pi * label / LABELS
    x = torch.stack([at.cos(), at.sin()], dim=1)
    return Features(x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)), label)


def test_labels_without_a_sample_are_predicted_and_a_permuted_metric_misleads() -> None:
    bank, query = on_a_circle(0).of_classes(OBSERVED), on_a_circle(1)
    found = Loki(temperature=2.0).fit(bank, query, ring(LABELS))
    assert found.squared_distance < 0.5 * found.squared_distance_argmax
    assert found.unseen_accuracy is not None
    assert found.unseen_accuracy > 0.3
    assert Loki(temperature=2.0, observed=OBSERVED).fit(on_a_circle(0), query, ring(LABELS)) == found
    assert (found.labels, found.observed, found.reachable, found.next_label) == (24, 6, 24, None)
    assert found.query_rows == 240
    assert found.accuracy_argmax <= 6 / 24
    order = torch.randperm(LABELS, generator=torch.Generator().manual_seed(0))
    distance = ring(LABELS).squared(torch.arange(LABELS)).sqrt()
    permuted = Loki(temperature=2.0).fit(bank, query, MatrixMetric(distance[order][:, order])).tensors["prediction"]
    truth = query.classes()
    assert ring(LABELS).squared_pairs(permuted, truth).mean() > found.squared_distance_argmax


def test_a_temperature_near_zero_is_argmax_and_equal_distances_are_too() -> None:
    bank, query = on_a_circle(0).of_classes(OBSERVED), on_a_circle(1)
    for found in (
        Loki(temperature=1e-4).fit(bank, query, ring(LABELS)),
        Loki(temperature=1.0).fit(bank, query, MatrixMetric(1 - torch.eye(LABELS))),
    ):
        assert torch.equal(found.tensors["prediction"], found.tensors["prediction_argmax"])
        assert found.squared_distance == found.squared_distance_argmax
        assert found.seen_accuracy == found.seen_accuracy_argmax
        assert found.unseen_accuracy == 0


def test_the_query_has_no_say_in_the_temperature_and_val_has() -> None:
    bank = on_a_circle(0).of_classes(OBSERVED)
    one, other = (
        Loki(temperature=None).fit(bank, query, ring(LABELS)) for query in (on_a_circle(1), on_a_circle(2, noise=2.0))
    )
    assert one.temperature == other.temperature
    plain = MatrixMetric(1 - torch.eye(LABELS))
    assert Loki(temperature=None).fit(bank, bank, plain).temperature == 1  # all are equally good
    with_val = Loki(temperature=None).fit(bank, on_a_circle(1), ring(LABELS), val=on_a_circle(3, noise=1.0))
    assert with_val.temperature > 0
    again = Loki(temperature=with_val.temperature).fit(bank, on_a_circle(1), ring(LABELS))
    assert again.squared_distance == with_val.squared_distance


def test_texts_of_the_observed_classes_make_the_classifier_and_those_of_all_the_metric() -> None:
    """As CLIP: images near the text of their class."""
    at = 2 * math.pi * torch.arange(8) / 8
    text, label = torch.stack([at.cos(), at.sin()], dim=1), torch.arange(80) % 8
    query = Features(text[label] + 0.05 * torch.randn(80, 2, generator=torch.Generator().manual_seed(1)), label)
    bank, rule = Features(text, torch.arange(8)), NearestMean(cosine=True)
    found = Loki(rule, scale=100.0, temperature=1.0).fit(bank, query, EmbeddingMetric(text))
    assert found.accuracy == found.accuracy_argmax == 1
    assert found.unseen_accuracy is None
    half = bank.of_classes([0, 2, 4, 6])
    fewer = Loki(rule, scale=100.0, temperature=20.0).fit(half, query, EmbeddingMetric(text))
    assert fewer.squared_distance < 0.5 * fewer.squared_distance_argmax


@pytest.mark.sample(1)
@pytest.mark.parametrize("count", [7, 60])
def test_the_chosen_temperature_is_that_of_a_loop_over_labels_left_out(count: int) -> None:
    """With a seventh of unknown labels, and with nine of ten: each kind of row counts by its share of the labels."""
    generator = torch.Generator().manual_seed(7)
    at = torch.rand(count, 2, generator=generator).double() * 3
    label = torch.arange(90) % 6
    bank, val = (Features(at[label] + 0.3 * torch.randn(90, 2, generator=generator), label) for _ in range(2))
    metric, costs_T2 = EmbeddingMetric(at), []
    for power in range(-4, 7):
        cost_2 = torch.zeros(2)
        for fold in range(5):
            kept = [c for c in range(6) if c % 5 != fold]
            part = bank.of_classes(kept)
            places = torch.searchsorted(torch.tensor(kept), part.classes())
            weight, bias = fit_linear_probe(part.rows(), places, 1.0)
            p = ((val.rows().double() @ weight + bias) / 2.0**power).softmax(dim=1)
            found, seen = frechet_labels(p, torch.tensor(kept), metric), torch.isin(label, torch.tensor(kept))
            squared = metric.squared_pairs(found, label)
            cost_2 += torch.stack([squared[seen].mean(), squared[~seen].mean()])
        costs_T2.append(cost_2)
    share = 6 / count

    def chosen(seen: float, unseen: float) -> float:
        return 2.0 ** (int((torch.stack(costs_T2) @ torch.tensor([seen, unseen])).argmin()) - 4)

    assert Loki(temperature=None).fit(bank, val, metric, val=val).temperature == chosen(share, 1 - share)
    others = (1 - share, share), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0)
    assert count == 60 or all(chosen(*other) != chosen(share, 1 - share) for other in others)


def test_without_val_a_fifth_of_the_bank_judges_classifiers_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of five labels is left out once, so that a row of the other four fifths is learned four times."""
    rows: list[int] = []
    head = Loki._head

    def counted(self: Loki, bank: Features) -> LinearHead:
        rows.append(len(bank))
        return head(self, bank)

    monkeypatch.setattr(Loki, "_head", counted)
    bank = on_a_circle(0).of_classes([0, 4, 8, 12, 16])
    Loki(temperature=None).fit(bank, on_a_circle(1), ring(LABELS))
    assert (rows[0], sum(rows[1:])) == (50, 4 * 40)


def test_one_class_and_equal_features_in_half_precision_are_ordinary() -> None:
    query = Features(torch.ones(8, 3).bfloat16(), torch.arange(8) % 4)
    one = Loki(temperature=None).fit(Features(torch.ones(5, 3).bfloat16(), torch.full((5,), 2)), query, ring(4))
    assert (one.temperature, one.reachable, one.next_label) == (1.0, 1, "0")
    assert one.tensors["prediction"].tolist() == [2] * 8
    assert one.squared_distance == (4 + 1 + 0 + 1) / 4
    equal = Loki().fit(Features(torch.ones(6, 3).bfloat16(), torch.arange(6) % 3), query, ring(4))
    assert len(equal.tensors["prediction"].unique()) == 1


def test_labels_that_do_not_fit_the_metric_are_refused() -> None:
    with pytest.raises(UserError, match="query has labels from 0 to 23, and the metric knows 12"):
        Loki().fit(on_a_circle(0).of_classes([0, 1]), on_a_circle(1), ring(12))
    with pytest.raises(UserError, match=r"Loki observed=\[\] leaves no label"):
        Loki(observed=[])
    with pytest.raises(UserError, match=r"Loki observed=\[3, 99\]: the bank has no row of these labels"):
        Loki(observed=[0, 99, 3]).fit(on_a_circle(0).of_classes([0, 1]), on_a_circle(1), ring(LABELS))
    with pytest.raises(UserError, match="no row in its query"):
        Loki().fit(on_a_circle(0), on_a_circle(1).of_classes([]), ring(LABELS))


def test_the_scale_of_a_rules_scores_is_an_inverse_temperature() -> None:
    bank, query = on_a_circle(0).of_classes(OBSERVED), on_a_circle(1)
    rule = NearestMean(cosine=True)
    one = Loki(rule, scale=100.0, temperature=20.0).fit(bank, query, ring(LABELS))
    assert torch.equal(
        Loki(rule, scale=5.0).fit(bank, query, ring(LABELS)).tensors["prediction"], one.tensors["prediction"]
    )
    assert not torch.equal(Loki(rule).fit(bank, query, ring(LABELS)).tensors["prediction"], one.tensors["prediction"])


def test_nodes_that_are_no_labels_are_drawn_as_such() -> None:
    tree = GraphMetric(
        [("a", "up"), ("b", "up"), ("up", "top"), ("c", "top")], labels=["a", "b", "c"], only_labels=True
    )
    label = torch.arange(9) % 3
    given = Features(torch.nn.functional.one_hot(label).float(), label)
    found = Loki().fit(given.of_classes([0, 1]), given, tree)
    kinds = {place["name"]: place["kind"] for place in found.places}
    assert (kinds["a"], kinds["b"], kinds["up"], kinds["top"]) == ("observed", "observed", "no label", "no label")
    assert kinds["c"] == "not reachable"


def test_the_table_says_what_most_rows_of_each_unseen_label_get() -> None:
    query = on_a_circle(1, noise=0.4)
    found = Loki(temperature=2.0).fit(on_a_circle(0).of_classes(OBSERVED), query, ring(LABELS))
    got = {
        label: found.tensors["prediction"][query.classes() == label].bincount(minlength=LABELS) for label in range(24)
    }
    table = found.table()
    assert sorted(int(row["label"]) for row in table) == [label for label in range(24) if label not in OBSERVED]
    for row in table:
        count_N = got[int(row["label"])]
        assert row["share"] == count_N.max() / 10
        assert count_N[int(row["predicted"])] == count_N.max()
    assert any(row["share"] < 0.5 for row in table)


def test_names_in_the_picture_stay_inside_and_do_not_overlap() -> None:
    edges = [(f"a garment of kind {i}", f"a garment of kind {i // 3}") for i in range(1, 40)]
    metric = GraphMetric(edges, labels=[f"a garment of kind {i}" for i in range(40)])
    label = torch.arange(400) % 40
    x = torch.randn(400, 5, generator=torch.Generator().manual_seed(0)) + label[:, None]
    found = Loki(temperature=1.0).fit(Features(x, label).of_classes([20, 30, 39]), Features(x, label), metric)
    assert {place["kind"] for place in found.places} == {"observed", "reachable", "not reachable"}
    assert len(found.places) == 40
    assert len(found.edges) == 39
    assert found.table()[0]["share"] <= 1
    figure, ((axes,),) = canvas("many names", size=(7.2, 5.6))
    found.draw(axes)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(boxes) > 20
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    frame = axes.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)
