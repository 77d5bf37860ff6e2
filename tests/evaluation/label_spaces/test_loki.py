"""Loki: argmax, one class, path graphs and scales, a plain loop, and the locus against random probabilities."""

import pytest
import torch
from label_trees import every, random_tree

from lightspan.core.errors import UserError
from lightspan.evaluation.label_spaces import label_metrics, loki
from lightspan.evaluation.label_spaces.label_distance import ExpectedSquaredDistance
from lightspan.evaluation.label_spaces.label_metrics import (
    EmbeddingMetric,
    GraphMetric,
    LabelMetric,
    MatrixMetric,
    ring,
)
from lightspan.evaluation.label_spaces.loki import frechet_labels, locus, next_label


def shares(rows: int, classes: int, sharpness: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).softmax(dim=1)


def path(length: int) -> GraphMetric:
    return GraphMetric([(str(i), str(i + 1)) for i in range(length)], labels=[str(i) for i in range(length + 1)])


def test_with_equal_distances_it_is_argmax() -> None:
    observed, p = torch.tensor([5, 1, 3]), shares(50, 3)
    metric = MatrixMetric(1 - torch.eye(7))
    assert torch.equal(frechet_labels(p, observed, metric), observed[p.argmax(dim=1)])


def test_a_class_that_is_certain_is_predicted() -> None:
    observed = torch.tensor([7, 2, 11])
    assert torch.equal(frechet_labels(torch.eye(3), observed, random_tree(12)), observed)


def test_between_two_ends_of_a_path_it_is_the_node_nearest_to_the_mean() -> None:
    p = torch.linspace(0, 1, 40, dtype=torch.float64)
    found = frechet_labels(torch.stack([p, 1 - p], dim=1), torch.tensor([0, 9]), path(9))
    assert torch.equal(found, ((1 - p) * 9).round().long())


@pytest.mark.parametrize("metric", [random_tree(12), ring(12), EmbeddingMetric(torch.randn(12, 2))])
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_it_equals_a_plain_loop_in_blocks_of_any_size(
    metric: LabelMetric, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (label_metrics, loki):
        monkeypatch.setattr(module, "BLOCK", block)
    observed, p, distance = torch.tensor([0, 8, 3, 10]), shares(20, 4), every(metric).sqrt()
    for row, found in zip(p, frechet_labels(p, observed, metric), strict=True):
        costs = [sum(float(w * distance[y, k] ** 2) for w, k in zip(row, observed, strict=True)) for y in range(12)]
        assert int(found) == min(range(12), key=lambda y: costs[y])


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_of_equal_labels_the_first_wins(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (label_metrics, loki):
        monkeypatch.setattr(module, "BLOCK", block)
    for metric in (ring(4), EmbeddingMetric(torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, -1.0], [-1.0, 0.0]]))):
        assert frechet_labels(torch.full((2, 2), 0.5), torch.tensor([3, 1]), metric).tolist() == [0, 0]


def test_the_locus_has_labels_that_tie_and_hangs_on_no_unit_of_the_distances() -> None:
    x, observed = torch.randn(14, 2, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 4, 5, 9])
    expected = locus(observed, EmbeddingMetric(x))
    for unit in (1e-6, 1e6):
        assert torch.equal(locus(observed, EmbeddingMetric(unit * x)), expected)
    twins = EmbeddingMetric(torch.tensor([[0.0], [1.0], [2.0], [1.0], [0.0]]))
    assert locus(torch.tensor([0, 2]), twins).all()


def test_a_common_factor_of_distances_or_weights_changes_nothing() -> None:
    observed, p, distance = torch.tensor([0, 8, 3]), shares(60, 3), every(random_tree(12)).sqrt()
    found = frechet_labels(p, observed, MatrixMetric(distance))
    assert torch.equal(frechet_labels(p, observed, MatrixMetric(1e3 * distance)), found)
    assert torch.equal(frechet_labels(1e-3 * p, observed, MatrixMetric(distance)), found)
    assert len(found.unique()) > 3


def test_on_a_tree_random_probabilities_stay_on_the_paths_and_reach_them() -> None:
    for seed in range(5):
        tree, observed = random_tree(15, seed), torch.tensor([2, 9, 14])
        p = torch.cat([shares(3000, 3, sharpness, seed) for sharpness in (1.0, 3.0)])
        reached = torch.zeros(15, dtype=torch.bool)
        reached[frechet_labels(p, observed, tree)] = True
        assert torch.equal(reached, locus(observed, tree))


def test_the_linear_programs_find_the_locus_that_paths_tell() -> None:
    for seed in range(3):
        tree, observed = random_tree(10, seed), torch.tensor([1, 6, 9])
        assert torch.equal(locus(observed, MatrixMetric(every(tree).sqrt())), locus(observed, tree))


def test_beyond_trees_no_random_probabilities_leave_the_locus() -> None:
    metric = EmbeddingMetric(torch.randn(14, 2, generator=torch.Generator().manual_seed(1)))
    observed = torch.tensor([0, 4, 5, 9])
    reached, found = locus(observed, metric), frechet_labels(shares(5000, 4, 2.0), observed, metric)
    assert reached[found].all()
    assert 4 < int(reached.sum()) < 14
    assert locus(torch.tensor([0, 1, 2]), MatrixMetric(1 - torch.eye(5))).tolist() == [True] * 3 + [False] * 2


