"""Model cards: the README.md beside weights, with the head that the Hugging Face Hub reads. Text from others is made
harmless in it: it starts no table, fence or tag.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from lightspan.core.errors import one_line

CARD = "README.md"


@dataclass
class Card:
    """A card in the making.

    Attributes:
        head: the front matter; entries that are None are left out.
        title: its heading.
        body: Markdown, a paragraph, list, table or fence each.
    """

    title: str
    head: Mapping[str, Any]
    body: list[str] = field(default_factory=list)

    def section(self, title: str, *blocks: str) -> None:
        """Adds a section; blocks that are empty are left out, and so is a section without any."""
        if filled := [block for block in blocks if block]:
            self.body += [f"## {title}", *filled]

    def text(self) -> str:
        head = {key: _on_lines(value) for key, value in self.head.items() if value is not None}
        front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip()
        return "\n\n".join([f"---\n{front}\n---", f"# {plain(self.title)}", *self.body]) + "\n"


def _on_lines(value: Any) -> Any:
    """A plain value each of whose texts is on one line, so that none of them can end the head."""
    if isinstance(value, dict):
        return {one_line(key): _on_lines(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_on_lines(child) for child in value]
    return one_line(value) if isinstance(value, str) else value


def plain(text: object) -> str:
    """Text on one line in which Markdown and HTML see nothing but text; underscores and stars stay as they are."""
    escaped = one_line(text).replace("&", "&amp;").replace("<", "&lt;")
    for mark in "|`[]":
        escaped = escaped.replace(mark, f"\\{mark}")
    return escaped


def code(text: object) -> str:
    """Text on one line as inline code, also inside a table."""
    return f"`{one_line(text).replace('`', chr(39)).replace('|', chr(0x2502))}`"


def fence(text: str, language: str = "") -> str:
    """A block of code whose fence is longer than any in the text."""
    runs = "".join(c if c == "`" else " " for c in text).split()
    marks = "`" * max([3, *(len(run) + 1 for run in runs)])
    return f"{marks}{language}\n{text.strip()}\n{marks}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are Markdown already; "" without rows."""
    if not rows:
        return ""
    head, *lines = (f"| {' | '.join(row)} |" for row in (header, *rows))
    return "\n".join([head, "|---" * len(header) + "|", *lines])


def bullets(items: Sequence[str]) -> str:
    """A list of Markdown, without the empty items."""
    return "\n".join(f"- {item}" for item in items if item)
