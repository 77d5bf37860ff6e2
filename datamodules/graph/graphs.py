"""A graph as it is kept, made of what a file says. Without torch.

Shapes: N nodes, E edges, F numbers of a node.
"""

from typing import NamedTuple

import numpy as np

from lightspan.core.files.foreign import NUMBERS


class Graph(NamedTuple):
    """Nodes and edges, sorted by their first node, then by their second; each once, and none from a node to itself.

    Attributes:
        kind: of nodes, int32 [N]; 0 is none.
        mark: of nodes, int8 [N]: of molecules 1 and 2 for atoms that turn clockwise and anticlockwise; else 0.
        numbers: of nodes, finite, float32 [N F].
        edges: from the first node to the second, int32 [E 2]; without directions each is there both ways.
        edge_kind: int32 [E]; 0 is none.
        edge_mark: int8 [E]: of molecules 1 and 2 for bonds that rise and fall; else 0.
    """

    kind: np.ndarray
    mark: np.ndarray
    numbers: np.ndarray
    edges: np.ndarray
    edge_kind: np.ndarray
    edge_mark: np.ndarray


class LeftOut(NamedTuple):
    """How much of graphs was left out: edges from a node to itself, edges that came again, and numbers that were
    missing, NaN or infinite, for which 0 stands.
    """

    loops: int = 0
    repeated: int = 0
    gaps: int = 0

    def __add__(self, other: "LeftOut") -> "LeftOut":  # type: ignore[override]
        return LeftOut(*(a + b for a, b in zip(self, other, strict=True)))


def graph_of(
    kind: np.ndarray,
    edges: np.ndarray,
    edge_kind: np.ndarray,
    directed: bool,
    numbers: np.ndarray | None = None,
    mark: np.ndarray | None = None,
    edge_mark: np.ndarray | None = None,
) -> tuple[Graph, LeftOut]:
    """Of nodes and edges as they come.

    Of edges that come more than once the first stays.

    Args:
        kind: whole numbers [N].
        edges: whole numbers in [0, N), [E 2].
        edge_kind: whole numbers [E].
        directed: whether an edge goes from its first node to its second alone; else it goes both ways.
        numbers: floats [N F]; None has none.
        mark, edge_mark: [N], [E]; None is 0.
    Raises: ValueError for no node, and edges of nodes that are not there; TooMuchError beyond the limit of numbers.
    """
    nodes, count = len(kind), len(edges)
    NUMBERS.require(nodes + 2 * count)
    if not nodes:
        raise ValueError("it has no node")
    edges = np.asarray(edges, np.int64).reshape(-1, 2)
    if count and not (edges.min() >= 0 and edges.max() < nodes):
        raise ValueError(f"it has an edge of node {int(edges.max()):,}, and {nodes:,} nodes")
    numbers = np.zeros((nodes, 0)) if numbers is None else np.asarray(numbers, np.float64)
    with np.errstate(over="ignore"):
        small = numbers.astype(np.float32)
    sound = np.isfinite(small)
    mark = np.zeros(nodes) if mark is None else mark
    edge_mark = np.zeros(count) if edge_mark is None else edge_mark
    apart = edges[:, 0] != edges[:, 1]
    edges, edge_kind, edge_mark = edges[apart], np.asarray(edge_kind)[apart], np.asarray(edge_mark)[apart]
    repeated = len(edges) - len(np.unique(edges @ [nodes, 1]))
    if not directed:
        edges = np.concatenate([edges, edges[:, ::-1]])
        edge_kind, edge_mark = np.tile(edge_kind, 2), np.tile(edge_mark, 2)
    first = np.unique(edges @ [nodes, 1], return_index=True)[1]
    return (
        Graph(
            np.asarray(kind, np.int32),
            np.asarray(mark, np.int8),
            np.where(sound, small, np.float32(0)),
            edges[first].astype(np.int32),
            edge_kind[first].astype(np.int32),
            edge_mark[first].astype(np.int8),
        ),
        LeftOut(int((~apart).sum()), repeated, int((~sound).sum())),
    )
