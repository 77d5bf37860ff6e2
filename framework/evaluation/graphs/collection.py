"""Collections of graphs as inputs of a recipe: their edges alone, whatever is known of nodes."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
from lightning import LightningDataModule

from lightspan.core.collate import separated
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in, require_numbers
from lightspan.datamodules.graph.batch import GraphBatch
from lightspan.evaluation.features.encoded import Split, split_loader
from lightspan.evaluation.features.input import Input
from lightspan.evaluation.features.store import FeatureStore
from lightspan.nn.graphs import graphs_of


@dataclass(frozen=True)
class PlainGraph:
    """A graph without directions, kinds, and edges from a node to itself.

    Attributes:
        nodes: how many, at least 1.
        edges: int64 [E 2], each once both ways, sorted.
    """

    nodes: int
    edges: np.ndarray

    def adjacency(self) -> np.ndarray:
        """0 and 1, float64 [nodes nodes]."""
        matrix = np.zeros((self.nodes, self.nodes))
        matrix[self.edges[:, 0], self.edges[:, 1]] = 1
        return matrix


def plain(nodes: int, edges: np.ndarray) -> PlainGraph:
    """Of edges [E 2] in any order, with or without directions."""
    both = np.concatenate([edges, edges[:, ::-1]])
    return PlainGraph(nodes, np.unique(both[both[:, 0] != both[:, 1]], axis=0))


@dataclass(frozen=True)
class GraphCollection:
    """Graphs that one thing drew, or may have drawn."""

    graphs: tuple[PlainGraph, ...]

    def __len__(self) -> int:
        return len(self.graphs)


def neighbourhood(graph: PlainGraph, centre: int, hops: int, most: int) -> PlainGraph:
    """The nodes at most `hops` edges from one, and all edges between them; the centre is the first, then the nearest.

    Args:
        most: nodes; of more the nearest stay, of equally near ones those found first.
    """
    starts = np.searchsorted(graph.edges[:, 0], np.arange(graph.nodes + 1))
    place, front = {centre: 0}, [centre]
    for _ in range(hops):
        new = []
        for neighbour in chain.from_iterable(
            graph.edges[starts[node] : starts[node + 1], 1].tolist() for node in front
        ):
            if len(place) < most and neighbour not in place:
                place[neighbour] = len(place)
                new.append(neighbour)
        front = new
    number = np.full(graph.nodes, -1)
    number[[*place]] = np.arange(len(place))
    own = np.concatenate([number[graph.edges[starts[node] : starts[node + 1]]] for node in place])
    return plain(len(place), own[(own >= 0).all(axis=1)])


class GraphInput(Input):
    """The graphs of a split, or the neighbourhoods of nodes in them.

    Args:
        data: its batches are a GraphBatch, as of `lightspan.datamodules.graph.folder.GraphFolder`.
        split: "bank" (training graphs), "val" or "test".
        most: graphs that are taken, evenly spaced among all.
        hops: takes the nodes that are at most so many edges from a node in place of whole graphs, for data of few large
            ones; `most` is then the number of such nodes, evenly spaced among those of all graphs.
        most_nodes: that a graph may have. Of larger neighbourhoods the nearest nodes stay, and larger graphs are left
            out.
    Raises: UserError for settings below 1, or matrices beyond the limit of numbers.
    """

    def __init__(
        self,
        data: LightningDataModule,
        split: Split = "bank",
        most: int = 1_000,
        hops: int | None = None,
        most_nodes: int = 1_000,
    ) -> None:
        require_in("[1, inf)", most=most, hops=hops, most_nodes=most_nodes)
        require_numbers(most_nodes**2, most_nodes=most_nodes)
        self.data, self.split, self.most, self.hops, self.most_nodes = data, split, most, hops, most_nodes

    def load(self, store: FeatureStore) -> GraphCollection:
        """Raises: UserError as the data, for other data than graphs, and where no graph is left."""
        loader = split_loader(self.data, self.split)
        if self.hops is None:
            chosen = {*_spaced(len(loader.dataset), self.most)}
            found = [graph for place, graph in enumerate(_read(loader)) if place in chosen]
        else:
            whole = [*_read(loader)]
            ends = np.cumsum([graph.nodes for graph in whole])
            found = []
            for node in _spaced(int(ends[-1]), self.most):
                at = int(np.searchsorted(ends, node, "right"))
                centre = node - int(ends[at]) + whole[at].nodes
                found.append(neighbourhood(whole[at], centre, self.hops, self.most_nodes))
        small = tuple(graph for graph in found if 1 <= graph.nodes <= self.most_nodes)
        if not small:
            raise UserError(
                f"all of {len(found):,} graphs have no node or more than most_nodes={self.most_nodes}; set hops to "
                "take neighbourhoods of their nodes"
            )
        return GraphCollection(small)

    def outlook(self, store: FeatureStore) -> str:
        return f"graphs of {type(self.data).__name__}, at most {self.most:,}"


def _spaced(count: int, most: int) -> list[int]:
    """At most so many of the first numbers, evenly spaced."""
    kept = min(count, most)
    return (np.arange(kept) * count // max(kept, 1)).tolist()


def _read(loader: object) -> Iterator[PlainGraph]:
    for batch in loader:  # type: ignore[attr-defined]
        graphs_of(batch, "GraphInput")
        for sample in separated(batch, GraphBatch):
            yield plain(len(sample["node"]), sample["edge_index"].T.numpy())
