"""Where a configuration would have a run write: inside the run folder or the user's cache, and nowhere else.

The type of a setting says what happens at the place that it names (`lightspan.core.files.places`), and is read from
source; for the classes of libraries the table `USES` says it. A setting without a type is judged by its name. A flag of
the command line is the user's own word and may name any place; a recipe or an overlay may not, so where a value was
written decides (`Node.where`).
"""

import ast
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from lightspan.cli.config.annotations import dataclass_of, is_untyped, item_annotation, use_of
from lightspan.cli.config.parts import FOLDER_ENDINGS, FOLDERS, NAME_PARTS, NAMES, TRAINER, USES
from lightspan.cli.config.signatures import Parameter, Signature, signature, signature_of
from lightspan.cli.config.tree import COMMAND_LINE, Key, KeyPath, Node, dotted
from lightspan.core.files.caches import user_cache
from lightspan.core.files.places import PathUse
from lightspan.core.source import Definition, Source, locate, under

RUN = "${run}"
_PROTOCOL = re.compile("://|::")  # where fsspec, which Lightning opens paths with, finds the name of a file system
_ELSEWHERE = re.compile(r"[/\\~]|[A-Za-z]:|.*://")  # the beginning of a path that is not relative to its folder
Found = tuple[KeyPath, Node, PathUse]


@dataclass(frozen=True)
class _Kind:
    """What is known of a setting.

    Attributes:
        use: what the table says of it.
        annotation: its type, and the module whose names the type uses.
        by_name: whether a setting without a type is judged by its name; those of the user's own classes are not.
    """

    use: PathUse | None = None
    annotation: tuple[ast.expr, Source] | None = None
    by_name: bool = True

    def inside(self, key: Key) -> "_Kind":
        """Of the value under `key` of a list or mapping."""
        if self.use is not None:  # of a text, or each text of a list
            return self if isinstance(key, int) else replace(self, use=None).inside(key)
        if self.annotation is None:
            return self
        if (item := item_annotation(*self.annotation, key)) is not None:
            return replace(self, annotation=item)
        target = dataclass_of(*self.annotation)
        known = signature_of(target) if target is not None else None
        return self.of(known.parameters.get(str(key)) if known is not None else None)

    def of(self, parameter: Parameter | None) -> "_Kind":
        if parameter is None or parameter.annotation is None:
            return replace(self, annotation=None)
        return replace(self, annotation=(parameter.annotation, parameter.source))

    def use_under(self, path: KeyPath) -> PathUse | None:
        if self.use is not None:
            return self.use
        if self.annotation is not None and not is_untyped(*self.annotation):
            return use_of(*self.annotation)
        return _by_name(next(str(key) for key in reversed(path) if isinstance(key, str))) if self.by_name else None


def refused_places(root: Node, modules: Sequence[str]) -> Iterator[tuple[KeyPath, Node, str]]:
    """Every text of a tree that names a place where a recipe may have nothing written, and why."""
    for path, node, use in places(root, modules):
        if node.where != COMMAND_LINE and (message := _fault(node.value, use)) is not None:
            yield path, node, message


def places(root: Node, modules: Sequence[str] = ()) -> Iterator[Found]:
    """Every text of a tree that names a place, and what happens there.

    Args:
        modules: names given with --allow-module; of their classes only types of `lightspan.core.files.places` count.
    """
    for key, node in root.value.items() if isinstance(root.value, dict) else ():
        if key == "trainer":
            yield from _settings(node, (key,), TRAINER, modules)
        elif key != "checkpoints":  # which are read, under names of the user's choice
            yield from _of_value(node, (key,), _Kind(), modules)


def as_flags(root: Node, modules: Sequence[str]) -> list[str]:
    """The places that only the command line may name, as flags for another one."""
    return [
        f"{dotted(path)}={json.dumps(node.value)}"
        for path, node, use in places(root, modules)
        if node.where == COMMAND_LINE and _fault(node.value, use) is not None
    ]


