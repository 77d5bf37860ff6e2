"""Syntax trees of Python text, by Python's own parser and tokenizer. Nothing is imported or run.

The words of a tree are the tokens of the text, and its nodes those of the module `ast`; a token belongs to the
innermost node around it. The grammar changes with Python's version, and so do labels: scores are comparable within
one. A string is a single word, whatever is in it, as in the code of AST-Probe (`lightspan.evaluation.syntax.trees`).
"""

import ast
import hashlib
import io
import sysconfig
import tokenize
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lightspan.core.errors import UserError, one_line
from lightspan.core.files.atomic import expanded
from lightspan.core.files.folders import LIBRARY_LEAVES_OUT, find_files
from lightspan.core.files.foreign import TooMuchError, bounded_program, whole_text
from lightspan.evaluation.syntax.trees import SyntaxNode

_NO_WORDS = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
_FAULTS = (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError)
"""What Python's parser raises for text that is no Python, or nested too deeply for it."""


class Parsed(NamedTuple):
    """A text and its tree.

    Attributes:
        file: where it stands, relative to the folder that was searched; "" for a text of its own.
        words: (first character, one after the last) of each word of the tree.
    """

    file: str
    text: str
    words: tuple[tuple[int, int], ...]
    tree: SyntaxNode


class LeftOutCode(NamedTuple):
    """How many of what was looked at were left out for one reason.

    Attributes:
        what: in the plural, such as files.
        of: how many were looked at.
    """

    what: str
    why: str
    number: int
    of: int


class PythonFunctions(NamedTuple):
    """Functions, and what was left out on the way to them."""

    found: list[Parsed]
    left_out: tuple[LeftOutCode, ...]


def said(left_out: Iterable[LeftOutCode]) -> str:
    """One sentence without its full stop; "" for nothing."""
    parts = [f"{one.number} of {one.of} {one.what} ({one.why})" for one in left_out]
    return f"left out: {', '.join(parts)}" if parts else ""


def parsed(text: str, file: str = "") -> Parsed:
    """The tree of a text; of a single statement, such as a function, that statement is the root.

    Raises: UserError for text that is no Python of this version, is nested too deeply, or has no statement.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    try:
        module = _parse(text)
        words = [
            (token.start, token.end)
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type not in _NO_WORDS
        ]
    except TooMuchError:
        raise
    except _FAULTS as error:
        raise UserError(f"{file or 'a text'} is no Python of this version: {one_line(error)[:200]}") from error
    if not module.body:
        raise UserError(f"{file or 'a text'} has no statement, and so no syntax tree")
    try:
        return _Reader(text, words).parsed(module.body[0] if len(module.body) == 1 else module, file)
    except RecursionError as error:
        raise UserError(f"{file or 'a text'} is nested too deeply to be read") from error


def _parse(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old escapes in others' files
        return ast.parse(text)


class _Reader:
    """Gives the tokens of a text to the nodes of its tree."""

    def __init__(self, text: str, tokens: list[tuple[tuple[int, int], tuple[int, int]]]) -> None:
        self.text, self.lines = text, text.split("\n")
        starts = [0]
        for line in self.lines:
            starts.append(starts[-1] + len(line) + 1)
        self.starts = starts
        self.tokens = [(starts[a[0] - 1] + a[1], starts[b[0] - 1] + b[1]) for a, b in tokens]
        self.firsts = [first for first, _ in self.tokens]
        self.bytes_of: dict[int, list[int]] = {}
        self.words: list[tuple[int, int]] = []
        self.spans: dict[ast.AST, tuple[int, int] | None] = {}

    def parsed(self, root: ast.AST, file: str) -> Parsed:
        self._measure(root)
        tree = self._node(root, 0, len(self.tokens))
        return Parsed(file, self.text, tuple(self.words), tree)

    def _place(self, line: int, column: int) -> int:
        """The number of a character; `ast` counts columns in bytes."""
        text = self.lines[line - 1]
        if not text.isascii():
            if line not in self.bytes_of:  # once for all of its nodes, as a line may have many
                characters = [number for number, letter in enumerate(text) for _ in letter.encode()]
                self.bytes_of[line] = [*characters, len(text)]
            column = self.bytes_of[line][column]
        return self.starts[line - 1] + column

    def _measure(self, root: ast.AST) -> None:
        """The span of each node and all below it: some, such as `arguments`, have none of their own."""
        waiting = [root]
        for node in waiting:
            waiting += [] if _is_string(node) else ast.iter_child_nodes(node)
        for node in reversed(waiting):
            spans = [] if _is_string(node) else [self.spans[child] for child in ast.iter_child_nodes(node)]
            if isinstance(node, _PLACED) and node.end_lineno is not None and node.end_col_offset is not None:
                ends = self._place(node.end_lineno, node.end_col_offset)
                spans.append((self._place(node.lineno, node.col_offset), ends))
            known = [span for span in spans if span is not None]
            self.spans[node] = (min(a for a, _ in known), max(b for _, b in known)) if known else None

    def _node(self, node: ast.AST, first: int, last: int) -> SyntaxNode:
        """The node with the tokens in [first, last), at least one."""
        if _is_string(node):
            self.words.append((self.tokens[first][0], self.tokens[last - 1][1]))
            return SyntaxNode(type(node).__name__, (len(self.words) - 1,))
        children: list[SyntaxNode | int] = []
        below = [child for child in ast.iter_child_nodes(node) if self.spans[child] is not None]
        for child in sorted(below, key=lambda child: self.spans[child] or (0, 0)):
            begin, end = self.spans[child] or (0, 0)
            inside = max(first, bisect_left(self.firsts, begin))
            after = min(last, bisect_left(self.firsts, end))
            if inside >= after:  # the tokens are those of a child before it
                continue
            children += self._leaves(first, inside)
            children.append(self._node(child, inside, after))
            first = after
        return SyntaxNode(type(node).__name__, (*children, *self._leaves(first, last)))

    def _leaves(self, first: int, last: int) -> range:
        self.words += self.tokens[first:last]
        return range(len(self.words) - max(0, last - first), len(self.words))


_PLACED = (ast.stmt, ast.expr, ast.excepthandler, ast.arg, ast.keyword, ast.alias, ast.pattern)


def _is_string(node: ast.AST) -> bool:
    """Whether a node is the text of a program's data, of one or more tokens and perhaps with code inside."""
    plain = isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
    return plain or type(node).__name__ in ("JoinedStr", "TemplateStr")


