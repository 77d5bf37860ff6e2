"""Graphons of collections of graphs, by sorting and smoothing; what tells kinds of graphs apart; graphs drawn from one.

Source: Chan and Airoldi, "A Consistent Histogram Estimator for Exchangeable Graph Models", 2014, arXiv 1402.1888 (sort
and smooth); Chambolle, "An Algorithm for Total Variation Minimization and Applications", 2004 (total variation); Cao
et al., "When to Pre-Train Graph Neural Networks?", 2023, arXiv 2303.16458, section 3 (what is done for collections).
A graphon is a step function on [0, 1]^2, here its values on R x R equal cells: how probable an edge between nodes of
two kinds is. Shapes: N nodes of the largest graph, R cells a side, P places.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import shortest_path

from lightspan.core.errors import UserError
from lightspan.evaluation.graphs.collection import GraphCollection, PlainGraph

STATISTICS = (
    "mean degree",
    "deviation of degrees",
    "density",
    "closeness",
    "assortativity",
    "transitivity",
    "clustering",
)


def graphon(graphs: GraphCollection, cells: int) -> np.ndarray:
    """The graphon of a collection, [R R] in [0, 1], symmetric.

    Nodes are sorted by falling degree, adjacencies are padded with zeros to the largest, averaged, averaged again in
    blocks of h = floor(log2 N + 1) nodes a side, and smoothed by total variation. Where the paper's code gives that the
    weight h, whose minimum is one constant for any graphon, this gives it the largest deviation that a block's mean may
    have, 1 / (2 h sqrt(graphs)).

    Args:
        cells: R; blocks become cells by the means over them.
    Raises: UserError without a graph.
    """
    if not len(graphs):
        raise UserError("a collection without graphs has no graphon; give at least one")
    most = max(graph.nodes for graph in graphs.graphs)
    total_NN = np.zeros((most, most))
    for graph in graphs.graphs:
        matrix = graph.adjacency()
        order = np.argsort(-matrix.sum(axis=1), kind="stable")
        total_NN[: graph.nodes, : graph.nodes] += matrix[np.ix_(order, order)]
    side = math.floor(math.log2(most) + 1)
    blocks = resampled(total_NN / len(graphs), max(1, most // side))
    return resampled(tv_smoothed(blocks, 1 / (2 * side * math.sqrt(len(graphs)))), cells)


def resampled(steps_NN: np.ndarray, cells: int) -> np.ndarray:
    """The means of a step function on [0, 1]^2 over other cells, [R R]; exact, where interpolation blurs steps."""
    ours, theirs = (np.linspace(0, 1, count + 1) for count in (cells, len(steps_NN)))
    lows = np.maximum(ours[:-1, None], theirs[None, :-1])
    share_RN = (np.minimum(ours[1:, None], theirs[None, 1:]) - lows).clip(0) * cells
    return share_RN @ steps_NN @ share_RN.T


def tv_smoothed(values: np.ndarray, weight: float, steps: int = 200) -> np.ndarray:
    """The u that minimises weight times its total variation plus |u - values|^2 / 2, of a matrix, by Chambolle's
    iteration.

    Args:
        weight: at least 0.
        steps: of the iteration, after which what is left is below rounding for small matrices.
    """
    if weight <= 0:
        return values
    field = np.zeros((2, *values.shape))
    for _ in range(steps):
        slope = _slopes(_divergence(field) - values / weight)
        field = (field + slope / 4) / (1 + np.linalg.norm(slope, axis=0) / 4)
    return values - weight * _divergence(field)


def _slopes(values: np.ndarray) -> np.ndarray:
    """To the next row and the next column, 0 at the ends: [2 R R]."""
    found = np.zeros((2, *values.shape))
    found[0, :-1], found[1, :, :-1] = np.diff(values, axis=0), np.diff(values, axis=1)
    return found


def _divergence(field: np.ndarray) -> np.ndarray:
    """Less the adjoint of `_slopes`."""
    found = np.zeros(field.shape[1:])
    down, across = field[0, :-1], field[1, :, :-1]
    found[:-1] += down
    found[1:] -= down
    found[:, :-1] += across
    found[:, 1:] -= across
    return found


def drawn_graph(values_RR: np.ndarray, nodes: int, generator: np.random.Generator) -> PlainGraph:
    """A graph of a graphon: nodes have uniform places, and edges are drawn one by one."""
    at = np.minimum((generator.random(nodes) * len(values_RR)).astype(int), len(values_RR) - 1)
    first, second = np.triu_indices(nodes, 1)
    there = generator.random(len(first)) < values_RR[at[first], at[second]]
    pairs = np.stack([first[there], second[there]], axis=1)
    return PlainGraph(nodes, np.concatenate([pairs, pairs[:, ::-1]]))


def statistics(graph: PlainGraph) -> np.ndarray:
    """Numbers that tell kinds of graphs apart, float64 [7] in the order of `STATISTICS`, finite for any graph.

    Source: Cao et al., section 4.2, whose eighth, Pearson's correlation of degrees, is assortativity again.
    """
    matrix = graph.adjacency()
    degree, nodes = matrix.sum(axis=1), graph.nodes
    pairs = (degree * (degree - 1)).sum()
    corners = ((matrix @ matrix) * matrix).sum(axis=1)
    each = np.divide(corners, degree * (degree - 1), out=np.zeros(nodes), where=degree > 1)
    ends = degree[graph.edges]
    varied = len(ends) > 0 and np.ptp(ends) > 0
    return np.array(
        [
            degree.mean(),
            degree.std(),
            degree.sum() / max(nodes * (nodes - 1), 1),
            closeness(graph).mean(),
            np.corrcoef(ends.T)[0, 1] if varied else 0.0,
            corners.sum() / max(pairs, 1),
            each.mean(),
        ]
    )


def closeness(graph: PlainGraph) -> np.ndarray:
    """Of each node, as Wasserman and Faust have it for graphs in parts."""
    ones = np.ones(len(graph.edges))
    apart = shortest_path(coo_array((ones, graph.edges.T), shape=(graph.nodes,) * 2).tocsr(), unweighted=True)
    reached = np.isfinite(apart)
    others, total = reached.sum(axis=1) - 1, np.where(reached, apart, 0).sum(axis=1)
    mean = np.divide(others, total, out=np.zeros(graph.nodes), where=total > 0)
    return mean * others / max(graph.nodes - 1, 1)


def clustered(graphs: Sequence[PlainGraph], clusters: int) -> list[GraphCollection]:
    """The graphs in at most so many clusters by their standardised statistics, by k-means."""
    from sklearn.cluster import KMeans

    rows = np.stack([statistics(graph) for graph in graphs])
    rows = (rows - rows.mean(axis=0)) / np.where(rows.std(axis=0) > 1e-12, rows.std(axis=0), 1)
    count = min(clusters, len(np.unique(rows.round(9), axis=0)))
    label = KMeans(count, n_init=4, random_state=0).fit_predict(rows)
    return [GraphCollection(tuple(graphs[int(at)] for at in np.flatnonzero(label == each))) for each in range(count)]
