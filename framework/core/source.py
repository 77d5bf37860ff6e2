"""Reads Python source without importing it: where a name is defined, following re-exports.

Only the top-level package is looked up through the import system (which runs none of its code); below it the files are
searched. So a configuration can be checked against classes whose libraries take seconds to import, or must not be
imported at all.
"""

import ast
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import overload

MAX_STAR_DEPTH = 3  # deeper chains of `from x import *` count as unknown
DYNAMIC = ("sys.modules", "globals()", "def __getattr__(name")  # may have names that the source does not show
MAPPED = ("callbacks", "datamodules", "recipes", "triton_kernels")  # folders of lightspan that may be beside its own


@dataclass(frozen=True)
class Source:
    """A parsed module. `name` is dotted, `is_package` if it is an __init__.py."""

    name: str
    path: Path
    tree: ast.Module
    is_package: bool
    is_dynamic: bool


@dataclass(frozen=True)
class Definition:
    """What a name stands for, and the module whose names its annotations use."""

    node: ast.ClassDef | ast.FunctionDef | ast.expr
    source: Source

    @property
    def is_class(self) -> bool:
        """Whether this is a class; otherwise it is a function, or an expression behind a name."""
        return isinstance(self.node, ast.ClassDef)

    @property
    def name(self) -> str | None:
        """The full name under which a class or function is defined, None for an expression."""
        if isinstance(self.node, ast.ClassDef | ast.FunctionDef):
            return f"{self.source.name}.{self.node.name}"
        return None


@dataclass(frozen=True)
class Seen:
    """A class, by the full name of where it is defined, in a module whose text shows it and was not parsed."""

    name: str
    is_class = True


@dataclass(frozen=True)
class Absent:
    """The module is completely known and has no such name."""

    module: str
    names: tuple[str, ...]


@cache
def module_file(name: str) -> Path | None:
    """The source file of a module, or None if there is none on the Python path."""
    top, *rest = name.split(".")
    # lightspan is mapped from several folders in an editable install, and importing it runs nothing heavy.
    root_name, below = (f"{top}.{rest[0]}", rest[1:]) if top == "lightspan" and rest else (top, rest)
    path = _root_file(root_name)
    if path is None:
        return None
    for part in below:
        if path.name != "__init__.py":
            return None
        package = path.parent / part / "__init__.py"
        path = package if package.is_file() else path.parent / f"{part}.py"
        if not path.is_file():
            return None
    return path


