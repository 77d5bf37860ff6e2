"""Texts as documents: files, or lines of a .jsonl file, each with a name of its own, as tokens and their bytes.

Shapes: N tokens of all documents, D documents.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lightspan.core.errors import UserError, one_line
from lightspan.core.tokenizing import cut
from lightspan.datamodules.text.endings import LINES
from lightspan.datamodules.text.windows import SEPARATOR, text_content, text_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELD = "text"
VAL_FRACTION = 0.05
"""Share of the documents that is held out."""
BYTES = 256
"""Tokens where there is no tokenizer: the bytes of the text."""


class Document(NamedTuple):
    """name: its path in its folder, or FILE.jsonl:LINE. content: UTF-8."""

    name: str
    content: bytes


class TextTokens(NamedTuple):
    """tokens: int32 [N]. byte_counts: int32 [N], of the real text that each token stands for, together all of it."""

    tokens: np.ndarray
    byte_counts: np.ndarray


@dataclass
class Skipped:
    """Documents that are left out, by reason."""

    reasons: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return "".join(f"; {count:,} {reason} skipped" for reason, count in sorted(self.reasons.items()))


def find_documents(paths: list[str] | None, suffixes: tuple[str, ...], skipped: Skipped) -> Iterator[Document]:
    """The documents of files and folders, in sorted order.

    A file that ends in .jsonl has a document in the field `text` of each line; any other file is one document. What is
    binary, no UTF-8 or cannot be read is counted in `skipped`.

    Args:
        paths, suffixes: as in `lightspan.datamodules.text.windows.text_files`.
    Raises: UserError as there, and for a line that is no JSON object with a text.
    """
    for name, path in text_files(paths, suffixes):
        content = text_content(path)
        if content is None or not _is_utf_8(content):
            skipped.reasons["unreadable or not UTF-8"] += 1
        elif SEPARATOR in content:
            skipped.reasons["binary"] += 1
        elif path.name.endswith(LINES):
            yield from _lines(name, path, content)
        else:
            yield Document(name, content)


def _is_utf_8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _lines(name: str, path: Path, content: bytes) -> Iterator[Document]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield Document(f"{name}:{number}", text_of(line, f"{path}, line {number}").encode("utf-8", "replace"))


def text_of(content: bytes, where: str) -> str:
    """The field `text` of a JSON object. Raises: UserError that names `where` if there is none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON: {error}") from error
    text = value.get(FIELD) if isinstance(value, dict) else None
    if not isinstance(text, str):
        shown = one_line(content[:60].decode(errors="replace"))
        raise UserError(f'{where} has no text: {shown}; each must be an object such as {{"{FIELD}": "..."}}')
    return text


def encoded(content: bytes, tokenizer: "PreTrainedTokenizerBase | None") -> TextTokens:
    """A text of any length as tokens without special ones, or as its bytes.

    What a tokenizer leaves out, such as spaces that it joins, counts for the token after it, and at the end for the
    last one, so that a document has all its bytes. Of a character in several tokens the first has the bytes. A
    tokenizer that does not tell where its tokens stand has them spread evenly. Words that look like a special token are
    text here.
    """
    if tokenizer is None:
        tokens = np.frombuffer(content, dtype=np.uint8).astype(np.int32)
        return TextTokens(tokens, np.ones_like(tokens))
    text = content.decode()
    made = cut(
        tokenizer,
        text,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,  # it warns of long texts
    )
    tokens = np.asarray(made["input_ids"], dtype=np.int32)
    if not len(tokens):
        return TextTokens(tokens, np.zeros_like(tokens))
    if tokenizer.is_fast:
        before_character = np.concatenate([[0], np.cumsum(_widths(text))])
        ends = np.maximum.accumulate([end for _, end in made["offset_mapping"]])
        ends = before_character[ends]
        ends[ends == ends[-1]] = len(content)
    else:
        ends = np.arange(1, len(tokens) + 1) * len(content) // len(tokens)
    return TextTokens(tokens, np.diff(ends, prepend=0).astype(np.int32))


def _widths(text: str) -> np.ndarray:
    """Bytes of each character in UTF-8."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    return 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)


def numbers_of(tokenizer: "PreTrainedTokenizerBase | None") -> tuple[int, frozenset[int]]:
    """How many numbers a tokenizer has, and those of its special tokens, which `encoded` never gives."""
    if tokenizer is None:
        return BYTES, frozenset()
    return len(tokenizer), frozenset(tokenizer.all_special_ids)
