"""JSON that others may have written: single values, and files with one object a line, in bounded memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightspan.cli.config.tree import MAX_DEPTH
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import opened

LONGEST = 2**24  # bytes of a line


def json_lines(path: Path, skip_damaged: bool = False, last: int | None = None) -> Iterator[dict[str, Any]]:
    """The objects of a file with one a line, as the file is read; none of a file that is missing or irregular.

    A killed process may leave half a last line, which is left out; a last line that is whole and lacks only its line
    break counts. NaN and Infinity, which JSON does not have, are read as the numbers they name, and null as None.

    Args:
        skip_damaged: leave out what is no object, too long or too deep, instead of refusing it.
        last: read no more than about this many bytes, the last ones, from the first whole line on.
    Raises: UserError that names the line.
    """
    with opened(path) as file:
        if file is None:
            return
        number = 0
        if last is not None and (begin := file.seek(0, 2) - last) > 0:
            file.seek(begin - 1)  # a line break there means that a line begins right here
            _finish_line(file.readline(LONGEST), file)
        else:
            file.seek(0)
            number = 1
        while line := file.readline(LONGEST + 1):
            found = _damage(line) if len(line) > LONGEST else _read(line)
            _finish_line(line, file)
            if isinstance(found, dict):
                yield found
            elif found is not None and not skip_damaged:
                if found.torn and not line.endswith(b"\n"):
                    return
                where = f"{path}:{number}" if number else str(path)
                raise UserError(
                    f"{where} {found.what}: {line[:80].decode(errors='replace').rstrip()!r}; fix or remove it"
                )
            number += bool(number)


class _Damage:
    """Why a line is no object, and whether that may be because it was cut off."""

    def __init__(self, what: str, torn: bool = False) -> None:
        self.what, self.torn = what, torn


def _damage(line: bytes) -> _Damage:
    return _Damage(f"has more than {LONGEST:,} bytes in one line")


def _read(line: bytes) -> dict[str, Any] | _Damage | None:
    """None for an empty line."""
    if not line.strip():
        return None
    try:
        value = value_of(line.decode(errors="replace"))
    except ValueError as error:
        return _Damage(f"is not JSON ({error})", torn=True)
    return value if isinstance(value, dict) else _Damage("is not a JSON object")


def _finish_line(part: bytes, file: Any) -> None:
    """Reads on to the next line break, if `part` of a line did not reach it."""
    while part and not part.endswith(b"\n"):
        part = file.readline(LONGEST)


def value_of(text: str) -> Any:
    """JSON that floats can represent and a page can show. Raises: ValueError, also for too deep nesting."""
    try:
        value = _DECODER.decode(text)
        if "\\u" in text:  # may have escaped half a surrogate pair, which is not text
            value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    except json.JSONDecodeError as error:
        raise ValueError(error.msg) from error
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if text.count("{") + text.count("[") <= MAX_DEPTH:  # so many levels at most
        return value
    level, depth = [value], 0
    while level:
        depth += 1
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    return value


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) < 19 else float(digits)  # a float beyond its range is infinite, and not drawn


_DECODER = json.JSONDecoder(parse_int=_whole)  # `json.loads` would make one for each line