@cache
def _root_file(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    origin = spec.origin if spec is not None else None
    return Path(origin) if origin is not None and origin.endswith(".py") else None


@cache
def _text(name: str) -> str | None:
    """A module's text, or None if it has none that can be read."""
    path = module_file(name)
    try:
        return path.read_text(encoding="utf-8") if path is not None else None
    except (OSError, ValueError):
        return None


@cache
def load(name: str) -> Source | None:
    """A module's source, or None if it has none or does not parse."""
    path, text = module_file(name), _text(name)
    if path is None or text is None:
        return None
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return None
    return Source(name, path, tree, path.name == "__init__.py", any(mark in text for mark in DYNAMIC))


def locate(dotted: str) -> Definition | Absent | None:
    """The class, function or alias that a full import path names; None if that is unknown."""
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        source = load(".".join(parts[:cut]))
        if source is not None:
            if cut == len(parts) - 1:
                return lookup(source, parts[-1])
            if (source.path.parent / parts[cut]).is_dir() or module_file(".".join(parts[: cut + 1])) is not None:
                return None  # a module that does not parse, or a folder without __init__.py
            # `a.b.C` where a is a module and b neither a module nor a name in it.
            found = lookup(source, parts[cut])
            return Absent(source.name, found.names + submodules(source)) if isinstance(found, Absent) else None
    return None


@overload
def lookup(source: Source, name: str, depth: int = 0) -> Definition | Absent | None: ...
@overload
def lookup(source: Source, name: str, depth: int = 0, *, glance: bool) -> Definition | Seen | Absent | None: ...
def lookup(source: Source, name: str, depth: int = 0, *, glance: bool = False) -> Definition | Seen | Absent | None:
    """What `name` means inside a module; None if the source does not tell.

    With `glance`, a class of another module may be Seen instead of defined: parsing large modules takes most of the
    time of `check`.
    """
    stars: list[str] = []
    names: list[str] = []
    for statement in _top_level(source.tree.body):
        if isinstance(statement, ast.ClassDef | ast.FunctionDef):
            names.append(statement.name)
            if statement.name == name:
                return Definition(statement, source)
        elif isinstance(statement, ast.ImportFrom):
            origin = absolute(source, statement)
            for alias in statement.names:
                if alias.name == "*":
                    stars.append(origin)
                    continue
                names.append(alias.asname or alias.name)
                if names[-1] == name:
                    return _follow(origin, alias.name, depth, glance)
        elif isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    names.append(target.id)
                    if target.id == name:
                        return Definition(statement.value, source)
        elif isinstance(statement, ast.Import):
            names += [alias.asname or alias.name.split(".")[0] for alias in statement.names]
    if name in names:
        return None
    unknown = (
        source.is_dynamic and source.name != "lightspan"
    )  # the lazy names of lightspan are not classes to configure
    for origin in stars:
        if unknown and not _may_define(origin, name, depth + 1):  # transformers.models imports from 557 of these
            continue
        below = load(origin) if depth < MAX_STAR_DEPTH else None
        found = lookup(below, name, depth + 1, glance=glance) if below is not None else None
        if isinstance(found, Definition | Seen):
            return found
        if isinstance(found, Absent):
            names += found.names
        else:
            unknown = True
    return None if unknown else Absent(source.name, tuple(name for name in names if not name.startswith("_")))


def under(name: str, prefix: str) -> bool:
    """Whether a dotted name is `prefix` or is inside it; `torchevil` is not under `torch`."""
    return name == prefix or name.startswith(prefix + ".")


def exported(source: Source) -> frozenset[str]:
    """The names that a module lists in `__all__`; empty if it has no such list of plain texts."""
    for statement in source.tree.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            try:
                return frozenset(map(str, ast.literal_eval(statement.value)))
            except (ValueError, TypeError):
                return frozenset()
    return frozenset()


def absolute(source: Source, statement: ast.ImportFrom) -> str:
    """The full name of the module that an import statement reads from."""
    if not statement.level:
        return statement.module or ""
    parts = source.name.split(".")
    parts = parts[: len(parts) - statement.level + source.is_package]
    return ".".join([*parts, statement.module] if statement.module else parts)


def _may_define(module: str, name: str, depth: int) -> bool:
    """Whether the text of a module shows a name, or a star behind which it may be."""
    text = _text(module) or ""
    return name in text or (depth < MAX_STAR_DEPTH and "import *" in text)


def _follow(origin: str, name: str, depth: int, glance: bool) -> Definition | Seen | None:
    if glance and re.search(rf"^class {name}\b", _text(origin) or "", re.MULTILINE):
        return Seen(f"{origin}.{name}")
    below = load(origin)
    if below is None or depth > 12:
        return None
    found = lookup(below, name, depth + 1, glance=glance)
    # A broken re-export is the library's fault, never the user's misspelling.
    return found if isinstance(found, Definition | Seen) else None


def base_definitions(node: ast.ClassDef, source: Source) -> Iterator[Definition | None]:
    """The base classes of a class, `object` and Generic left out; None for each that cannot be read."""
    for base in node.bases:
        expression = base.value if isinstance(base, ast.Subscript) else base
        name = ast.unparse(expression)
        if name.split(".")[-1] in ("object", "Generic", "Protocol", "ABC"):
            continue
        found = resolve(expression, source)
        yield found if isinstance(found, Definition) else None


def descends(definition: Definition, kind: str, depth: int = 0) -> bool | None:
    """Whether a class, or the declared return type of a function, is or derives from the class defined under the full
    name `kind`; None if that is unknown.
    """
    if definition.name == kind:
        return True
    if isinstance(definition.node, ast.FunctionDef) and definition.node.returns is not None:
        returned = resolve(definition.node.returns, definition.source)
        return descends(returned, kind, depth + 1) if isinstance(returned, Definition) else None
    if not isinstance(definition.node, ast.ClassDef) or depth > 12:
        return None
    answers = [
        None if base is None else descends(base, kind, depth + 1)
        for base in base_definitions(definition.node, definition.source)
    ]
    return True if True in answers else None if None in answers else False


@overload
def resolve(expression: ast.expr, source: Source) -> Definition | Absent | None: ...
@overload
def resolve(expression: ast.expr, source: Source, *, glance: bool) -> Definition | Seen | Absent | None: ...
def resolve(expression: ast.expr, source: Source, *, glance: bool = False) -> Definition | Seen | Absent | None:
    """What a name or dotted name in a module's source stands for; `glance` as in `lookup`."""
    if isinstance(expression, ast.Name):
        return lookup(source, expression.id, glance=glance)
    if isinstance(expression, ast.Attribute):
        full = _full_name(ast.unparse(expression), source)
        return locate(full) if full is not None else None
    return None


def _full_name(name: str, source: Source) -> str | None:
    """`nn.Module` as `torch.nn.Module`, according to the imports of the module."""
    first, _, rest = name.partition(".")
    for statement in source.tree.body:
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                if (alias.asname or alias.name.split(".")[0]) == first:
                    return f"{alias.name if alias.asname else first}.{rest}"
        elif isinstance(statement, ast.ImportFrom) and not statement.level:
            for alias in statement.names:
                if (alias.asname or alias.name) == first:
                    return f"{statement.module}.{alias.name}.{rest}"
    return None


def submodules(source: Source) -> tuple[str, ...]:
    """The names of a package's public modules and packages."""
    folder = source.path.parent
    files = folder.glob("*.py"), (path.parent for path in folder.glob("*/__init__.py"))
    names = tuple(path.stem for paths in files for path in paths if not path.stem.startswith("_"))
    return names + MAPPED if source.name == "lightspan" else names


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run at import, in either branch of an `if` or `try`."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If):
            yield from _top_level(statement.body + statement.orelse)
        elif isinstance(statement, ast.Try):
            handlers = [inner for handler in statement.handlers for inner in handler.body]
            yield from _top_level(statement.body + handlers + statement.orelse)
