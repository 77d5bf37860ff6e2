"""Any folder of graphs or of molecules as a data module."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import expanded
from lightspan.core.files.places import CachePath, ReadPath
from lightspan.core.ranges import require_in
from lightspan.datamodules.graph.data import GraphSamples, GraphSets
from lightspan.datamodules.graph.graphs import Graph, LeftOut
from lightspan.datamodules.graph.packed import GraphCache, PackedGraphs
from lightspan.datamodules.graph.reading import GRAPHS, require_kinds, require_numbers_of_nodes
from lightspan.datamodules.image.data import held_out
from lightspan.datamodules.image.picture_files import Labels, Links, PictureFiles, find_labelled
from lightspan.datamodules.loading.damage import report_damage
from lightspan.datamodules.loading.found_sets import FoundSamples
from lightspan.datamodules.loading.ranks import say


@dataclass(frozen=True)
class JoinedGraphs:
    """The graphs of one or two folders, one after the other."""

    packs: Sequence[PackedGraphs]

    @property
    def labels(self) -> np.ndarray:
        """int64 [M]."""
        return np.concatenate([pack.labels for pack in self.packs])

    def read(self, number: int) -> Graph:
        first = len(self.packs[0])
        return self.packs[0].read(number) if number < first else self.packs[1].read(number - first)


class GraphFolder(GraphSets):
    """The graphs in the files below a folder: GraphML, GML, JSON of nodes and links, and CSV or TSV of edges are one
    graph each; a CSV file with a column `smiles`, a `.smi` and an SDF file have any number of molecules.

    Each file is read once and kept in a cache on disk, from which all ranks and workers and later runs read. Edges from
    a node to itself, and edges that come again, are left out.

    Args:
        folder: with or without a sub-folder for each class.
        val_folder: files for validation, with sub-folders of the same names; None holds out `val_share`.
        val_share: share of the graphs of each class held out, in (0, 1), by a hash of their names.
        kind: attribute of nodes and edges with their kinds, words or numbers. The most frequent ones are told apart.
        numbers: attributes of nodes that are numbers; 0 stands for one that is missing, NaN or infinite.
        directed: True keeps the directions of edges, where a file says that they have some; False lets all edges go
            both ways.
        labels, links: as in `lightspan.datamodules.image.picture_files.find_labelled`.
        skip_damaged: True trains without files and rows that cannot be read and names them; False refuses to start.
        cache_dir: folder of the cache; None means ~/.cache/lightspan/graphs. A recipe may name one below
            ~/.cache/lightspan or `${run}`, a flag any.
        cache_gib: GiB that all cached graphs together may use.
        settings: those of `GraphSets`.
    Raises: UserError before the first step: for no file, damaged ones (all are named), `numbers` that no node has, a
        set larger than the cache, and without the extra `graphs`.
    """

    def __init__(
        self,
        folder: ReadPath,
        val_folder: ReadPath | None = None,
        val_share: float = 0.1,
        kind: str = "kind",
        numbers: tuple[str, ...] = (),
        directed: bool = False,
        labels: Labels = "auto",
        links: Links = "skip",
        skip_damaged: bool = False,
        cache_dir: CachePath | None = None,
        cache_gib: float = 32,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        require_in("(0, 1)", val_share=val_share)
        if len({*numbers}) < len(numbers):
            raise UserError(f"numbers={list(numbers)} names one twice")
        self.folder = expanded(folder, "data.init_args.folder")
        self.val_folder = None if val_folder is None else expanded(val_folder, "data.init_args.val_folder")
        self.val_share, self.kind, self.numbers, self.directed = val_share, kind, tuple(numbers), directed
        self.labels, self.links, self.skip_damaged = labels, links, skip_damaged
        self.cache = GraphCache(cache_dir, cache_gib)
        self._pack: PackedGraphs | None = None

    @property
    def number_names(self) -> tuple[str, ...]:
        return self.numbers

    def blank(self) -> GraphSamples | None:
        """Two samples of a pair of nodes, where the folder is not here."""
        return None if self.folder.exists() else self.blank_samples()

    def find(self) -> FoundSamples[Graph]:
        training = self._found(self.folder)
        sets = [training] if self.val_folder is None else [training, self._found(self.val_folder).like(training)]
        packs = [
            self.cache.packed(found.folder, found.names, found.labels, self.kind, self.numbers, self.directed)
            for found in sets
        ]
        self._pack = packs[0]
        if not packs[0].about["molecules"]:
            require_numbers_of_nodes(self.numbers, packs[0].about["attributes"], self.folder)
            if packs[0].about["words"] == [""]:
                say(f"no node has a kind as its attribute {self.kind}; data.init_args.kind names another one")
        return joined_graphs(self, sets, packs, self.val_share, self.skip_damaged)

    def require_kinds(self, who: str) -> None:
        """Raises: UserError where no training node has a kind, known after `setup`. who: what reads kinds."""
        if self._pack is not None and not (about := self._pack.about)["molecules"]:
            require_kinds(who, self.kind, about["words"], about["attributes"], self.folder)

    def _found(self, folder: Path) -> PictureFiles:
        files = find_labelled(folder, GRAPHS, self.links, self.labels)
        for remark in files.remarks:
            say(f"{folder}: {remark}")
        return files


def joined_graphs(
    data: GraphSets, sets: Sequence[PictureFiles], packs: Sequence[PackedGraphs], val_share: float, skips: bool
) -> FoundSamples[Graph]:
    """The graphs of a folder, of which a share is held out, or of one to train on and one to validate on.

    Raises: UserError for damaged ones, unless they are skipped, and for kinds that have no place.
    """
    training = sets[0]
    damage = [
        (found.folder / name, why)
        for found, pack in zip(sets, packs, strict=True)
        for name, why in pack.about["damage"]
    ]
    report_damage(damage, sum(pack.about["rows"] for pack in packs), "graphs", skips)
    if packs[0].about["molecules"]:
        data.require_molecules()
        if data.number_names:
            raise UserError(f"numbers={list(data.number_names)} are of nodes, and atoms have none; leave them out")
    if any(pack.about["molecules"] != packs[0].about["molecules"] for pack in packs):
        raise UserError(f"{sets[1].folder} and {training.folder} must both have molecules, or both other graphs")
    kinds, edge_kinds = (
        _most_frequent(packs[0], name, words, most, setting)
        for name, words, most, setting in (
            ("kind", "words", data.node_kinds, "node_kinds"),
            ("edge_kind", "edge_words", data.edge_kinds, "edge_kinds"),
        )
    )
    packs = [pack.numbered(kinds, edge_kinds) for pack in packs]
    _say_left_out(sum((LeftOut(*pack.about["left_out"]) for pack in packs), LeftOut()))
    first = len(packs[0])
    if len(packs) == 1:
        files, rows = packs[0].column("file"), packs[0].column("row")
        names = [f"{training.names[file]}/{row}" for file, row in zip(files.tolist(), rows.tolist(), strict=True)]
        inside = held_out(names, packs[0].labels, val_share)
        train, val = np.flatnonzero(~inside), np.flatnonzero(inside)
    else:
        train, val = np.arange(first), first + np.arange(len(packs[1]))
    sizes = [np.diff(pack.column(name), prepend=0) for pack in packs for name in ("nodes", "links")]
    data.require_room(max((int(each.max()) for each in sizes if len(each)), default=0))
    return FoundSamples(JoinedGraphs(packs), train, val, training.classes, packs[0].content(train))


def _most_frequent(pack: PackedGraphs, column: str, words: str, most: int, setting: str) -> dict[str, int]:
    """Numbers from 1 of words, the most frequent ones first, of equally frequent ones in the order of the alphabet."""
    names = pack.about[words]
    counts = np.bincount(pack.column(column), minlength=len(names)) if not pack.about["molecules"] else np.zeros(1)
    known = sorted((-int(count), name) for name, count in zip(names, counts, strict=False) if name and count)
    if len(known) >= most:
        rare = -sum(count for count, _ in known[most - 1 :])
        say(f"{len(known):,} kinds, of which {setting}={most} tells {most - 1:,} apart; {rare:,} are of the others")
    return {name: number for number, (_, name) in enumerate(known[: most - 1], 1)}


def _say_left_out(found: LeftOut) -> None:
    for count, what in zip(
        found,
        (
            "edges from a node to itself were left out",
            "edges that come again were left out",
            "numbers that are missing, NaN or infinite are 0",
        ),
        strict=True,
    ):
        if count:
            say(f"{count:,} {what}")
