"""Distances of labels: against scipy and by hand, in blocks, and what is no metric."""

import warnings

import pytest
import torch
from label_trees import every, random_tree
from scipy.sparse.csgraph import floyd_warshall
from scipy.spatial.distance import cdist
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.evaluation.label_spaces import label_metrics
from lightspan.evaluation.label_spaces.label_metrics import EmbeddingMetric, GraphMetric, MatrixMetric, ring

EDGES = [("a", "b"), ("b", "c"), ("b", "d"), ("d", "e")]
LENGTHS = [1.0, 2.0, 0.5, 4.0]


def embedded(count: int = 9) -> Tensor:
    return 100 + torch.randn(count, 3, generator=torch.Generator().manual_seed(0))


def test_paths_of_a_tree_by_hand_and_of_a_graph_by_floyd_and_warshall() -> None:
    tree = GraphMetric(EDGES, LENGTHS)
    assert tree.names == ("a", "b", "c", "d", "e")
    assert tree.is_tree
    assert every(tree).sqrt()[0].tolist() == [0, 1, 3, 1.5, 5.5]
    assert every(GraphMetric(EDGES)).sqrt()[0].tolist() == [0, 1, 2, 2, 3]
    graph = GraphMetric([*EDGES, ("e", "a")], [*LENGTHS, 0.25])
    assert not graph.is_tree
    torch.testing.assert_close(every(graph).sqrt(), torch.from_numpy(floyd_warshall(graph.graph, directed=False)))


def test_a_circle_counts_steps_the_shorter_way_round() -> None:
    steps = (torch.arange(36)[:, None] - torch.arange(36)).abs()
    torch.testing.assert_close(every(ring(36)), torch.minimum(steps, 36 - steps).double().square())


def test_embeddings_have_their_euclidean_distances_and_none_to_themselves() -> None:
    x = embedded()
    squared = every(EmbeddingMetric(x))
    torch.testing.assert_close(squared, torch.from_numpy(cdist(x, x, "sqeuclidean")), rtol=1e-6, atol=1e-9)
    assert not squared.diagonal().any()


def test_what_all_embeddings_have_in_common_costs_no_digits() -> None:
    x = 1e8 + torch.arange(24.0, dtype=torch.float64).view(8, 3) % 7
    torch.testing.assert_close(every(EmbeddingMetric(x)), torch.from_numpy(cdist(x, x, "sqeuclidean")))
    assert (every(EmbeddingMetric(embedded(40).double().repeat(3, 1))) >= 0).all()


