"""What may be in a checkpoint, entry by entry: the check of its content before anything trusts it.

A manifest reveals damage but says nothing about what was written. `content_fault` knows the form that every checkpoint
has, and is called by whatever reads one; `state_fault` compares a stored state with the state of the object that it is
meant for, once that object exists. Both name the first wrong entry by its path, as in
`optimizer_states[0].param_groups`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor

MOST_DEEP = 64
"""Levels of lists and mappings; a real checkpoint has about ten."""

Check = Callable[[Any, str], Iterator[str]]

_WHOLE = 2**63  # larger counters and sizes do not fit what reads them


def content_fault(content: Any) -> str | None:
    """What is wrong with a loaded checkpoint, as the end of a sentence about it; None if its form is right."""
    if not isinstance(content, dict) or "state_dict" not in content:
        what = f"the keys {sorted(map(str, content))[:5]}" if isinstance(content, dict) else described(content)
        return f"is a torch file but not a checkpoint: it contains {what}, but no 'state_dict'"
    if too_deep := _too_deep(content):
        return f"cannot be used: its entry {too_deep} is nested more than {MOST_DEEP} levels deep"
    wrong = next(_CHECKPOINT(content, ""), None)
    return f"cannot be used: its entry {wrong}" if wrong else None


def expanded(content: Any) -> str | None:
    """What a loaded file says that is larger than the file: the path of a tensor with more numbers than its memory has,
    as one that is expanded. It takes no room until somebody copies it. None if there is none.

    Content that is nested too deep, or contains itself, is left to `content_fault`.
    """
    seen: set[int] = set()
    waiting = [("", content)]
    while waiting:
        entry, value = waiting.pop()
        if isinstance(value, Tensor):
            if value.layout == torch.strided and not value.is_meta and not value.is_nested:
                held = value.untyped_storage().nbytes() // value.itemsize
                if value.numel() > held:
                    return f"{entry} is a tensor of {value.numel():,} numbers, of which the file has {held:,}"
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [(f"{entry}.{key!s:.80}".lstrip("."), child) for key, child in pairs]
    return None


def state_fault(stored: Any, now: Any, entry: str, may_lack: bool = False) -> str | None:
    """How a stored state differs in kind from `now`, the state that its owner has now; None if it can be used.

    Mappings are compared under their common keys and lists over their common length; tuples must be equally long.
    Numbers, whole ones within 64 bits, match numbers and tensors of one number. What is None now may be any setting,
    but not a collection.

    Args:
        may_lack: None matches everything, for an owner of which it is unknown what it keeps and when.
    """
    kind = _kind(now)
    if may_lack and (stored is None or now is None):
        return None
    if now is None and (stored is None or _kind(stored) in ("a number", "text", "true or false")):
        return None
    if _kind(stored) != kind:
        return f"{entry} is {described(stored)}, not {kind}"
    if isinstance(now, tuple) and len(now) != len(stored):
        return f"{entry} has {len(stored)} entries, not {len(now)}"
    if kind == "a mapping":
        pairs = [(f"{entry}.{key}", stored[key], now[key]) for key in now if key in stored]
    elif kind == "a list":
        pairs = [(f"{entry}[{i}]", *both) for i, both in enumerate(zip(stored, now, strict=False))]
    else:
        return next(_number(stored, entry), None) if kind == "a number" else None
    return next((found for where, a, b in pairs if (found := state_fault(a, b, where, may_lack))), None)


def described(value: Any) -> str:
    """A value as described in a message: by its kind, or for small ones by the value itself."""
    if isinstance(value, str):
        return "text"
    if value is None or isinstance(value, bool | int | float):
        return str(value)[:24]
    kind = _kind(value)
    return kind if isinstance(value, dict | list | tuple | Tensor) else f"a {type(value).__name__}"


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0):
        return "a number"
    kinds = ((str, "text"), (Mapping, "a mapping"), (list | tuple, "a list"), (Tensor, "a tensor"))
    return next((name for types, name in kinds if isinstance(value, types)), f"a {type(value).__name__}")


def _too_deep(content: Any) -> str | None:
    """The entry that is nested too deep, or that contains itself."""
    heights: dict[int, int] = {}  # of what was seen: a branch that is in many places is walked once

    def height(value: Any, level: int) -> int:
        if not isinstance(value, dict | list | tuple):
            return 0
        if id(value) not in heights:
            if level > MOST_DEEP:
                return 1
            heights[id(value)] = MOST_DEEP  # stands for one that contains itself
            children = value.values() if isinstance(value, dict) else value
            heights[id(value)] = 1 + max((height(child, level + 1) for child in children), default=0)
        return heights[id(value)]

    return next((str(key) for key, value in content.items() if height(value, 2) >= MOST_DEEP), None)


def counts_fault(stored: Any, now: Any, entry: str) -> str | None:
    """What in nested counters is missing, or is not a count: a number below 0, or no number."""
    if isinstance(now, dict):
        for key, child in now.items():
            if key not in stored:
                return f"{entry}.{key} is missing"
            if fault := counts_fault(stored[key], child, f"{entry}.{key}"):
                return fault
        return None
    return None if isinstance(now, bool) else next(_count(stored, entry), None)


# Checks: each yields the faults it finds in a value at `entry`, "ENTRY is THIS, not THAT".


def _is(kind: type | tuple[type, ...], name: str) -> Check:
    def check(value: Any, entry: str) -> Iterator[str]:
        if not isinstance(value, kind):
            yield f"{entry} is {described(value)}, not {name}"

    return check


def _number(value: Any, entry: str) -> Iterator[str]:
    if isinstance(value, int) and not -_WHOLE <= value < 2 * _WHOLE:  # torch's seeds are unsigned
        yield f"{entry} is a number of {len(hex(value)) - 2} hexadecimal digits, beyond 64 bits"
    if isinstance(value, float) and math.isnan(value):
        yield f"{entry} is {value}, not a number"


def _count(value: Any, entry: str) -> Iterator[str]:
    if type(value) is not int or not 0 <= value < _WHOLE:
        yield f"{entry} is {described(value)}, not a whole number from 0"


def _version(value: Any, entry: str) -> Iterator[str]:
    try:
        Version(value)
    except (InvalidVersion, TypeError):
        yield f"{entry} is {described(value)}, not a version"


def _dense(value: Any, entry: str) -> Iterator[str]:
    """A tensor with numbers in memory; anything else is not a tensor, and is left to its owner to read."""
    if not isinstance(value, Tensor):
        return
    if value.layout != torch.strided:
        yield f"{entry} is a sparse tensor, not a dense one"
    yield from _plain(value, entry)


def _plain(value: Tensor, entry: str) -> Iterator[str]:
    if value.is_nested or value.is_quantized:
        yield f"{entry} is a nested or quantised tensor, not a plain one"
    elif value.is_meta:
        yield f"{entry} is a tensor without content"


def _weight(value: Any, entry: str) -> Iterator[str]:
    if entry.endswith("_extra_state"):  # what a module's get_extra_state returned
        return
    if not isinstance(value, Tensor):
        yield f"{entry} is {described(value)}, not a tensor"
    else:
        yield from _plain(value, entry)  # a graph's buffer may be sparse; the model decides, see check_fits


def _anything(value: Any, entry: str) -> Iterator[str]:
    yield from ()


def _each(check: Check, keys: Check | None = None) -> Check:
    """A mapping with `check` for each value and `keys` for each key."""

    def each(value: Any, entry: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{entry} is {described(value)}, not a mapping"
            return
        for key, child in value.items():
            if keys:
                yield from keys(key, f"{entry} has a key that")
            yield from check(child, f"{entry}.{str(key)[:200]}")

    return each


def _list(check: Check) -> Check:
    def each(value: Any, entry: str) -> Iterator[str]:
        if not isinstance(value, list | tuple):
            yield f"{entry} is {described(value)}, not a list"
            return
        for i, child in enumerate(value):
            yield from check(child, f"{entry}[{i}]")

    return each


def _record(required: Mapping[str, Check], optional: Mapping[str, Check]) -> Check:
    """A mapping with these keys; other entries are left to their owners."""

    def check(value: Any, entry: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{entry} is {described(value)}, not a mapping"
            return
        for key, inner in {**optional, **required}.items():
            where = f"{entry}.{key}" if entry else key
            if key in value:
                yield from inner(value[key], where)
            elif key in required:
                yield f"{where} is missing"

    return check


def _or_none(check: Check) -> Check:
    return lambda value, entry: iter(()) if value is None else check(value, entry)


def _or_empty(check: Check) -> Check:
    return lambda value, entry: iter(()) if value == {} else check(value, entry)


def _moments(value: Any, entry: str) -> Iterator[str]:
    yield from _MAPPING(value, entry)
    for key, child in value.items() if isinstance(value, dict) else ():
        if isinstance(key, int) or isinstance(child, dict):  # under other names an optimiser may keep anything
            yield from _each(_dense)(child, f"{entry}.{key}")


_TEXT = _is(str, "text")
_MAPPING = _is(dict, "a mapping")
_TENSOR = _is(Tensor, "a tensor")
_RANDOM = _record({"python": _list(_anything), "numpy": _list(_anything), "torch": _TENSOR, "cuda": _list(_TENSOR)}, {})
_GROUP = _record({"params": _list(_anything)}, {})
_LINE = _record({"step": _count, "metrics": _each(_is((int, float), "a number"), keys=_TEXT)}, {})
_CHECKPOINT = _record(
    {"state_dict": _each(_weight, keys=_TEXT)},
    {
        "lightspan": _record(
            {},
            {
                "format": _count,
                "version": _TEXT,
                "model": _TEXT,
                "optimizers": _list(_TEXT),
                "loggers": _each(_TEXT, keys=_TEXT),
                "log": _record(
                    {},
                    {
                        "lines": _or_none(_count),
                        "unlogged": _or_none(_LINE),
                        "metrics": _each(_TENSOR, keys=_TEXT),
                    },
                ),
                "random_states": _list(_RANDOM),
                "trained": _list(_TEXT),
            },
        ),
        "epoch": _count,
        "global_step": _count,
        "pytorch-lightning_version": _version,
        "loops": _each(_MAPPING),
        "callbacks": _each(_MAPPING),
        # An empty one is from the stand-in that Lightning uses if configure_optimizers returns None.
        "optimizer_states": _list(_or_empty(_record({"state": _moments, "param_groups": _list(_GROUP)}, {}))),
        "lr_schedulers": _list(_MAPPING),
        "hyper_parameters": _MAPPING,
    },
)