NO_PYTHON, TOO_MUCH = "no Python of this version", "more time or memory than allowed"
EMPTY, DEEP, TWICE = "nothing but a docstring", "nested too deeply", "the text of an earlier one"


def python_functions(folder: str | None = None, most: int = 400, per_file: int = 8, words: int = 64) -> PythonFunctions:
    """Functions of the Python files under a folder, without comments, docstrings and decorators, as `ast.unparse`
    writes them. Those of a file stand together, and files in the order of a hash of their path.

    Files that cannot be parsed, or that take more time or memory than `lightspan.core.files.foreign` allows, are left
    out and counted, and functions of nothing but a docstring, of more than so many words, nested too deeply, or with
    the text of an earlier one. Files and functions behind the last one that is wanted are not looked at.

    Args:
        folder: None is the standard library of the Python that runs, without its tests.
        most: functions.
        per_file: of which so many may be of one file, the first ones.
        words: that a function may have.
    Raises: UserError if there is no such folder or no such function.
    """
    root = Path(sysconfig.get_path("stdlib")) if folder is None else expanded(folder, "folder")
    seen = set[str]()
    found: list[Parsed] = []
    looked_at, wrong, unfit = 0, Counter[str](), Counter[str]()
    files = find_files(root, (".py",), LIBRARY_LEAVES_OUT)
    for file, path in sorted(files, key=lambda known: hashlib.sha256(known[0].encode("utf-8", "replace")).digest()):
        if len(found) == most:
            break
        looked_at += 1
        try:
            with bounded_program():
                if (tree := _tree(path)) is None:
                    wrong[NO_PYTHON] += 1
                    continue
                found += islice(_read(tree, file, seen, words, unfit), min(per_file, most - len(found)))
        except (TooMuchError, MemoryError):
            wrong[TOO_MUCH] += 1
    of_functions = len(found) + unfit.total()
    left_out = (
        *(LeftOutCode("files", why, count, looked_at) for why, count in wrong.items()),
        *(LeftOutCode("functions", why, count, of_functions) for why, count in unfit.items()),
    )
    if not found:
        why = said(left_out) or f"{looked_at} .py files are there"
        raise UserError(
            f"{root} has no Python file with a function of at most {words} words; {why}; name another in folder, or "
            f"raise words={words}"
        )
    return PythonFunctions(found, left_out)


def _tree(path: Path) -> ast.Module | None:
    """Of a file; None if it is no Python. Raises: TooMuchError or MemoryError."""
    try:
        return _parse(whole_text(path))
    except (TooMuchError, MemoryError):
        raise
    except _FAULTS:
        return None


def _read(tree: ast.AST, file: str, seen: set[str], words: int, unfit: Counter[str]) -> Iterator[Parsed]:
    """The functions of a file that are new and of at most so many words; the others are counted by their reason."""
    for text in _functions(tree, unfit):
        if text in seen:
            unfit[TWICE] += 1
            continue
        seen.add(text)
        try:
            one = parsed(text, file)
        except UserError:
            unfit[DEEP] += 1
            continue
        if len(one.words) <= words:
            yield one
        else:
            unfit[f"more than {words} words"] += 1


def _functions(tree: ast.AST, unfit: Counter[str]) -> Iterator[str]:
    """The functions of a file as text, each once: those inside another are parts of it."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += reversed([*ast.iter_child_nodes(node)])
            continue
        for part in ast.walk(node):
            if not isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if ast.get_docstring(part, clean=False) is not None:
                part.body = part.body[1:] or [ast.Pass()] * (part is not node)
        node.decorator_list = []
        if not node.body:
            unfit[EMPTY] += 1
            continue
        try:
            text = ast.unparse(node)
            _parse(text)
        except TooMuchError:
            raise
        except _FAULTS:  # to be written again
            unfit[DEEP] += 1
            continue
        yield text
