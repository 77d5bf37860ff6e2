"""Metadata of a safetensors file: text by name, some of it JSON, possibly written by another program."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightspan.errors import UserError, one_line

_KINDS = {list: "a list", dict: "a mapping", bool: "true or false", int: "a whole number", str: "text"}


def facts_of(metadata: Mapping[str, str], path: str | Path, **kinds: type) -> dict[str, Any]:
    """The named facts, each of its given type; all except text is JSON.

    Raises: UserError that names the file and the first fact that is missing or of another type.
    """
    facts: dict[str, Any] = {}
    for name, kind in kinds.items():
        if name not in metadata:
            raise UserError(f"{path} has no {name!r} in its metadata; it is damaged, or another program wrote it")
        try:
            facts[name] = metadata[name] if kind is str else json.loads(metadata[name])
        except (ValueError, RecursionError):
            facts[name] = None
        if type(facts[name]) is not kind:
            raise UserError(
                f"{path} has {name!r}: {one_line(metadata[name])[:60]!r} in its metadata, not {_KINDS[kind]}; it is "
                "damaged, or another program wrote it"
            )
    return facts
