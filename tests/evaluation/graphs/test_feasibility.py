"""W2PGNN: costs and distances, exact mixtures, known graphons found again from drawn graphs, and what is refused."""

import numpy as np
import pytest

from lightspan.core.errors import UserError
from lightspan.evaluation.graphs.collection import GraphCollection
from lightspan.evaluation.graphs.feasibility import (
    W2PGNN,
    Feasibility,
    descended,
    gw_cost,
    gw_coupling,
    gw_distance,
    nearest_mixture,
)
from lightspan.evaluation.graphs.graphons import drawn_graph, graphon

AT = (np.arange(12) + 0.5) / 12
U, V = np.meshgrid(AT, AT, indexing="ij")
KNOWN = {
    "product": U * V,
    "exp": np.exp(-(U**0.7) - V**0.7),
    "blocks": np.where((U < 0.5) == (V < 0.5), 0.8, 0.05),
    "bipartite": np.where((U < 0.5) == (V < 0.5), 0.05, 0.8),
    "apart": np.abs(U - V),
    "near": 1 - np.abs(U - V),
}


def symmetric(side: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).random((side, side))
    return (values + values.T) / 2


def collection(values: np.ndarray, seed: int, nodes: int = 60, count: int = 6) -> GraphCollection:
    generator = np.random.default_rng(seed)
    return GraphCollection(tuple(drawn_graph(values, nodes, generator) for _ in range(count)))


def test_the_cost_is_its_sum_whatever_the_order_of_nodes() -> None:
    first, second = symmetric(5, 0), symmetric(4, 1)
    coupling = np.random.default_rng(0).random((5, 4))
    apart = (first[:, :, None, None] - second[None, None]) ** 2
    expected = np.einsum("ikjl,ij,kl->", apart, coupling, coupling)
    assert gw_cost(first, second, coupling) == pytest.approx(expected)
    order = np.array([3, 0, 4, 1, 2])
    assert gw_cost(first[np.ix_(order, order)], second, coupling[order]) == pytest.approx(expected)


def test_couplings_have_uniform_weights_and_are_no_worse_than_any_start() -> None:
    for seed in range(5):
        first, second = symmetric(10, seed), symmetric(10, seed + 50)
        coupling = gw_coupling(first, second)
        np.testing.assert_allclose(coupling.sum(axis=0), 0.1)
        np.testing.assert_allclose(coupling.sum(axis=1), 0.1)
        assert gw_cost(first, second, coupling) <= gw_cost(first, second, np.eye(10) / 10) + 1e-12
        assert gw_distance(second, first) == pytest.approx(gw_distance(first, second), abs=0.02)
    assert gw_distance(first, first) < 1e-6
    assert gw_distance(first, first[::-1, ::-1]) < 1e-6


def test_from_any_start_the_cost_is_that_of_pot() -> None:
    ot = pytest.importorskip("ot", reason="the extra `peers` is not installed")
    for seed in range(4):
        first, second = symmetric(10, seed), symmetric(10, seed + 50)
        for start in (np.full((10, 10), 0.01), np.eye(10) / 10):
            theirs = ot.gromov.gromov_wasserstein2(first, second, G0=start)
            assert gw_cost(first, second, descended(first, second, start)) == pytest.approx(theirs, rel=1e-3)


def test_a_graphon_of_the_basis_is_its_own_nearest_mixture() -> None:
    basis = np.stack([*KNOWN.values()][:3])
    for place in range(3):
        alpha, apart = nearest_mixture(basis, basis[place])
        assert apart < 1e-6
        assert alpha.tolist() == np.eye(3)[place].tolist()


def test_a_mixture_is_nearer_than_its_parts_and_more_to_choose_from_is_no_worse() -> None:
    first, second, third = KNOWN["product"], KNOWN["blocks"], KNOWN["near"]
    alpha, apart = nearest_mixture(np.stack([first, second]), 0.6 * first + 0.4 * second)
    assert apart < 0.2 * min(gw_distance(each, 0.6 * first + 0.4 * second) for each in (first, second))
    np.testing.assert_allclose(alpha, [0.6, 0.4], atol=0.1)
    down = KNOWN["exp"]
    one, two, three = (nearest_mixture(np.stack([first, second, third][:n]), down)[1] for n in (1, 2, 3))
    assert one >= two - 1e-3
    assert two >= three - 1e-3


def test_known_graphons_are_found_again_from_graphs_that_they_drew() -> None:
    basis = {name: graphon(collection(values, 1), 12) for name, values in KNOWN.items()}
    for seed, (name, values) in enumerate(KNOWN.items()):
        down = graphon(collection(values, 100 + seed), 12)
        assert min(basis, key=lambda other: gw_distance(basis[other], down)) == name


def test_collections_are_ranked_and_every_basis_has_a_result() -> None:
    sources = {name: collection(KNOWN[name], 1, 30, 3) for name in ("product", "near")}
    for basis, names in (
        ("domain", {"product", "near"}),
        ("integrated", {"all"}),
        ("topological", {"kind 1", "kind 2"}),
    ):
        found = W2PGNN(basis, cells=8, clusters=2).fit(collection(KNOWN["near"], 2, 30, 3), **sources)
        assert found.weights.keys() == names
        assert sum(found.weights.values()) == pytest.approx(1)
        assert found.zeta <= 0
        assert found.alone["near"] > found.alone["product"]
        assert [row["collection"] for row in found.table()] == ["near", "product"]
        assert Feasibility.from_json(found.to_json()) == found
        assert found.picture("a").startswith(b"\x89PNG")
        if basis == "domain":
            assert found.zeta >= found.alone["near"]
            assert found.weights["near"] > 0.8


def test_degenerate_collections_have_a_finite_result_or_are_refused() -> None:
    empty = collection(np.zeros((1, 1)), 0, 1, 1)
    full = collection(np.ones((1, 1)), 0, 5, 2)
    assert W2PGNN(cells=3).fit(empty, a=empty).zeta == pytest.approx(0, abs=1e-6)
    assert W2PGNN(cells=3).fit(empty, a=full, b=full).zeta < -0.1
    with pytest.raises(UserError, match="at least one collection"):
        W2PGNN().fit(empty)
    with pytest.raises(UserError, match="without graphs"):
        W2PGNN().fit(empty, a=GraphCollection(()))
    for settings in ({"cells": 0}, {"clusters": 0}, {"cells": 10**6}):
        with pytest.raises(UserError, match=next(iter(settings))):
            W2PGNN(**settings)  # type: ignore[arg-type]
