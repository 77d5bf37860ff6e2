"""Who imports whom: the modules of the package and of the tests, read from their sources."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "callbacks": "lightspan.callbacks",
    "datamodules": "lightspan.datamodules",
    "recipes": "lightspan.recipes",
    "triton_kernels": "lightspan.triton_kernels",
    "framework": "lightspan",
}


def sources() -> list[tuple[str, Path]]:
    """(dotted module name below lightspan, file) of every source file."""
    return [
        (".".join((package, *file.relative_to(ROOT / folder).with_suffix("").parts)).removeprefix("lightspan."), file)
        for folder, package in PACKAGES.items()
        for file in sorted((ROOT / folder).rglob("*.py"))
    ]


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def statements(node: ast.AST) -> Iterator[ast.stmt]:
    """All statements inside it, at any depth; far cheaper than `ast.walk`, which visits expressions too."""
    for block in ("body", "orelse", "finalbody", "handlers", "cases"):
        for child in getattr(node, block, ()):
            if isinstance(child, ast.stmt):
                yield child
            yield from statements(child)


@functools.cache
def imports(file: Path) -> list[tuple[str, str]]:
    """(file:line, absolute dotted name) of every import in the file, inside functions too; relative ones come as
    `.name`.
    """
    found = []
    for node in statements(tree(file)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return [(f"{file.relative_to(ROOT)}:{line}", name) for line, name in found]