def test_labels_cover_a_tree_if_they_are_its_leaves_and_the_farthest_comes_next() -> None:
    tree = GraphMetric([("root", "a"), ("a", "b"), ("b", "c"), ("root", "d"), ("d", "e")])
    assert locus(tree.numbers(["c", "e"]), tree).all()
    assert next_label(tree.numbers(["c", "e"]), tree) is None
    assert not locus(tree.numbers(["c", "d"]), tree).all()
    assert tree.names[next_label(tree.numbers(["root"]), tree) or 0] == "c"  # three steps, and e two
    assert tree.names[next_label(tree.numbers(["c"]), tree) or 0] == "e"
    line = EmbeddingMetric(torch.tensor([[0.0], [1.0], [2.0], [7.0], [4.0]]))
    assert next_label(torch.tensor([0, 2]), line) == 3


def test_the_next_label_is_far_from_what_can_be_predicted_and_not_from_what_was_observed() -> None:
    """The middle of a path can be predicted, so that a twig of a step there is nearer than two steps beyond an end."""
    tree = GraphMetric([*((str(i), str(i + 1)) for i in range(8)), ("4", "twig"), ("0", "out"), ("out", "farther")])
    observed = tree.numbers(["0", "8"])
    assert int(tree.distance_to_set(observed).argmax()) == tree.numbers(["twig"])
    for metric in (tree, MatrixMetric(every(tree).sqrt(), tree.names)):
        assert metric.names[next_label(observed, metric) or 0] == "farther"


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_the_next_label_of_embeddings_has_the_largest_distance_to_its_nearest_one_of_the_locus(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (label_metrics, loki):
        monkeypatch.setattr(module, "BLOCK", block)
    for seed in range(4):
        metric = EmbeddingMetric(torch.randn(12, 2, generator=torch.Generator().manual_seed(seed)))
        observed = torch.tensor([0, 4, 5])
        reached = locus(observed, metric)
        assert next_label(observed, metric) == int(every(metric)[reached].amin(dim=0).argmax())


def test_a_label_that_others_always_beat_by_a_little_is_not_in_the_locus() -> None:
    """Above the middle of a line, where one lies on it: the difference of squares is that of the height."""
    at = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.0], [0.5, 0.01]])
    assert locus(torch.tensor([0, 1]), EmbeddingMetric(at)).tolist() == [True, True, True, False]


def test_as_many_labels_as_are_allowed_have_a_locus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loki, "MOST", 5)
    assert locus(torch.tensor([0, 2]), ring(5)).tolist() == [True, True, True, False, False]
    with pytest.raises(UserError, match="of 6 labels"):
        locus(torch.tensor([0]), ring(6))


def test_the_distance_of_predictions_is_a_mean_over_all_batches() -> None:
    metric = ring(8)
    measured = ExpectedSquaredDistance(metric)
    measured.update(torch.tensor([0, 1, 7]), torch.tensor([0, 3, 0]))
    measured.update(torch.tensor([6]), torch.tensor([2]))
    assert float(measured.compute()) == (0 + 4 + 1 + 16) / 4
    measured.reset()
    measured.update(*torch.zeros(2, 0, dtype=torch.int64))
    assert measured.compute().isnan()
    with pytest.raises(UserError, match="the batch has labels from 9 to 9, and the metric knows 8"):
        measured.update(torch.tensor([0]), torch.tensor([9]))
    with pytest.raises(UserError, match=r"got \[1\] for \[2\]"):
        measured.update(torch.tensor([0]), torch.tensor([0, 1]))


def test_probabilities_of_a_classifier_that_trains_give_the_same_labels() -> None:
    p = shares(20, 3)
    found = frechet_labels(p.clone().requires_grad_(), torch.tensor([0, 3, 5]), ring(7))
    assert torch.equal(found, frechet_labels(p, torch.tensor([0, 3, 5]), ring(7)))


def test_what_it_cannot_weigh_is_refused() -> None:
    metric = ring(4)
    for p, observed, said in (
        (torch.ones(2, 0), [], "at least one observed label"),
        (torch.ones(2, 1), [4], "the classifier has labels from 4 to 4, and the metric knows 4"),
        (torch.ones(2, 2), [1, 1], "occurs twice"),
        (torch.ones(2, 3), [0, 1], r"probabilities \[2, 3\] do not fit 2 observed labels"),
        (torch.tensor([[0.5, torch.nan]]), [0, 1], "finite and at least 0"),
        (torch.tensor([[2.0, -1.0]]), [0, 1], "finite and at least 0"),
    ):
        with pytest.raises(UserError, match=said):
            frechet_labels(p, torch.tensor(observed, dtype=torch.int64), metric)
    with pytest.raises(UserError, match=r"of 301 labels .* a linear program for each, of at most 300"):
        locus(torch.tensor([0]), ring(301))
    assert frechet_labels(torch.ones(0, 2), torch.tensor([0, 1]), metric).shape == (0,)
    assert frechet_labels(torch.ones(3, 1), torch.tensor([2]), metric).tolist() == [2, 2, 2]
