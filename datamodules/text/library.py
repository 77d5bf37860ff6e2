"""Source of a Python library as two kinds of documents: code without docstrings, and docstrings. No download."""

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import expanded
from lightspan.core.files.folders import LIBRARY_LEAVES_OUT, find_files
from lightspan.core.files.foreign import whole_text
from lightspan.core.files.places import ReadPath
from lightspan.core.ranges import require_in
from lightspan.datamodules.text.corpus import DocumentPieces
from lightspan.datamodules.text.documents import Document, Skipped

Part = Literal["code", "docstrings"]
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def parted(source: str) -> dict[Part, str]:
    """The lines of a file that hold no docstring, and its docstrings with a blank line between.

    A docstring that stands on the line of its function stays in the code too.

    Raises: SyntaxError, ValueError or RecursionError for what is no Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old escapes in others' files
        tree = ast.parse(source)
    lines = source.split("\n")  # as the parser counts them: a form feed ends none
    left_out, found = set[int](), list[tuple[int, str]]()
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            first = node.body[0]
            assert first.end_lineno is not None
            found.append((first.lineno, text))
            if not lines[first.lineno - 1][: first.col_offset].strip():
                left_out |= {*range(first.lineno - 1, first.end_lineno)}
    code = "\n".join(line for number, line in enumerate(lines) if number not in left_out)
    return {"code": code, "docstrings": "\n\n".join(text for _, text in sorted(found))}


class LibraryTexts(DocumentPieces):
    """Code and docstrings of Python files as pieces of documents. Nothing is imported or run.

    Both documents of a file have its path as their name, so that they are on one side: of a file that is held out
    nothing is trained on, whatever `parts` are.

    Args:
        parts: the kinds of documents.
        folder: None is the standard library of the Python that runs, without its tests.
        files: at most so many, those of the lowest hash of their path; None takes all.
        settings: those of `DocumentPieces`.
    Raises: UserError at setup for a folder that is not there or without Python files, and as `DocumentPieces`. Files
        that cannot be parsed are counted and left out.
    """

    more = "files"

    def __init__(
        self,
        parts: tuple[Part, ...] = get_args(Part),
        folder: ReadPath | None = None,
        files: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        require_in("[1, inf)", files=files)
        if not parts or not {*parts} <= {*get_args(Part)}:
            raise UserError(f"parts={[*parts]} must be some of {', '.join(get_args(Part))}")
        self.parts, self.folder, self.files = tuple(parts), folder, files

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        root = Path(sysconfig.get_path("stdlib")) if self.folder is None else expanded(self.folder, "folder")
        found = sorted(find_files(root, (".py",), LIBRARY_LEAVES_OUT), key=lambda file: _digest(file[0]))
        if not found:
            raise UserError(f"folder={root} has no Python file; name another in data.init_args.folder")
        for name, path in sorted(found[: self.files]):
            try:
                texts = parted(whole_text(path))
            except (SyntaxError, ValueError, RecursionError):
                skipped.reasons["that cannot be parsed"] += 1
                continue
            for part in self.parts:
                if text := texts[part].strip():
                    yield Document(name, text.encode("utf-8", "replace"))


def _digest(name: str) -> bytes:
    return hashlib.sha256(f"order {name}".encode("utf-8", "surrogateescape")).digest()
