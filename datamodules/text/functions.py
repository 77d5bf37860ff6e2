"""Functions of Python files as pairs of texts: the first line of the docstring, and the body without it."""

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import expanded
from lightspan.core.files.folders import LIBRARY_LEAVES_OUT, find_files
from lightspan.core.files.foreign import whole_text

FEWEST_WORDS = 3
_INNER_CAPITAL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


class Function(NamedTuple):
    """file: path relative to the folder that was searched. query: first line of the docstring. body: the source behind
    the docstring, its names split into words.
    """

    file: str
    query: str
    body: str


def split_names(source: str) -> str:
    """`read_it(myFile)` becomes `read it(my File)`: tokenizers that number whole words see those of docstrings."""
    return _INNER_CAPITAL.sub(" ", source.replace("_", " "))


def library_functions(folder: str | None = None) -> list[Function]:
    """The documented functions of the Python files under a folder, by path and line. Nothing is imported or run.

    Left out are docstrings whose first line has fewer than three words, functions of nothing but a docstring, and what
    repeats the first line or the body of an earlier one: a query has one answer. Files that cannot be parsed are too.

    Args:
        folder: None is the standard library of the Python that runs, without its tests.
    Raises: UserError if there is no such folder or no such function.
    """
    root = Path(sysconfig.get_path("stdlib")) if folder is None else expanded(folder, "data.init_args.folder")
    queries, bodies = set[str](), set[str]()
    found: list[Function] = []
    for file, path in find_files(root, (".py",), LIBRARY_LEAVES_OUT):
        for query, body in _documented(path):
            if query not in queries and body not in bodies:
                found.append(Function(file, query, body))
                queries.add(query)
                bodies.add(body)
    if not found:
        raise UserError(f"{root} has no Python file with a documented function; name another in data.init_args.folder")
    return found


def _documented(path: Path) -> Iterator[tuple[str, str]]:
    try:
        source = whole_text(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes in others' files
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = source.split("\n")  # as the parser counts them: a form feed ends none
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in sorted(functions, key=lambda function: function.lineno):
        if len(node.body) < 2:
            continue
        query = (ast.get_docstring(node, clean=False) or "").strip().partition("\n")[0].strip()
        body = split_names("\n".join(lines[node.body[1].lineno - 1 : node.end_lineno])).strip()
        if len(query.split()) >= FEWEST_WORDS and body:
            yield query, body
