"""Graphs of files: GraphML, GML, JSON of nodes and links, CSV of edges, and molecules as SMILES and SDF. Without torch.

Files are those of others: nothing in one runs, none names another one, and what would fill the memory is refused.
Shapes: N nodes, E edges, F numbers of a node.
"""

import csv
import io
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from xml.parsers import expat

import numpy as np

from lightspan.core.errors import UserError, install_extra, one_line
from lightspan.core.files.foreign import (
    CELLS,
    NUMBERS,
    bounded_memory,
    bounded_time,
    content_of,
    opened_regular,
    whole_text,
)
from lightspan.datamodules.graph.graphs import Graph, LeftOut, graph_of
from lightspan.datamodules.graph.molecules import Form, molecules
from lightspan.datamodules.image.picture_files import Kind
from lightspan.datamodules.table.columns import DELIMITERS, read_columns

GRAPHS = Kind(
    "graph",
    "GraphML, GML, JSON, CSV, SMILES (.smi) or SDF",
    (".graphml", ".gml", ".json", ".csv", ".tsv", ".smi", ".sdf"),
    holds_several=True,
)
SMILES = ("smiles", "canonical_smiles", "isomeric_smiles")
"""A table with one of these columns, in letters of any case, has a molecule in each row."""
FIRSTS = ("source", "from", "src", "u", "head", "node1", "node_1", "start")
"""With one of these words in its first line, a file of edges names its columns there."""
LONGEST_WORD = 80
MOST_NAMED = 10
"""Attributes in a message."""


@dataclass
class WordNumbers:
    """Words in the order in which they come, from 1; 0 is the empty one."""

    number: dict[str, int] = field(default_factory=lambda: {"": 0})

    def of(self, words: Sequence[Any]) -> np.ndarray:
        """int32, the number of each."""
        made = (self.number.setdefault(word, len(self.number)) for word in map(_word, words))
        return np.fromiter(made, np.int32, len(words))