def test_paths_are_found_from_whichever_side_has_fewer_labels() -> None:
    for metric in (random_tree(9), GraphMetric(EDGES, LENGTHS, ["e", "a", "c"], only_labels=True)):
        whole, rows = every(metric), torch.tensor([2, 0])
        for start, stop in ((0, 1), (1, 2), (0, 3), (1, 3)):
            torch.testing.assert_close(metric.squared_columns(rows, start, stop), whole[rows, start:stop])


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_blocks_of_any_size_are_the_columns_in_their_order(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = [random_tree(9), EmbeddingMetric(embedded()), MatrixMetric(every(random_tree(9)).sqrt())]
    whole = [every(metric) for metric in metrics]
    monkeypatch.setattr(label_metrics, "BLOCK", block)
    rows, one, other = torch.tensor([4, 0, 7]), torch.tensor([8, 0, 0, 3]), torch.tensor([8, 5, 1, 8])
    for metric, expected in zip(metrics, whole, strict=True):
        torch.testing.assert_close(metric.squared(rows), expected[rows], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(metric.squared_pairs(one, other), expected[one, other], rtol=1e-12, atol=1e-12)


def test_a_hundred_thousand_labels_are_never_held_against_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them against a thousand, of which each block has four million distances."""
    metric = EmbeddingMetric(torch.randn(100_000, 2, generator=torch.Generator().manual_seed(0)))
    block = next(metric.squared_blocks(torch.arange(1000)))
    assert block.shape[0] == 1000
    assert block.numel() <= label_metrics.BLOCK


def test_nodes_that_are_no_labels_carry_paths_and_are_not_predicted() -> None:
    leaves = GraphMetric(EDGES, LENGTHS, ["e", "a", "c"], only_labels=True)
    assert leaves.names == ("e", "a", "c")
    assert not leaves.is_tree
    assert every(leaves).sqrt()[0].tolist() == [0, 5.5, 6.5]
    whole = leaves.of_all_nodes()
    assert whole.names[:3] == leaves.names
    assert whole.is_tree
    torch.testing.assert_close(every(whole)[:3, :3], every(leaves))
    assert whole.of_all_nodes() is whole


def test_paths_between_some_nodes_of_a_tree_are_those_where_a_detour_costs_nothing() -> None:
    tree = random_tree(40)
    distance, chosen = every(tree).sqrt(), torch.tensor([3, 17, 31, 39])
    between = distance[chosen][:, None, :] + distance[chosen][None, :, :] - distance[chosen][:, chosen][:, :, None]
    torch.testing.assert_close(tree.paths(chosen), (between < 1e-9).any(dim=0).any(dim=0))
    torch.testing.assert_close(tree.distance_to_set(chosen), distance[chosen].amin(dim=0))


def test_a_tree_of_twenty_thousand_labels_is_made_at_once() -> None:
    """In time that grows with the number of labels: with its square, this takes ten times as long as a test may."""
    labels = [str(number) for number in range(20_000)]
    tree = GraphMetric(
        [(label, str((number - 1) // 2)) for number, label in enumerate(labels) if number], labels=labels
    )
    assert tree.is_tree
    assert tree.names == tuple(labels)


def test_a_single_label_is_a_metric() -> None:
    for metric in (GraphMetric([], labels=["a"]), EmbeddingMetric(torch.ones(1, 2)), MatrixMetric(torch.zeros(1, 1))):
        assert every(metric).tolist() == [[0]]


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        (torch.zeros(2, 3), r"must be square, but is \[2, 3\]"),
        (torch.zeros(0, 0), "has no label"),
        (torch.tensor([[0.0, torch.nan], [torch.nan, 0.0]]), "must be finite"),
        (1e200 * (1 - torch.eye(2)).double(), "must be finite, and so must its square"),
        (torch.tensor([[0.0, -1.0], [-1.0, 0.0]]), "'0' to '1' is -1, back -1; it must not be negative"),
        (torch.tensor([[0.0, 1.0], [1.0, 2.0]]), "must be 0, of a label to itself"),
        (torch.tensor([[0.0, 1.0], [2.0, 0.0]]), "is 1, back 2; it must be the same both ways"),
    ],
)
def test_a_matrix_that_is_no_metric_is_refused(matrix: Tensor, said: str) -> None:
    with pytest.raises(UserError, match=said):
        MatrixMetric(matrix)


def test_the_triangle_inequality_is_a_remark() -> None:
    line = (torch.arange(3.0)[:, None] - torch.arange(3.0)).abs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MatrixMetric(line)
    with pytest.warns(UserWarning, match="from '0' to '2' it is shorter by way of '1'"):
        MatrixMetric(line.square())


@pytest.mark.parametrize(
    ("edges", "settings", "said"),
    [
        ([("a", "b"), ("c", "d")], {}, "in 2 parts: no path leads from 'a' to 'c'"),
        ([("a", "a")], {}, "must join two different ones"),
        ([("a", "b"), ("b", "a")], {}, "stand once"),
        ([("a", "b")], {"lengths": [0.0]}, "must be 1 finite numbers above 0"),
        ([("a", "b")], {"lengths": [1.0, 1.0]}, "must be 1 finite numbers above 0"),
        ([("a", "b")], {"labels": ["a", "x"]}, "no edge of the graph names the label 'x'"),
        ([("a", "b")], {"labels": ["a", "a"]}, "the label 'a' occurs twice"),
        ([], {}, "has no label"),
    ],
)
def test_a_graph_that_is_no_metric_is_refused(edges: list[tuple[str, str]], settings: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        GraphMetric(edges, **settings)


def test_labels_that_a_metric_does_not_have_are_refused() -> None:
    metric = GraphMetric([("boot", "shoe")])
    assert metric.numbers(["shoe", "boot"]).tolist() == [1, 0]
    with pytest.raises(UserError, match=r"'boots' is none of the 2 labels of this metric; did you mean boot\?"):
        metric.numbers(["boots"])
    with pytest.raises(UserError, match="the bank has labels from 0 to 2, and the metric knows 2"):
        metric.require_numbers(torch.tensor([0, 2]), "the bank")
    with pytest.raises(UserError, match=r"3 names do not fit embeddings \[2, 1\]"):
        EmbeddingMetric(torch.ones(2, 1), ["a", "b", "c"])
    with pytest.raises(UserError, match="must be finite rows"):
        EmbeddingMetric(torch.full((2, 1), torch.inf))
    with pytest.raises(UserError, match="must be finite rows"):
        EmbeddingMetric(torch.tensor([[0.0], [1e200]]).double())
    with pytest.raises(UserError, match="at least 3, but count=2"):
        ring(2)
