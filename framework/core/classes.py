"""The classes of a package that can be made by their names, found in its sources: nothing is imported until one is."""

import ast
import importlib
import inspect
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from lightspan.core.errors import UserError
from lightspan.core.source import Definition, base_definitions, descends, load, submodules
from lightspan.core.spelling import nearest

_REFERENCE = re.compile(r"arXiv (\d{4}\.\d{4,5})|(https?://[^\s(),]+[^\s(),.])")
_CITATION = re.compile(r" \([^()]*(?:arXiv|https?:)[^()]*\)")
# The end of a sentence, not that of an abbreviation.
_SENTENCE = re.compile(r"(?<!\bal)(?<!\bet)\.(?=\s|$)")


class ClassEntry(NamedTuple):
    """A class that can be made by its name.

    Attributes:
        name: the class's own name, which is unique in its package.
        summary: one sentence on what it does.
        paper: the arXiv identifier, or the address, of where it was published: the first in the first sentence of its
            docstring or, without one there, in the paragraph of its module's that begins with "Source"; else empty.
        class_path: its full import path, as recipes give it.
    """

    name: str
    summary: str
    paper: str
    class_path: str


def list_classes(package: str, kind: str, without: Collection[str] = ()) -> list[ClassEntry]:
    """The public and concrete subclasses of a class that are defined in a package, sorted by name.

    Args:
        package: full name of the package.
        kind: full name under which the base class is defined.
        without: packages inside it that are left out.
    """
    definitions = [found for found in _definitions(package, without) if descends(found, kind)]
    concrete = [found for found in definitions if not _abstract_members(found)[0]]
    modules = [found.source.name for found in concrete]
    return sorted(
        (_entry(found, modules.count(found.source.name) == 1) for found in concrete),
        key=lambda one: one.name.casefold(),
    )


def create(name: str, entries: Sequence[ClassEntry], kind: str, *values: Any, **settings: Any) -> Any:
    """An object of the class with this name. Case, underscores and dashes of the name do not matter.

    Args:
        name: such as "factored_muon".
        entries: the classes to choose from.
        kind: what they are, for messages, such as "optimizer".
        values, settings: arguments of the constructor.
    Raises: UserError for a name that no class has, and for settings that its constructor does not take or misses; and
        whatever the constructor raises.
    """
    names = [entry.name for entry in entries]
    if (own := named(name, names)) is None:
        raise UserError(f"no {kind} has the name {name!r}; {nearest(name, names)}there are: {', '.join(names)}")
    entry = entries[names.index(own)]
    module, _, attribute = entry.class_path.rpartition(".")
    made_by = getattr(importlib.import_module(module), attribute)
    try:
        inspect.signature(made_by).bind(*values, **settings)
    except TypeError as error:
        raise UserError(f"{entry.name}: {error}; see help({entry.class_path})") from None
    return made_by(*values, **settings)


def named(name: str, names: Iterable[str]) -> str | None:
    """Which of the names is meant, or None. Case, underscores and dashes do not matter."""
    return next((own for own in names if _plain(own) == _plain(name)), None)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).casefold()


def _definitions(package: str, without: Collection[str]) -> Iterator[Definition]:
    """The public classes of a package."""
    source = load(package)
    if source is None or package in without:
        return
    for node in source.tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield Definition(node, source)
    for name in submodules(source) if source.is_package else ():
        yield from _definitions(f"{package}.{name}", without)


def _abstract_members(found: Definition) -> tuple[set[str], set[str]]:
    """(members that are abstract still, members that are not), with those of bases in the same top-level package."""
    abstract: set[str] = set()
    concrete: set[str] = set()
    if isinstance(found.node, ast.ClassDef):
        for base in base_definitions(found.node, found.source):
            if base is not None and base.source.name.split(".")[0] == found.source.name.split(".")[0]:
                theirs = _abstract_members(base)
                abstract |= theirs[0]
                concrete |= theirs[1]
        for part in found.node.body:
            if isinstance(part, ast.FunctionDef):
                is_abstract = any("abstract" in ast.unparse(mark) for mark in part.decorator_list)
                (abstract if is_abstract else concrete).add(part.name)
    return abstract - concrete, concrete


def _entry(found: Definition, alone: bool) -> ClassEntry:
    """What is said of it.

    Args:
        alone: whether it is the only listed class of its module, whose docstring is then about it.
    """
    assert isinstance(found.node, ast.ClassDef)
    assert found.name is not None
    own, module = ast.get_docstring(found.node) or "", ast.get_docstring(found.source.tree) or ""
    source = next((part for part in module.split("\n\n") if part.startswith("Source")), "")
    published = _REFERENCE.search(_sentence(own)) or _REFERENCE.search(" ".join(source.split()))
    summary = _CITATION.sub("", _sentence(module if alone else own))
    called, _, rest = summary.partition(": ")
    if rest and _plain(called.strip("`")) == _plain(found.node.name):
        summary = rest
    paper = (published[1] or published[2]) if published else ""
    return ClassEntry(found.node.name, summary[:1].upper() + summary[1:], paper, found.name)


def _sentence(docstring: str) -> str:
    """Its first sentence, on one line and without the full stop."""
    return _SENTENCE.split(" ".join(docstring.partition("\n\n")[0].split()), maxsplit=1)[0]
