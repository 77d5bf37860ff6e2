"""Collections of graphs as inputs of a recipe: their edges alone, whatever is known of nodes."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in, require_numbers
from lightspan.datamodules.graph.data import GraphSets
from lightspan.datamodules.graph.graphs import Graph, ego_net, graph_of
from lightspan.datamodules.loading.sample_sets import spaced
from lightspan.evaluation.features.input import Input
from lightspan.evaluation.features.store import FeatureStore


@dataclass(frozen=True)
class PlainGraph:
    """A graph without directions, kinds, and edges from a node to itself.

    Attributes:
        nodes: how many.
        edges: int64 [E 2], each both ways.
    """

    nodes: int
    edges: np.ndarray

    def adjacency(self) -> np.ndarray:
        """0 and 1, float64 [nodes nodes]."""
        matrix = np.zeros((self.nodes, self.nodes))
        matrix[self.edges[:, 0], self.edges[:, 1]] = 1
        return matrix


@dataclass(frozen=True)
class GraphCollection:
    """Graphs that one thing drew, or may have drawn."""

    graphs: tuple[PlainGraph, ...]

    def __len__(self) -> int:
        return len(self.graphs)


def _both_ways(graph: Graph) -> Graph:
    return graph_of(graph.kind, graph.edges, graph.edge_kind, False)[0]


class Graphs(Input):
    """The graphs of a split, or the neighbourhoods of nodes in them.

    Args:
        data: graphs or molecules.
        split: "bank" (what trains) or "val".
        most: graphs that are taken, evenly spaced among all.
        hops: takes the nodes that are at most so many edges from a node in place of whole graphs, for data of few large
            ones; `most` is then the number of such nodes, evenly spaced among those of all graphs.
        most_nodes: that a graph may have. Of larger neighbourhoods the nearest nodes stay, and larger graphs are left
            out.
    Raises: UserError for settings below 1, or matrices beyond the limit of numbers.
    """

    def __init__(
        self,
        data: GraphSets,
        split: Literal["bank", "val"] = "bank",
        most: int = 1_000,
        hops: int | None = None,
        most_nodes: int = 1_000,
    ) -> None:
        require_in("[1, inf)", most=most, hops=hops, most_nodes=most_nodes)
        require_numbers(most_nodes**2, most_nodes=most_nodes)
        self.data, self.split, self.most, self.hops, self.most_nodes = data, split, most, hops, most_nodes

    def load(self, store: FeatureStore) -> GraphCollection:
        """Raises: UserError as the data, and where no graph is left."""
        self.data.setup()
        samples = getattr(self.data, self.split)
        read = samples.archive.read
        if self.hops is None:
            numbers = spaced(samples.numbers, min(self.most, len(samples.numbers)))
            found = [read(int(number)) for number in numbers]
        else:
            found, sizes = [], np.array([len(read(int(number)).kind) for number in samples.numbers])
            ends = np.cumsum(sizes)
            for node in spaced(np.arange(ends[-1]), min(self.most, int(ends[-1]))):
                at = int(np.searchsorted(ends, node, "right"))
                graph = _both_ways(read(int(samples.numbers[at])))
                found.append(ego_net(graph, int(node - ends[at] + sizes[at]), self.hops, self.most_nodes))
        small = [_both_ways(graph) for graph in found if len(graph.kind) <= self.most_nodes]
        if not small:
            raise UserError(
                f"{len(found):,} graphs have more than most_nodes={self.most_nodes} nodes each; set hops to take "
                "neighbourhoods of their nodes"
            )
        return GraphCollection(tuple(PlainGraph(len(graph.kind), graph.edges.astype(np.int64)) for graph in small))

    def outlook(self, store: FeatureStore) -> str:
        return f"graphs of {type(self.data).__name__}, at most {self.most:,}"
