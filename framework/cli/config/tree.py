"""YAML as a tree that remembers where every value was written.

A `Node` is a scalar, a mapping or a list, plus the place it was written (`file:line`, or `command line`) and the nodes
that it replaced while layers were merged. Reading is strict: one document, a mapping at the root, no duplicate keys, no
tags beyond the plain ones. `1e-3` is a number, `on`, `yes`, `2024-01-01` and `1:30` are text.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from lightspan.core.errors import UserError, first_lines

Key = str | int
KeyPath = tuple[Key, ...]
Scalar = str | int | float | bool | None

MAX_NODES = 20_000  # an alias may repeat a branch: this stops exponential growth
MAX_DEPTH = 64
MAX_BYTES = 2**20  # of a file: a recipe has a few thousand
MAX_BITS = 8_192  # of a whole number: Python prints no much longer ones
COMMAND_LINE = "command line"

_FLOAT = re.compile(
    r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_RESOLVERS: dict[str, tuple[re.Pattern[str], str]] = {
    "null": (re.compile(r"^(?:~|null|Null|NULL|)$"), "~nN\0"),
    "bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    "int": (re.compile(r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F_]+)$"), "-+0123456789"),
    "float": (_FLOAT, "-+0123456789."),
    "merge": (re.compile(r"^<<$"), "<"),
}
_PREFIX = "tag:yaml.org,2002:"


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads as numbers what `_RESOLVERS` says, and nothing else."""


class _Dumper(yaml.SafeDumper):
    """Quotes every text that either this loader or a YAML 1.1 loader would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Readers fold Unicode's line breaks into spaces unless they are escaped.
    breaks = any(letter in text for letter in "\x85\u2028\u2029")
    return dumper.represent_scalar(_PREFIX + "str", text, style='"' if breaks else None)


_Dumper.add_representer(str, _text)
_Loader.yaml_implicit_resolvers = {}
_Dumper.yaml_implicit_resolvers = {
    first: list(pairs) for first, pairs in yaml.SafeDumper.yaml_implicit_resolvers.items()
}
for _name, (_pattern, _first) in _RESOLVERS.items():
    _letters = ["" if letter == "\0" else letter for letter in _first]
    _Loader.add_implicit_resolver(_PREFIX + _name, _pattern, _letters)
    _Dumper.add_implicit_resolver(_PREFIX + _name, _pattern, _letters)


@dataclass(frozen=True)
class Node:
    """One value of a configuration.

    Attributes:
        value: a scalar, `dict[Key, Node]` or `list[Node]`.
        where: `file:line` of the value, or `command line`.
        replaced: what was here in earlier layers, oldest first.
    """

    value: Any
    where: str
    replaced: tuple["Node", ...] = ()

    def child(self, key: Key) -> "Node | None":
        """The node under `key`, or None if this is not a mapping or has no such key."""
        return self.value.get(key) if isinstance(self.value, dict) else None

    def at(self, path: KeyPath) -> "Node | None":
        """The node at `path`, or None."""
        node: Node | None = self
        for key in path:
            node = node.child(key) if node is not None else None
        return node


def dotted(path: KeyPath) -> str:
    """`("trainer", "max_steps")` as `trainer.max_steps`."""
    return ".".join(str(key) for key in path)


def plain(node: Node) -> Any:
    """The tree as ordinary dicts, lists and scalars."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def walk(node: Node, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Node]]:
    """Every node with its path, parents first."""
    yield path, node
    children: Iterable[tuple[Key, Node]] = ()
    if isinstance(node.value, dict):
        children = node.value.items()
    elif isinstance(node.value, list):
        children = enumerate(node.value)
    for key, child in children:
        yield from walk(child, (*path, key))


def wrap(value: Any, where: str, sources: Mapping[str, str] = MappingProxyType({}), path: KeyPath = ()) -> Node:
    """Ordinary data as a tree in which every value was written at `where`, or where `sources` says, by dotted path."""
    items: Iterable[tuple[Key, Any]]
    if isinstance(value, dict):
        items = value.items()
        return Node({key: wrap(child, where, sources, (*path, key)) for key, child in items}, where)
    if isinstance(value, list | tuple):
        items = enumerate(value)
        return Node([wrap(child, where, sources, (*path, key)) for key, child in items], where)
    return Node(value, sources.get(dotted(path), where))


