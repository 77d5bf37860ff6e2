"""What data modules of graphs share: samples with rows of numbers for nodes and edges, the loaders.

Shapes: M graphs, N nodes, E edges, F G numbers of a node and of an edge.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.files.foreign import NUMBERS
from lightspan.core.files.places import ReadPath
from lightspan.core.ranges import require_in, require_numbers
from lightspan.datamodules.graph.batch import GraphBatch
from lightspan.datamodules.graph.graphs import Graph, graph_of
from lightspan.datamodules.graph.molecules import BOND_KINDS, KINDS
from lightspan.datamodules.loading.found_sets import Archive, ArchiveSamples, FoundSets, KeptSamples

MARKS = 2


@dataclass(frozen=True)
class GraphSamples(ArchiveSamples[Graph]):
    """Samples of `GraphBatch`: a function of their number.

    Args:
        node_kinds, edge_kinds: see `GraphSets`.
    """

    node_kinds: int
    edge_kinds: int

    batch_type = GraphBatch

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        number = int(self.numbers[index])
        graph = self.archive.read(number)
        return {
            "node": torch.cat([_rows(graph.kind, graph.mark, self.node_kinds), torch.from_numpy(graph.numbers)], dim=1),
            "edge_index": torch.from_numpy(np.ascontiguousarray(graph.edges.T, np.int64)),
            "edge": _rows(graph.edge_kind, graph.edge_mark, self.edge_kinds),
            "kind": torch.from_numpy(graph.kind.astype(np.int64)),
            "label": int(self.archive.labels[number]),
            "index": index,
        }


def _rows(kind: np.ndarray, mark: np.ndarray, kinds: int) -> Tensor:
    """float32 [N kinds]: 1 in the column of the kind, and for a mark of 1 or 2 in the last but one or the last."""
    rows = torch.zeros(len(kind), kinds)
    rows[torch.arange(len(kind)), torch.from_numpy(kind.astype(np.int64))] = 1
    marked = np.flatnonzero(mark)
    rows[torch.from_numpy(marked), torch.from_numpy(kinds - 1 - MARKS + mark[marked].astype(np.int64))] = 1
    return rows


class GraphSets(FoundSets[Graph]):
    """Graphs of any numbers of nodes and edges, packed: batches of `GraphBatch`. A subclass finds the graphs.

    A node has `node_kinds` numbers, 1 for its kind and 0 for all others, and then its attributes that are numbers. Kind
    0 is none that is known. A molecule's kinds are the numbers of its elements, and the last two columns say how an
    atom's neighbours turn about it. An edge has `edge_kinds` numbers in the same way, for molecules those of single,
    double, triple and aromatic bonds, the last two of bonds that rise and fall. So networks fit all data.

    Args:
        node_kinds, edge_kinds: at least 4, and for molecules 121 and 7.
        batch_size: graphs of one optimiser step over all ranks.
        seed: of the order.
        num_workers: processes that fetch batches.
        selection: as in `lightspan.datamodules.loading.sample_sets.SampleSets`.
    """

    called = "graphs"

    def __init__(
        self,
        node_kinds: int = 128,
        edge_kinds: int = 8,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
        selection: ReadPath | None = None,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, selection)
        require_in("[4, inf)", node_kinds=node_kinds, edge_kinds=edge_kinds)
        require_numbers(node_kinds + edge_kinds, node_kinds=node_kinds, edge_kinds=edge_kinds)
        self.node_kinds, self.edge_kinds = node_kinds, edge_kinds
        self.train: GraphSamples | None = None

    @property
    @abstractmethod
    def number_names(self) -> tuple[str, ...]:
        """Attributes of nodes that are numbers."""

    def training(self, archive: Archive[Graph], numbers: np.ndarray) -> GraphSamples:
        return self.unchanging(archive, numbers)

    def unchanging(self, archive: Archive[Graph], numbers: np.ndarray) -> GraphSamples:
        return GraphSamples(archive, numbers, self.node_kinds, self.edge_kinds)

    def described(self) -> str:
        return f"{self.node_kinds} kinds of nodes and {self.edge_kinds} of edges"

    def require_room(self, rows: int) -> None:
        """Raises: UserError for a graph of more nodes or edges than kinds allow."""
        if rows * self.node_kinds > NUMBERS.most:
            raise UserError(
                f"a graph has {rows:,} nodes or edges, which with node_kinds={self.node_kinds} are more than "
                f"{NUMBERS.most:,} numbers; lower data.init_args.node_kinds, or raise the limit with {NUMBERS.setting} "
                "in the environment"
            )

    def require_molecules(self) -> None:
        """Raises: UserError for too few kinds for molecules."""
        for name, given, least in (
            ("node_kinds", self.node_kinds, KINDS + MARKS),
            ("edge_kinds", self.edge_kinds, BOND_KINDS + MARKS),
        ):
            if given < least:
                raise UserError(
                    f"{name}={given} must be at least {least} for molecules; leave data.init_args.{name} out"
                )

    def blank_samples(self) -> GraphSamples:
        """Two training samples of two nodes with an edge, for plans where the data are not here."""
        pair, _ = graph_of(
            np.array([1, 2]), np.array([[0, 1]]), np.ones(1), False, np.zeros((2, len(self.number_names)))
        )
        return self.training(KeptSamples([pair, pair]), np.arange(2))
