"""Files with a JSON value in each line."""

import json
from typing import Any

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import expanded
from lightspan.core.files.foreign import whole_text


def json_lines(path: str, setting: str, what: str, keys: str) -> list[tuple[str, Any]]:
    """(where a line stands, for messages; what it says) of all lines that are not empty, at least one.

    A line ends where the file has a new line, and nowhere else: JSON leaves other ends of lines, such as U+2028 or
    U+0085, in texts as they are. The mark with which programs of Windows begin UTF-8 is passed over.

    Args:
        setting: what names the file, for messages.
        what, keys: a line is and has, for messages, such as "pair" and "query and document".
    Raises: UserError for a file that cannot be read or has only empty lines, or a line that is not JSON, naming it.
    """
    file = expanded(path, setting)
    try:
        lines = whole_text(file).split("\n")
    except ValueError as error:
        raise UserError(f"{setting}={file} is no file of JSON Lines: {error}") from error
    found = [_read(f"{file}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"{setting}={file} has no {what}; write a JSON object with {keys} in each line")
    return found


def text_in(where: str, found: Any, name: str) -> str:
    """The text that a line has under a name. Raises: UserError that names the line for none, or an empty one."""
    text = found.get(name) if isinstance(found, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where} has no {name}, or an empty one; it must be a text")
    return text


def _read(where: str, line: str) -> tuple[str, Any]:
    try:
        value = json.loads(line)
        if "\\u" in line:  # may have escaped half a surrogate pair, which is not text and becomes a question mark
            value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
        return where, value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from error
