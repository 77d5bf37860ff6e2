"""Graphons: cells, smoothing, constant densities and drawn graphs; statistics against networkx; collections of data."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graph_files import rings

from lightspan.core.errors import UserError
from lightspan.datamodules.graph.folder import GraphFolder
from lightspan.evaluation.features.store import FeatureStore
from lightspan.evaluation.graphs.collection import GraphCollection, GraphInput, PlainGraph, neighbourhood, plain
from lightspan.evaluation.graphs.graphons import clustered, drawn_graph, graphon, resampled, statistics, tv_smoothed

HALVES = np.array([[0.9, 0.1], [0.1, 0.5]])


def collection(values: np.ndarray, nodes: int = 40, count: int = 4, seed: int = 0) -> GraphCollection:
    generator = np.random.default_rng(seed)
    return GraphCollection(tuple(drawn_graph(values, nodes, generator) for _ in range(count)))


def test_other_cells_have_the_means_over_them() -> None:
    assert resampled(HALVES, 4).tolist() == np.kron(HALVES, np.ones((2, 2))).tolist()
    values = np.random.default_rng(0).random((6, 6))
    np.testing.assert_allclose(resampled(values, 3), values.reshape(3, 2, 3, 2).mean(axis=(1, 3)))
    np.testing.assert_allclose(resampled(values, 4).mean(), values.mean())
    assert resampled(values, 4)[0, 0] == pytest.approx((values[:2, :2] * np.outer([2, 1], [2, 1])).sum() / 9)


def test_smoothing_moves_a_step_by_its_weight_over_its_width_and_keeps_the_mean() -> None:
    step = np.repeat([[0.0] * 4 + [1.0] * 4], 8, axis=0)
    expected = np.where(step > 0, 1 - 0.2 / 4, 0.2 / 4)
    np.testing.assert_allclose(tv_smoothed(step, 0.2, 2000), expected, atol=1e-3)
    noise = np.random.default_rng(0).random((7, 7))
    smooth = tv_smoothed(noise, 0.1)
    assert smooth.mean() == pytest.approx(noise.mean())
    np.testing.assert_allclose(tv_smoothed(noise.T, 0.1), smooth.T)

    def energy(u: np.ndarray) -> float:
        down, across = np.zeros((7, 7)), np.zeros((7, 7))
        down[:-1], across[:, :-1] = np.diff(u, axis=0), np.diff(u, axis=1)
        return float(0.1 * np.hypot(down, across).sum() + ((u - noise) ** 2).sum() / 2)

    best = energy(tv_smoothed(noise, 0.1, 3000))
    assert energy(smooth) < best + 1e-3
    for seed in range(20):
        assert energy(smooth + 0.01 * np.random.default_rng(seed).normal(size=(7, 7))) > best
    assert tv_smoothed(noise, 0.0) is noise
    np.testing.assert_allclose(tv_smoothed(noise, 10.0, 3000), noise.mean(), atol=1e-2)


def test_the_graphon_of_a_constant_density_is_that_density() -> None:
    for density in (0.2, 0.5):
        found = graphon(collection(np.array([[density]]), 400, 1), 20)
        assert found.mean() == pytest.approx(density, abs=0.02)
        assert found.std() < 0.1
        np.testing.assert_allclose(found, found.T)


def test_nodes_of_high_degree_come_first_and_blocks_of_log_n_are_smoothed_by_their_deviation() -> None:
    clique = [5, 1, 7, 2]  # of eight nodes, which make two blocks of four
    edges = np.array([(a, b) for a in clique for b in clique if a != b])
    for count in (1, 4):
        found = graphon(GraphCollection((PlainGraph(8, edges),) * count), 2)
        blocks = np.array([[12 / 16, 0], [0, 0]])
        np.testing.assert_allclose(found, tv_smoothed(blocks, 1 / (2 * 4 * count**0.5)))


def test_smaller_graphs_are_padded_and_the_numbering_of_nodes_says_nothing() -> None:
    full = PlainGraph(2, np.array([[0, 1], [1, 0]]))
    none = PlainGraph(4, np.zeros((0, 2), np.int64))
    one = graphon(GraphCollection((full,)), 1)
    both = graphon(GraphCollection((full, none)), 1)
    assert one[0, 0] == pytest.approx(2 / 4)
    assert both[0, 0] == pytest.approx(2 / 16 / 2)
    star = np.array([[0, 1], [0, 2], [0, 3], [3, 4]])
    place = np.array([4, 2, 0, 1, 3])
    made = [PlainGraph(5, np.concatenate([e, e[:, ::-1]])) for e in (star, place[star])]
    first, second = (graphon(GraphCollection((graph,)), 2) for graph in made)
    np.testing.assert_allclose(first, second)
    with pytest.raises(UserError, match="without graphs"):
        graphon(GraphCollection(()), 3)


def test_drawn_graphs_have_the_density_of_their_graphon() -> None:
    shares = [len(graph.edges) / (30 * 29) for graph in collection(HALVES, 30, 200).graphs]
    assert np.mean(shares) == pytest.approx(HALVES.mean(), abs=3 * np.std(shares) / 200**0.5)


def test_statistics_are_those_of_networkx_and_finite_for_any_graph() -> None:
    networkx = pytest.importorskip("networkx")
    generator = np.random.default_rng(1)
    for values in (HALVES, np.array([[0.1]]), np.array([[0.05]])):
        graph = drawn_graph(values, 24, generator)
        other = networkx.Graph([*map(tuple, graph.edges.tolist())])
        other.add_nodes_from(range(24))
        degrees = np.array([degree for _, degree in other.degree])
        expected = [
            degrees.mean(),
            degrees.std(),
            networkx.density(other),
            np.mean([*networkx.closeness_centrality(other).values()]),
            networkx.degree_pearson_correlation_coefficient(other),
            networkx.transitivity(other),
            networkx.average_clustering(other),
        ]
        np.testing.assert_allclose(statistics(graph), expected, rtol=1e-9, atol=1e-12)
    ring = np.array([[a, (a + 1) % 5] for a in range(5)])
    for graph in (
        PlainGraph(1, ring[:0]),
        PlainGraph(3, ring[:0]),
        PlainGraph(5, np.concatenate([ring, ring[:, ::-1]])),
    ):
        assert np.isfinite(statistics(graph)).all()


def test_kinds_of_graphs_are_told_apart_and_equal_graphs_are_one_kind() -> None:
    dense, sparse = (collection(np.array([[p]]), 20, 5).graphs for p in (0.8, 0.1))
    parts = clustered([*dense, *sparse], 2)
    assert {frozenset(map(id, part.graphs)) for part in parts} == {frozenset(map(id, p)) for p in (dense, sparse)}
    assert len(clustered([dense[0]] * 4, 3)) == 1


def opened(folder: Path, **settings: Any) -> GraphCollection:
    data = GraphFolder(str(folder), cache_dir=str(folder.parent / "cache"), batch_size=2)
    return GraphInput(data, **settings).load(FeatureStore(folder.parent / "store"))


def test_collections_are_graphs_of_a_split_or_neighbourhoods(tmp_path: Path) -> None:
    folder = rings(tmp_path / "in", 8)
    whole, few, held = opened(folder), opened(folder, most=3), opened(folder, split="val")
    assert sorted(graph.nodes for graph in (*whole.graphs, *held.graphs)) == list(range(3, 11))
    assert len(few) == 3
    assert all((graph.adjacency().sum(axis=1) == 2).all() for graph in whole.graphs)
    near = opened(folder, hops=1, most=9)
    assert len(near) == 9
    assert all(graph.nodes == 3 for graph in near.graphs)
    small = opened(folder, most_nodes=5)
    assert max(graph.nodes for graph in small.graphs) <= 5
    with pytest.raises(UserError, match="most_nodes=2"):
        opened(folder, most_nodes=2)
    for settings in ({"most": 0}, {"hops": 0}, {"most_nodes": 0}, {"most_nodes": 10**6}):
        with pytest.raises(UserError, match=next(iter(settings))):
            opened(folder, **settings)


def test_the_neighbourhood_of_a_node_has_the_edges_within() -> None:
    graph = plain(6, np.array([[0, 1], [1, 2], [2, 3], [3, 4], [1, 3], [5, 0], [3, 1], [2, 2]]))
    near = neighbourhood(graph, 1, 1, 99)
    assert near.nodes == 4
    assert near.edges.tolist() == [[0, 1], [0, 2], [0, 3], [1, 0], [2, 0], [2, 3], [3, 0], [3, 2]]
    assert neighbourhood(graph, 1, 9, 99).nodes == 6
    assert neighbourhood(graph, 1, 9, 3).nodes == 3
    assert neighbourhood(graph, 4, 0, 3).edges.shape == (0, 2)