def read(path: Path, label: str | None = None) -> Node:
    """Reads a YAML file whose root is a mapping; an empty file is an empty mapping.

    Args:
        path: the file.
        label: how messages call the file; by default the path as given.
    Raises: UserError if the file cannot be read or is not such a file.
    """
    label = label or str(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(
                f"{label}: more than {MAX_BYTES:,} bytes; a configuration should name its data, not contain it"
            )
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{label}: not a YAML file: byte {error.start} is not UTF-8 text") from error
    except OSError as error:
        raise UserError(f"{label}: cannot be read: {error.strerror or error}") from error
    root = parse(text, label)
    if root.value is None:
        return Node({}, f"{label}:1")
    if not isinstance(root.value, dict):
        kind = "a list" if isinstance(root.value, list) else f"the text or number {str(root.value)[:60]!r}"
        raise UserError(f"{root.where}: not a configuration: its root is {kind}, but must be a mapping (key: value)")
    return root


def parse(text: str, label: str, *, line_numbers: bool = True) -> Node:
    """One YAML document as a tree. Raises: UserError naming `label` and the line."""
    try:
        for count, event in enumerate(yaml.parse(text, Loader=_Loader)):  # far cheaper than building too many nodes
            if count > 3 * MAX_NODES:
                mark = event.start_mark
                place = f"{label}:{mark.line + 1}" if line_numbers and mark is not None else label
                raise UserError(f"{place}: more than {MAX_NODES} values in one configuration")
        loader = _Loader(text)
        try:
            document = loader.get_single_node()
            if document is None:
                return Node(None, label)
            return _Builder(loader, label, line_numbers).build(document, ())
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{label}:{mark.line + 1}" if mark is not None and line_numbers else label
        problem = " ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"{place}: not YAML: {problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{label}: not YAML: {first_lines(error)}") from error


def dump(value: Any) -> str:
    """Plain data as YAML that `parse` reads back to the same data; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Builder:
    def __init__(self, loader: Any, label: str, line_numbers: bool) -> None:
        self.loader, self.label, self.line_numbers, self.count = loader, label, line_numbers, 0

    def build(self, node: yaml.Node, path: KeyPath) -> Node:
        where = self.place(node)
        self.count += 1
        if self.count > MAX_NODES or len(path) > MAX_DEPTH:
            raise UserError(f"{where}: more than {MAX_NODES} values or {MAX_DEPTH} levels; its aliases expand too far")
        if isinstance(node, yaml.MappingNode) and node.tag == _PREFIX + "map":
            return Node(self.mapping(node, path), where)
        if isinstance(node, yaml.SequenceNode) and node.tag == _PREFIX + "seq":
            return Node([self.build(child, (*path, index)) for index, child in enumerate(node.value)], where)
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALAR_TAGS:
            return Node(self.scalar(node, path), where)
        raise UserError(f"{where} {dotted(path)}: the YAML tag {node.tag!r} is refused; write plain values")

    def scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        try:
            value = self.loader.construct_object(node)
            if isinstance(value, int) and value.bit_length() > MAX_BITS:  # Python would not even print the longest
                raise UserError(
                    f"{self.place(node)} {dotted(path)}: the whole number {node.value[:40]}... of {len(node.value):,} "
                    f"digits is beyond {MAX_BITS:,} bits; write a smaller one".replace(" :", ":")
                )
            return value
        except UserError:
            raise
        except (ValueError, LookupError) as error:  # `!!bool maybe` is a failed look-up
            kind = node.tag[len(_PREFIX) :]
            raise UserError(
                f"{self.place(node)} {dotted(path)}: {node.value[:80]!r} is not a valid {kind}".replace(" :", ":")
            ) from error

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[Key, Node]:
        result: dict[Key, Node] = {}
        for key_node, value_node in node.value:
            where = self.place(key_node)
            if key_node.tag == _PREFIX + "merge":
                raise UserError(f"{where}: '<<' is refused; name the other file under base: instead")
            plain_key = isinstance(key_node, yaml.ScalarNode) and key_node.tag in _SCALAR_TAGS
            key = self.scalar(key_node, path) if plain_key else None
            if not isinstance(key, str | int) or isinstance(key, bool):
                got = repr(key_node.value[:80]) if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                raise UserError(f"{where} {dotted(path)}: a key must be text or a whole number, got {got}")
            if key in result:
                raise UserError(
                    f"{where} {dotted((*path, key))}: duplicate key, first given at {result[key].where}; keep one"
                )
            child = self.build(value_node, (*path, key))
            # The line of the key is given for a value: a block mapping starts one line lower.
            result[key] = Node(child.value, where)
        return result

    def place(self, node: yaml.Node) -> str:
        return f"{self.label}:{node.start_mark.line + 1}" if self.line_numbers else self.label


_SCALAR_TAGS = {_PREFIX + name for name in ("null", "bool", "int", "float", "str")}