@dataclass(frozen=True)
class GraphReader:
    """Reads files, and numbers the kinds of their nodes and edges as they come.

    Args:
        kind: attribute of nodes and of edges, whose words or numbers are their kinds.
        numbers: attributes of nodes that are numbers.
        directed: whether edges keep their directions.
        words, edge_words: numbers of the kinds so far.
        attributes: names of those that nodes have had so far.
    """

    kind: str
    numbers: tuple[str, ...]
    directed: bool
    words: WordNumbers = field(default_factory=WordNumbers)
    edge_words: WordNumbers = field(default_factory=WordNumbers)
    attributes: set[str] = field(default_factory=set)

    def read(self, path: Path) -> Iterator[tuple[Graph, LeftOut] | str]:
        """The graphs of a file, or what is wrong with one of several.

        Raises: ValueError for a file that is damaged, or beyond the limits; UserError without the extra `graphs`.
        """
        ending = path.suffix.lower()
        if ending in (".csv", ".tsv"):
            text = whole_text(path)
            column = smiles_column(text)
            if column is None:
                yield self._edges(text)
                return
            yield from _molecules(read_columns(path)[column])
        elif ending == ".smi":
            lines = (line.split() for line in whole_text(path).split("\n"))
            yield from _molecules([parts[0] for parts in lines if parts])
        elif ending == ".sdf":
            yield from _molecules([text for text in whole_text(path).split("$$$$\n") if text.strip()], "sdf")
        elif ending == ".json":
            yield self._links(_json(content_of(path)))
        else:
            yield self._networkx(content_of(path), ending)

    def _made(
        self, names: Sequence[Mapping[str, Any]], edges: Any, edge_words: Sequence[Any], is_directed: bool
    ) -> tuple[Graph, LeftOut]:
        numbers = np.array([[_number(node.get(name)) for name in self.numbers] for node in names])
        self.attributes.update(str(name) for node in names for name in node)
        kinds = self.words.of([node.get(self.kind) for node in names])
        found = self.edge_words.of(edge_words)
        return graph_of(
            kinds, edges, found, self.directed and is_directed, numbers.reshape(len(names), len(self.numbers))
        )

    def _edges(self, text: str) -> tuple[Graph, LeftOut]:
        """Lines of two nodes and perhaps more columns; a node alone has no edge."""
        if not text.strip():
            raise ValueError("it is empty")
        first = next((line for line in text.split("\n") if line.strip() and not line.startswith("#")), "")
        delimiter = max(f"{DELIMITERS} ", key=first.count)
        CELLS.require(text.count(delimiter) + text.count("\n"))
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
        place, edges, kinds, column = dict[str, int](), list[int](), list[str](), -1
        with bounded_memory(), bounded_time():
            try:
                for number, row in enumerate(row for row in rows if row and not row[0].startswith("#")):
                    if number == 0 and row[0].strip().lower() in FIRSTS:
                        names = [name.strip() for name in row]
                        column = names.index(self.kind, 2) if self.kind in names[2:] else -1
                        continue
                    ends = [end for end in map(str.strip, row[:2]) if end]
                    if not ends:
                        raise ValueError(f"line {rows.line_num} names no node")
                    for end in ends:
                        place.setdefault(end, len(place))
                    if len(ends) == 2:
                        edges += [place[end] for end in ends]
                        kinds.append(row[column] if 0 <= column < len(row) else "")
            except csv.Error as error:
                raise ValueError(f"line {rows.line_num}: {error}") from error
            return self._made([{}] * len(place), np.array(edges, np.int64).reshape(-1, 2), kinds, True)

    def _links(self, found: Any) -> tuple[Graph, LeftOut]:
        """JSON as networkx and D3 write it."""
        if not isinstance(found, dict) or not isinstance(found.get("nodes"), list):
            raise ValueError("it is no graph as JSON: an object with lists of nodes and of links or edges")
        links = found.get("links", found.get("edges", []))
        nodes = [node if isinstance(node, dict) else {"id": node} for node in found["nodes"]]
        if not isinstance(links, list) or not all(isinstance(link, dict) for link in links):
            raise ValueError("its links are no list of objects with source and target")
        place = {_name(node.get("id", number)): number for number, node in enumerate(nodes)}
        if len(place) < len(nodes):
            raise ValueError("two of its nodes have the same id")
        ends = [(_name(link.get("source")), _name(link.get("target"))) for link in links]
        if (unknown := next((end for pair in ends for end in pair if end not in place), None)) is not None:
            raise ValueError(f"it has a link of node {one_line(unknown)[:40]}, which is not there")
        edges = np.array([[place[end] for end in pair] for pair in ends], np.int64)
        return self._made(nodes, edges, [link.get(self.kind) for link in links], bool(found.get("directed")))

    def _networkx(self, content: bytes, ending: str) -> tuple[Graph, LeftOut]:
        try:
            import networkx
        except ImportError as error:
            raise UserError(f"GraphML and GML are read by networkx; install it: {install_extra('graphs')}") from error
        if not content.strip():
            raise ValueError("it is empty")
        NUMBERS.require(len(content) // 4)
        try:
            with bounded_memory(), bounded_time():
                if ending == ".gml":
                    graph = networkx.parse_gml(content.decode("utf-8-sig").split("\n"), label="id")
                else:
                    _require_plain(content)
                    graph = networkx.read_graphml(io.BytesIO(content))
        except UserError:
            raise
        except Exception as error:  # its readers raise all kinds
            said = str(error) or type(error).__name__
            raise ValueError(said if said.startswith("it ") else f"it is damaged: {said}") from error
        place = {node: number for number, node in enumerate(graph.nodes)}
        found = [(place[a], place[b], data.get(self.kind)) for a, b, data in graph.edges(data=True)]
        edges = np.array([pair[:2] for pair in found], np.int64)
        nodes = [data for _, data in graph.nodes(data=True)]
        return self._made(nodes, edges, [kind for *_, kind in found], graph.is_directed())


def require_kinds(who: str, kind: str, words: Collection[str], attributes: Collection[str], folder: Path) -> None:
    """Raises: UserError where no node of a folder has a kind.

    Args:
        who: what reads kinds, for messages.
        kind: the attribute.
        words: the kinds that were read, with the empty one.
        attributes: names of all that nodes have.
    """
    if not {*words} - {""}:
        raise UserError(
            f"{who} reads the kinds of nodes, and no node in {folder} has one as its attribute {kind}; "
            f"{_instead('kind', 'the one that is meant', attributes)}"
        )


def require_numbers_of_nodes(numbers: Sequence[str], attributes: Collection[str], folder: Path) -> None:
    """Raises: UserError for an attribute that no node of a folder has. Arguments are those of `require_kinds`."""
    if lacking := [name for name in numbers if name not in attributes]:
        raise UserError(
            f"data.init_args.numbers asks for {', '.join(lacking)}, and no node in {folder} has such an attribute; "
            f"{_instead('numbers', 'those that are meant, or leave it out', attributes)}"
        )


def _instead(setting: str, which: str, attributes: Collection[str]) -> str:
    if not attributes:
        return "its nodes have no attributes; take files that have them"
    named = one_line(", ".join(sorted(attributes)[:MOST_NAMED]))
    more = f" and {len(attributes) - MOST_NAMED} more" if len(attributes) > MOST_NAMED else ""
    return f"its nodes have {named}{more}; set data.init_args.{setting} to {which}"


def smiles_column(text: str) -> str | None:
    """The column of a table that has molecules, by the first line; None of a file of edges.

    Raises: ValueError for a first line that is no row of a table.
    """
    first = text.partition("\n")[0]
    try:
        names = next(iter(csv.reader([first], delimiter=max(DELIMITERS, key=first.count))), [])
    except csv.Error as error:
        raise ValueError(f"line 1: {error}") from error
    return next((name.strip() for name in names if name.strip().lower() in SMILES), None)


def is_graph(path: Path) -> bool:
    """Whether a file of `GRAPHS` looks like one by its first lines, where others have its ending too: JSON with a list
    of nodes, and a table with a column of molecules or with edges, of which the first column is named by `FIRSTS`.
    """
    ending = path.suffix.lower()
    if ending not in (".json", ".csv", ".tsv"):
        return True
    try:
        with opened_regular(path) as file:
            start = file.read(2**16).decode("utf-8-sig", "replace")
    except (OSError, ValueError):
        return False
    if ending == ".json":
        return re.search(r'"nodes"\s*:\s*\[', start) is not None
    first = next((line for line in start.split("\n") if line.strip() and not line.startswith("#")), "")
    word = re.split(rf"[{re.escape(DELIMITERS)} ]", first)[0].strip().strip('"').lower()
    return word in FIRSTS or is_of_molecules(path)


def is_of_molecules(path: Path) -> bool:
    """Whether a file has molecules, by its ending or its first line; not if it cannot be read, which reading says."""
    if path.suffix.lower() in (".smi", ".sdf"):
        return True
    if path.suffix.lower() not in (".csv", ".tsv"):
        return False
    try:
        with opened_regular(path) as file:
            return smiles_column(file.read(2**12).decode("utf-8-sig", "replace")) is not None
    except (OSError, ValueError):
        return False


def _molecules(texts: Collection[Any], form: Form = "smiles") -> Iterator[tuple[Graph, LeftOut] | str]:
    if not len(texts):
        raise ValueError("it has no molecule")
    rows = iter(texts)
    while some := ["" if text is None else str(text) for text in islice(rows, 2**12)]:
        for found in molecules(some, form):
            yield found if isinstance(found, str) else (found, LeftOut())


def _require_plain(content: bytes) -> None:
    """Raises: ValueError for XML with declarations of its own, which may unfold to any size, in whatever encoding."""

    def refuse(*_: object) -> None:
        raise ValueError("it has declarations of its own (<!DOCTYPE or <!ENTITY); write it without them")

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.Parse(content, True)


def _json(content: bytes) -> Any:
    try:
        with bounded_memory(), bounded_time():
            return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is JSON that is nested too deep") from error
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}" if content.strip() else "it is empty") from error


def _name(given: Any) -> str:
    """The name of a node: numbers and texts that are written alike are one."""
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        raise ValueError("one of its nodes or links names a node by what is neither text nor a number")
    return str(given)


def _word(given: Any) -> str:
    if isinstance(given, float) and given.is_integer():
        given = int(given)
    return str(given).strip()[:LONGEST_WORD] if isinstance(given, str | int | float) else ""


def _number(given: Any) -> float:
    """NaN of what is none."""
    try:
        return float(given) if isinstance(given, str | int | float) else math.nan
    except (ValueError, OverflowError):
        return math.nan
