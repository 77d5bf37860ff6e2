"""The API reference: one page for each module, made of its docstrings, which are read without importing it."""

import ast
import functools
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

COPY = Path("build/site-package")
# The command line (running.md is about it), and recipes, which have pages of their own.
LEFT_OUT = {"__main__", "cli", "recipes"}
SOURCE = "<!-- source of {} -->"

INDEX = """# API

Every module by package, with the first sentence of its docstring. Start with
[`SubspaceProjection`](callbacks/training/subspace_projection.md) in a LightningModule of your own, with
[`LowRank`](optim/low_rank/optimizer.md) without Lightning, or with [`Method`](training/method.md) for a method of your
own ([first-method.md](../first-method.md)). [CONTRIBUTING.md](../project/CONTRIBUTING.md#where-the-code-is) says what
the packages are for.
"""


@functools.cache
def folders(root: Path) -> dict[str, str]:
    """{package: folder}, as setup.py maps them."""
    for node in ast.parse((root / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FOLDERS":
            return dict(ast.literal_eval(node.value))
    raise ValueError("setup.py has no FOLDERS")


def copy_package(root: Path) -> None:
    """Lays the package out as an installation would, where mkdocs.yml lets the reference look for it."""
    shutil.rmtree(root / COPY, ignore_errors=True)
    for package, folder in folders(root).items():
        target = root / COPY / package.replace(".", "/")
        shutil.copytree(root / folder, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


@functools.cache
def modules(root: Path) -> dict[str, PurePosixPath]:
    """{dotted name behind `lightspan.`: file below the project} of the modules that say anything."""
    found = {}
    for package, folder in folders(root).items():
        for file in sorted((root / folder).rglob("*.py")):
            inside = file.relative_to(root / folder).with_suffix("").parts
            name = ".".join((*package.split(".")[1:], *inside)).removesuffix(".__init__").removesuffix("__init__")
            if name and name.split(".")[0] not in LEFT_OUT and file.read_text(encoding="utf-8").strip():
                found[name] = PurePosixPath(file.relative_to(root).as_posix())
    return found


def uri_of(module: str) -> str:
    """The page of a module."""
    return f"reference/{module.replace('.', '/')}.md"


def page_of(root: Path, file: PurePosixPath) -> str | None:
    """The page of the module that is in a file, or of the package that is a folder; None if there is none."""
    return next(
        (uri_of(module) for module, path in modules(root).items() if path in (file, file / "__init__.py")), None
    )


def by_package(root: Path) -> dict[str, list[str]]:
    """{package: its modules}; those that are no package, or in none, are in `lightspan`."""
    found: dict[str, list[str]] = {"lightspan": []}
    for module, file in modules(root).items():
        top = module.split(".")[0]
        alone = module == top and file.name != "__init__.py"
        found.setdefault("lightspan" if alone else top, []).append(module)
    return found


def pages(root: Path) -> dict[str, str]:
    """{page: its text}."""
    texts = {}
    for module, file in modules(root).items():
        head = f"---\ntitle: {module}\n---\n\n# `lightspan.{module}`\n\n::: lightspan.{module}\n"
        texts[uri_of(module)] = f"{head}\n## Source\n\n`{file}`\n\n{SOURCE.format(module)}\n"
    return texts


def with_source(root: Path, html: str) -> str:
    """A finished page with the text of its module. So late, that the search does not index every line of code."""

    def shown(match: re.Match[str]) -> str:
        text = (root / modules(root)[match[1]]).read_text(encoding="utf-8")
        return highlight(text, PythonLexer(), HtmlFormatter(cssclass="highlight"))

    return re.sub(SOURCE.format(r"([\w.]+)"), shown, html)


def index(root: Path) -> str:
    """The page that lists all modules."""
    lines = [INDEX]
    for package, names in by_package(root).items():
        lines += [f"## {package}", "", "| module | |", "|---|---|"]
        lines += [
            f"| [`{name}`]({uri_of(name).removeprefix('reference/')}) | {first_sentence(root / modules(root)[name])} |"
            for name in names
        ]
        lines += [""]
    return "\n".join(lines)


def first_sentence(file: Path) -> str:
    """What a module says of itself first, on one line and fit for a table."""
    said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(said.split("\n\n")[0].split()).replace("|", "\\|")


def navigation(root: Path) -> list[Any]:
    """The modules by package, for MkDocs' `nav`."""
    return [
        {package: [{name.removeprefix(f"{package}."): uri_of(name)} for name in names]}
        for package, names in by_package(root).items()
    ]
