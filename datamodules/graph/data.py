"""What data modules of graphs share: samples with rows of numbers for nodes and edges, the loaders.

Shapes: M graphs, N nodes, E edges, F G numbers of a node and of an edge.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lightspan.core.collate import collated
from lightspan.core.errors import UserError
from lightspan.core.files.foreign import NUMBERS
from lightspan.core.ranges import require_in, require_numbers
from lightspan.datamodules.graph.batch import GraphBatch
from lightspan.datamodules.graph.graphs import Graph, graph_of
from lightspan.datamodules.graph.molecules import BOND_KINDS, KINDS
from lightspan.datamodules.loading.loader import EvaluationLoader
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.loading.sample_sets import SampleSets, require_split

MARKS = 2


class GraphArchive(Protocol):
    """Graphs by number."""

    @property
    def labels(self) -> np.ndarray:
        """int64 [M]."""
        ...

    def read(self, number: int) -> Graph: ...


@dataclass(frozen=True)
class KeptGraphs:
    """Graphs in memory, without labels."""

    graphs: Sequence[Graph]

    @cached_property
    def labels(self) -> np.ndarray:
        return np.zeros(len(self.graphs), np.int64)

    def read(self, number: int) -> Graph:
        return self.graphs[number]


class FoundGraphs(NamedTuple):
    """What a data module found: all graphs; the numbers of those that train and validate, int64, ascending; names of
    the classes, none without labels; what identifies the training graphs, with which alone a run resumes; and the most
    nodes and edges that a graph has.
    """

    archive: GraphArchive
    train: np.ndarray
    val: np.ndarray
    classes: Sequence[str]
    content: str
    most: int


@dataclass(frozen=True)
class GraphSamples:
    """Samples of `GraphBatch`: a function of their number.

    Args:
        numbers: of the archive's graphs, int64 [M].
        node_kinds, edge_kinds: see `GraphSets`.
    """

    archive: GraphArchive
    numbers: np.ndarray
    node_kinds: int
    edge_kinds: int

    batch_type = GraphBatch

    def __len__(self) -> int:
        return len(self.numbers)

    def labels(self) -> np.ndarray:
        """int64 [M]."""
        return self.archive.labels[self.numbers]

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


class GraphSets(SampleSets):
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

    Attributes:
        labelled: whether graphs have labels, known after `setup`; without, all labels are 0.
        classes: their names.
    """

    def __init__(
        self,
        node_kinds: int = 128,
        edge_kinds: int = 8,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, num_workers)
        require_in("[4, inf)", node_kinds=node_kinds, edge_kinds=edge_kinds)
        require_numbers(node_kinds + edge_kinds, node_kinds=node_kinds, edge_kinds=edge_kinds)
        self.node_kinds, self.edge_kinds = node_kinds, edge_kinds
        self.labelled, self.classes = False, tuple[str, ...]()
        self.train: GraphSamples | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes as words, with spaces for underscores."""
        return tuple(name.replace("_", " ") for name in self.classes)

    @property
    @abstractmethod
    def number_names(self) -> tuple[str, ...]:
        """Attributes of nodes that are numbers."""

    @abstractmethod
    def find(self) -> FoundGraphs:
        """Finds and splits the graphs; says what is unusual about them."""

    def setup(self, stage: str | None = None) -> None:
        """Once. Raises: UserError where nothing is left to train or to validate on, and what `find` raises."""
        if self.train is not None:
            return
        found = self.find()
        require_split("readable graphs", train=found.train, val=found.val)
        if found.most * self.node_kinds > NUMBERS.most:
            raise UserError(
                f"a graph has {found.most:,} nodes or edges, which with node_kinds={self.node_kinds} are more than "
                f"{NUMBERS.most:,} numbers; lower data.init_args.node_kinds, or raise the limit with {NUMBERS.setting} "
                "in the environment"
            )
        self.train, self.bank, self.val = (
            GraphSamples(found.archive, numbers, self.node_kinds, self.edge_kinds)
            for numbers in (found.train, found.train, found.val)
        )
        self.labelled, self.classes, self._content = bool(found.classes), tuple(found.classes), found.content
        say(
            f"graphs: {len(found.train):,} for training and {len(found.val):,} for validation, "
            + (f"{len(self.classes):,} classes" if self.classes else "without labels")
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
        return GraphSamples(KeptGraphs([pair, pair]), np.arange(2), self.node_kinds, self.edge_kinds)

    def stand_in(self) -> dict[str, Any] | None:
        samples = self.blank()
        if samples is None:
            return None
        return collated([samples.sample(index, 0) for index in range(2)], GraphBatch)

    def test_dataloader(self) -> EvaluationLoader:
        """The validation graphs: no others are held out."""
        return self.val_dataloader()

    def training_content(self) -> str:
        return self._content