def kept_inside(root: Node, modules: Sequence[str], uses: Sequence[PathUse]) -> tuple[Node, list[str]]:
    """The tree with places in the run folder for those of these uses that are outside, and a note on each."""
    notes = []
    for path, node, use in list(places(root, modules)):
        if use in uses and _fault(node.value, use) is not None:
            inside = f"{RUN}/{Path(node.value).name or 'outside'}"
            root = _with(root, path, Node(inside, node.where))
            notes.append(
                f"{node.where} {dotted(path)}: {node.value!r:.80} was named on a command line; here it is {inside}"
            )
    return root, notes


def _with(node: Node, path: KeyPath, value: Node) -> Node:
    if not path:
        return value
    if isinstance(node.value, list):
        changed = [_with(child, path[1:], value) if at == path[0] else child for at, child in enumerate(node.value)]
        return Node(changed, node.where, node.replaced)
    return Node({**node.value, path[0]: _with(node.value[path[0]], path[1:], value)}, node.where, node.replaced)


def _of_value(node: Node, path: KeyPath, kind: _Kind, modules: Sequence[str]) -> Iterator[Found]:
    if isinstance(node.value, dict) and "class_path" in node.value:
        name = str(node.value["class_path"].value)
        for key, child in node.value.items():
            if key in ("init_args", "dict_kwargs"):
                yield from _settings(child, (*path, key), name, modules)
            elif key != "class_path":
                yield from _of_value(child, (*path, key), _Kind(), modules)
    elif isinstance(node.value, dict | list):
        for key, child in node.value.items() if isinstance(node.value, dict) else enumerate(node.value):
            yield from _of_value(child, (*path, key), kind.inside(key), modules)
    elif isinstance(node.value, str) and (use := kind.use_under(path)) is not None:
        yield path, node, use


def _settings(node: Node, path: KeyPath, class_path: str, modules: Sequence[str]) -> Iterator[Found]:
    """Of the settings of a class, or of what a builder makes."""
    found = locate(class_path)
    name = str(found.name) if isinstance(found, Definition) else class_path
    known, listed = signature(class_path), USES.get(name, {})
    base = _Kind(by_name=not any(under(name, module) for module in modules))
    for key, child in node.value.items() if isinstance(node.value, dict) else ():
        parameter = known.parameters.get(str(key)) if isinstance(known, Signature) else None
        kind = replace(base.of(parameter), use=listed.get(str(key)))
        yield from _of_value(child, (*path, key), kind, modules)


def _by_name(key: str) -> PathUse | None:
    if key in NAME_PARTS:
        return PathUse.PART
    if key in NAMES:
        return PathUse.NAME
    return PathUse.RUN if key in FOLDERS or key.endswith(FOLDER_ENDINGS) else None


def _fault(value: str, use: PathUse) -> str | None:
    """Why a recipe may not name this place, or None."""
    parts = PurePosixPath(value.replace("\\", "/")).parts
    inside = not (".." in parts or any(part.startswith("~") for part in parts) or _PROTOCOL.search(value))
    if use is PathUse.SERVER:
        return "sends checkpoints to a server; a run writes only into its folder"
    if use is PathUse.SETTINGS:
        return f"{value!r:.80} is a file of settings, which cannot be judged; write them here as a mapping"
    if use is PathUse.PART and (len(parts) > 1 or value.startswith(("/", "\\"))):
        return f"{value!r:.80} becomes part of a file name; write it without separators"
    if use is PathUse.NAME and (not inside or _ELSEWHERE.match(value) or RUN in value):
        return f"{value!r:.80} leaves the run folder; give a plain name"
    if use is PathUse.RUN and not (inside and parts and parts[0] == RUN):
        return f"{_outside(value)}; begin it with {RUN}/, which --run chooses, or set it on the command line"
    if use is PathUse.CACHE and not (inside and parts and parts[0] == RUN) and not _in_cache(value):
        return (
            f"{_outside(value)} and {user_cache()}, and files there are deleted to make room; leave it out, or set it "
            "on the command line"
        )
    return None


def _outside(value: str) -> str:
    return f"{value!r:.80} is outside the run folder"


def _in_cache(value: str) -> bool:
    try:
        path, cache = Path(value).expanduser(), user_cache().expanduser()
    except RuntimeError:  # the home of nobody
        return False
    return ".." not in path.parts and cache.is_absolute() and cache in (path, *path.parents)
