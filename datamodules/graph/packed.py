"""Graphs read once, into files that all ranks, workers and later runs map.

Shapes: M graphs, N nodes and E edges of all of them, F numbers of a node.
"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from rich.progress import track

from lightspan.core.errors import UserError, one_line
from lightspan.core.files.foreign import NUMBERS
from lightspan.core.files.places import CachePath, PathUse
from lightspan.datamodules.graph.graphs import Graph, LeftOut
from lightspan.datamodules.graph.reading import GraphReader, is_of_molecules
from lightspan.datamodules.loading.packs import PackCache, file_state

VERSION = 2  # of what becomes of a file; another one packs anew
_ARRAYS = {
    "kind": np.int32,
    "mark": np.int8,
    "numbers": np.float32,
    "edges": np.int32,
    "edge_kind": np.int32,
    "edge_mark": np.int8,
}
_ABOUT_GRAPHS = {"nodes": np.int64, "links": np.int64, "file": np.int32, "row": np.int32, "digest": np.uint64}
_GROWTH = 4  # bytes that a byte of a file becomes, at most


@dataclass(frozen=True)
class PackedGraphs:
    """The graphs of one folder.

    Attributes:
        folder: of the pack.
        about: what is known of all: the `words` and `edge_words` of kinds by number, `attributes` (names of those of
            nodes), `molecules` (whether these are
            numbers of elements and bonds instead), `left_out`, `damage`, sizes.
        labels: int64 [M].
        kinds, edge_kinds: what becomes of each number, int32; None leaves them.
    """

    folder: Annotated[Path, PathUse.READ]
    about: Mapping[str, Any]
    labels: np.ndarray
    kinds: np.ndarray | None = field(default=None)
    edge_kinds: np.ndarray | None = field(default=None)

    def __len__(self) -> int:
        return int(self.about["graphs"])

    def column(self, name: str) -> np.ndarray:
        """Of all graphs one after another: `nodes`, `links`, `file`, `row`, `digest`, or an array of `Graph`."""
        shapes = {"edges": (self.about["edges"], 2), "numbers": (self.about["nodes"], self.about["numbers"])}
        counts = {"kind": "nodes", "mark": "nodes", "edge_kind": "edges", "edge_mark": "edges"}
        shape = shapes.get(name, (self.about[counts.get(name, "graphs")],))
        return _mapped(self.folder / name, (_ARRAYS | _ABOUT_GRAPHS)[name], tuple(shape))

    def read(self, number: int) -> Graph:
        nodes, links = (self._rows_of(name, number) for name in ("nodes", "links"))
        found = Graph(*(np.array(self.column(name)[links if "edge" in name else nodes]) for name in Graph._fields))
        return found._replace(
            kind=found.kind if self.kinds is None else self.kinds[found.kind],
            edge_kind=found.edge_kind if self.edge_kinds is None else self.edge_kinds[found.edge_kind],
        )

    def _rows_of(self, ends: str, number: int) -> slice:
        ends_M = self.column(ends)
        return slice(int(ends_M[number - 1]) if number else 0, int(ends_M[number]))

    def numbered(self, kinds: Mapping[str, int], edge_kinds: Mapping[str, int]) -> "PackedGraphs":
        """With kinds by words: 0 for those that are not in the mapping. Molecules stay as they are."""
        if self.about["molecules"]:
            return self
        numbers = (
            np.array([known.get(word, 0) for word in self.about[name]], np.int32)
            for name, known in (("words", kinds), ("edge_words", edge_kinds))
        )
        return replace(self, kinds=next(numbers), edge_kinds=next(numbers))

    def content(self, chosen: np.ndarray) -> str:
        """What tells these graphs from others."""
        digest = hashlib.sha256(np.ascontiguousarray(self.column("digest")[chosen]).tobytes())
        for part in (self.labels[chosen], chosen, self.kinds, self.edge_kinds):
            digest.update(b"" if part is None else part.tobytes())
        return digest.hexdigest()[:32]


@lru_cache(maxsize=64)
def _mapped(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    return np.memmap(path, dtype, "r", shape=shape) if np.prod(shape) else np.zeros(shape, dtype)


class GraphCache:
    """Packs of graphs (`PackCache`), told apart by the files' names, sizes and times, and by how they are read.

    Args:
        folder, limit_gib: as in `PackCache`.
    """

    def __init__(self, folder: CachePath | None, limit_gib: float) -> None:
        self.packs = PackCache(folder, "graphs", limit_gib)

    def packed(
        self,
        folder: Path,
        names: Sequence[str],
        labels: np.ndarray,
        kind: str,
        numbers: tuple[str, ...],
        directed: bool,
    ) -> PackedGraphs:
        """The pack of these files.

        Args:
            labels: of the files, int64.
            kind, numbers, directed: see `GraphReader`.
        Raises: UserError if it would be larger than all packs may be, and for molecules beside other graphs.
        """
        states: list[list[Any]] = [[one_line(name), *file_state(folder / name)] for name in names]
        settings = [VERSION, NUMBERS.most, kind, numbers, directed]
        key = hashlib.sha256(json.dumps([settings, states]).encode()).hexdigest()[:32]
        size = _GROWTH * sum(max(state[1], 0) for state in states)
        self.packs.require_room(size, f"the graphs of {len(names):,} files", "or name fewer files")
        are = {name: is_of_molecules(folder / name) for name in names}
        if len({*are.values()}) > 1:
            one, other = (next(name for name in names if are[name] is which) for which in (True, False))
            raise UserError(
                f"{folder} has molecules, such as {one_line(one)}, and other graphs, such as {one_line(other)}; give "
                "each a folder of its own"
            )
        write = partial(_write, folder, names, GraphReader(kind, numbers, directed), are[names[0]])
        pack, about = self.packs.pack(key, size, write)
        found = PackedGraphs(pack, about, np.zeros(0, np.int64))
        return replace(found, labels=np.asarray(labels, np.int64)[found.column("file")])


def _write(folder: Path, names: Sequence[str], reader: GraphReader, molecules: bool, to: Path) -> dict[str, Any]:
    totals = dict.fromkeys(("graphs", "nodes", "edges"), 0)
    damage, left_out, rows = list[tuple[str, str]](), LeftOut(), 0
    with ExitStack() as stack:
        files = {name: stack.enter_context((to / name).open("wb")) for name in (*_ARRAYS, *_ABOUT_GRAPHS)}

        def keep(graph: Graph, file: int, row: int) -> None:
            digest = hashlib.sha256()
            for name, array in zip(Graph._fields, graph, strict=True):
                files[name].write(array.tobytes())
                digest.update(array.tobytes())
            totals["graphs"] += 1
            totals["nodes"] += len(graph.kind)
            totals["edges"] += len(graph.edges)
            said = {"nodes": totals["nodes"], "links": totals["edges"], "file": file, "row": row}
            for name, number in (said | {"digest": int.from_bytes(digest.digest()[:8], "little")}).items():
                files[name].write(np.array(number, _ABOUT_GRAPHS[name]).tobytes())

        for file, name in enumerate(track(names, "reading graphs", transient=True, disable=not sys.stdout.isatty())):
            row = 0
            try:
                for row, found in enumerate(reader.read(folder / name), 1):
                    rows += 1
                    if isinstance(found, str):
                        damage.append((f"{name} row {row}", found))
                    else:
                        keep(found[0], file, row)
                        left_out += found[1]
            except UserError:  # of this machine, not of the file
                raise
            except (ValueError, OSError, MemoryError) as error:
                rows += 1
                reason = error.strerror if isinstance(error, OSError) else None
                damage.append((name, reason or str(error) or type(error).__name__))
    words = {"words": list(reader.words.number), "edge_words": list(reader.edge_words.number)}
    words["attributes"] = sorted(reader.attributes)
    known = {"numbers": 0 if molecules else len(reader.numbers), "molecules": molecules, "rows": rows}
    return {**totals, **known, **words, "left_out": left_out, "damage": damage, "folder": str(folder)}
