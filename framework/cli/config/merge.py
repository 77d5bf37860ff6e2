"""Layers into one tree: base < recipe < overlays < flags, always in this order.

Mappings merge key by key and everything else is replaced. There are three more rules. Another class drops the
settings of the class before it: a layer that gives it settings of its own is noted, and one that gives none is warned,
as it may have meant to keep them. So it is with `checkpoints`, whose names are the user's choice: a
layer with a name that is new there gives checkpoints of its own, and drops all that it does not name. `null` under
`trainer.callbacks`, `trainer.logger` or an estimator's `inputs` removes that entry, as it does in place of a
class that a setting holds by name, such as one of several `encoders`.
"""

import difflib
import json
from collections.abc import Iterable

from lightspan.cli.config.tree import Key, KeyPath, Node, dotted, plain
from lightspan.core.errors import WarningNote

CLASS_SETTINGS = ("init_args", "dict_kwargs")
KEYED = (("trainer", "callbacks"), ("trainer", "logger"), ("inputs",))  # mappings name -> class
CHOSEN = ("checkpoints",)  # a mapping whose names a layer chooses
SHOWN = 3  # dropped settings that a note names


def merge_layers(layers: Iterable[Node]) -> tuple[Node, list[str]]:
    """Folds layers from the left; returns the tree and the notes to show to the user."""
    notes: list[str] = []
    result = Node({}, "")
    for layer in layers:
        result = merge(result, layer, notes)
    return result, notes


def merge(low: Node, high: Node, notes: list[str] | None = None, path: KeyPath = ()) -> Node:
    """`high` over `low`: the value of `high` wins and records what it replaced."""
    notes = [] if notes is None else notes
    if not (isinstance(low.value, dict) and isinstance(high.value, dict)):
        return Node(high.value, high.where, (*low.replaced, Node(low.value, low.where), *high.replaced))
    kept: dict[Key, Node] = dict(low.value)
    dropped: dict[Key, Node] = {}
    old, new = low.child("class_path"), high.child("class_path")
    if old is not None and new is not None and old.value != new.value:
        dropped = {key: kept.pop(key) for key in CLASS_SETTINGS if key in kept}
        missed = [setting for key, node in dropped.items() for setting in _lost(node, high.child(key))]
        before, now = (str(node.value).rpartition(".")[2] for node in (old, new))
        if missed and any(_settings(high.child(key)) for key in CLASS_SETTINGS):
            more = f" and {len(missed) - SHOWN} more" if missed[SHOWN:] else ""
            names = ", ".join(one.partition("=")[0] for one in missed[:SHOWN])
            notes.append(f"{new.where} {dotted(path)}: {now} in place of {before}, without its {names}{more}")
        elif missed:
            notes.append(
                WarningNote(
                    f"{new.where} {dotted(path)}: class {old.value} -> {new.value} without the settings that "
                    f"{before} had: {', '.join(missed)}; give it those that it shall have"
                )
            )
    if path == CHOSEN and (added := [key for key in high.value if key not in kept]):
        dropped = {key: kept.pop(key) for key in low.value if key not in high.value}
        if dropped:
            notes.append(
                f"{high.value[added[0]].where} checkpoints: {', '.join(map(str, high.value))} replace all that "
                f"were named before; dropped: {', '.join(map(str, dropped))}"
            )
    merged = dict(kept)
    for key, node in high.value.items():
        if key in kept:
            merged[key] = merge(kept[key], node, notes, (*path, key))
        elif key in dropped:
            merged[key] = Node(node.value, node.where, (*dropped[key].replaced, dropped[key], *node.replaced))
        else:
            if node.value is None and path in KEYED:
                close = difflib.get_close_matches(str(key), [str(name) for name in kept], 1)
                hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(map(str, kept)) or 'none'}"
                notes.append(f"{node.where} {dotted((*path, key))}: null removes nothing, no layer below has it{hint}")
            merged[key] = node
    lost = tuple(Node({key: node}, node.where) for key, node in dropped.items() if key not in merged)
    return Node(merged, low.where or high.where, (*low.replaced, *lost, *high.replaced))


def _lost(before: Node, now: Node | None) -> list[str]:
    """`name=value` of each setting that is not given anew; non-plain values by name only."""
    given = _settings(now)
    return [
        str(name) if isinstance(node.value, dict | list) else f"{name}={_plainly(node.value)}"
        for name, node in _settings(before).items()
        if name not in given
    ]


def _settings(node: Node | None) -> dict[Key, Node]:
    return node.value if node is not None and isinstance(node.value, dict) else {}


def _plainly(value: object) -> str:
    """A scalar as YAML has it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def without_removed(root: Node, path: KeyPath = ()) -> Node:
    """The tree without the entries that a layer removed by null."""
    if not isinstance(root.value, dict):
        return root
    parts = _holds_parts(root, path)
    kept = {
        key: without_removed(child, (*path, key))
        for key, child in root.value.items()
        if not (child.value is None and (path in KEYED or (parts and _was_class(child))))
    }
    return Node(kept, root.where, root.replaced)


def _holds_parts(node: Node, path: KeyPath) -> bool:
    """Whether this is a setting's mapping whose names a recipe chooses, as `init_args.encoders` is."""
    within = any(key in CLASS_SETTINGS for key in path[:-1])
    return within and path[-1] not in CLASS_SETTINGS and node.child("class_path") is None


def _was_class(node: Node) -> bool:
    return any(before.child("class_path") is not None for before in node.replaced)


def explain(root: Node, path: KeyPath) -> list[str] | None:
    """Who set the value at `path` and what it replaced, latest first; None if no layer ever set it."""
    entries = _history(root, path)
    if not entries:
        return None
    lines = []
    if root.at(path) is None:
        lines.append(f"{dotted(path)} is not set: a change of class or a null above it dropped it")
    for rank, node in enumerate(reversed(entries)):
        verb = "set" if rank == 0 and root.at(path) is not None else "before"
        lines.append(f"{verb:>6}  {node.where:<40}  {dotted(path)} = {_short(node)}")
    return lines


def _history(node: Node, path: KeyPath) -> list[Node]:
    """All nodes that were ever at `path`, oldest first."""
    if not path:
        return [*node.replaced, node]
    entries: list[Node] = []
    for earlier in node.replaced:
        entries += _history(earlier, path)
    child = node.child(path[0])
    return entries + (_history(child, path[1:]) if child is not None else [])


def _short(node: Node) -> str:
    text = repr(plain(node)) if isinstance(node.value, dict | list | str) else str(plain(node))
    return text if len(text) <= 100 else text[:97] + "..."
