"""Recipes by name or path, with what they build on.

The catalogue is the folder of the installed package `lightspan.recipes`: `language/quickstart` names the file
`language/quickstart.yaml`. `base:` names one or several other recipes, or files relative to the one that names them.
"""

import difflib
import os
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from lightspan.cli.config.tree import Node, plain, read
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import irregular, refuse_link_out
from lightspan.core.files.runs import RESOLVED

ABOUT_KEYS = ("title", "paper", "family", "modality", "needs", "expected", "time", "evidence")
OVERLAY_FOLDER = "scale"  # says where to run, not what
SUFFIXES = (".yaml", ".yml")
MAX_BASES = 32  # read for one recipe, each counted as often as it is named


@dataclass(frozen=True)
class Recipe:
    """A recipe file and all that it builds on.

    Attributes:
        name: `family/name` in the catalogue, or the file's stem.
        path: the file.
        about: the recipe's own description, possibly empty.
        layers: base files first, the recipe itself last; without `about` and `base`.
    """

    name: str
    path: Path
    about: dict[str, Any]
    layers: tuple[Node, ...]


def catalogue_folder() -> Path:
    """Where the recipes of the installed package are."""
    return Path(str(resources.files("lightspan.recipes")))


def catalogue_names(*, overlays: bool = False) -> list[str]:
    """All recipes of the catalogue as `family/name`, sorted; with `overlays`, the scale overlays instead."""
    folder = catalogue_folder()
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.glob("*/**/*.yaml"))
    return sorted(name for name in names if name.startswith(OVERLAY_FOLDER + "/") == overlays)


def find(name: str, folder: Path | None = None, what: str = "recipe") -> Path:
    """The file that a recipe or overlay name means: a path, or a name in the catalogue.

    Args:
        name: `family/name`, or a path that ends in .yaml or .yml.
        folder: of the file that names it, which a relative path is relative to; None: the command line names it.
        what: "recipe" or "overlay", for the message.
    Raises: UserError with similar names if there is none, and for a link that leads out of its folder.
    """
    try:
        if name.endswith(SUFFIXES):
            path = (folder or Path()) / Path(name).expanduser()
            if path.is_file():
                _refuse_links_out(path, folder)
                return path
            inside = catalogue_folder() / name
            if inside.is_file():
                return inside
            fault = irregular(path) if os.path.lexists(path) else "does not exist"
            beside = [] if folder is not None else sorted(p.name for p in path.parent.glob("*") if p.suffix in SUFFIXES)
            near = difflib.get_close_matches(path.name, beside, n=1)
            hint = f"did you mean {path.with_name(near[0])}?" if near else _listed(what)
            raise UserError(f"{what} file {path} {fault}; {hint}")
        inside = catalogue_folder() / f"{name}.yaml"
        if inside.is_file() and catalogue_folder() in inside.resolve().parents:
            return inside
        if Path(name).is_file():
            raise UserError(f"{what} {name!r} is a file without the ending .yaml; rename it")
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, an unknown user's home, circular links
        raise UserError(f"{name[:80]!r} cannot name a file: {getattr(error, 'strerror', None) or error}") from error
    known = catalogue_names(overlays=what == "overlay") + catalogue_names(overlays=what != "overlay")
    tails = {known_name.split("/")[-1]: known_name for known_name in known}
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or [
        tails[tail] for tail in difflib.get_close_matches(name.split("/")[-1], list(tails), n=3)
    ]
    hint = f"did you mean {' or '.join(near)}?" if near else f"{_listed(what)}; a file name ends in .yaml"
    raise UserError(f"unknown {what} {name!r}: {hint}")


def _refuse_links_out(path: Path, folder: Path | None) -> None:
    """A link in a folder of somebody else's could lead to any file of the reader's, whose lines messages would show.

    Of a path on the command line the user knows the folders, so only the file itself is looked at.
    """
    inside = path.relative_to(folder).parts if folder is not None and path.is_relative_to(folder) else ()
    if folder is None or not inside or ".." in inside:
        refuse_link_out(path, path.parent, "its folder")
    else:
        for step in (path, *path.parents[: len(inside) - 1]):
            refuse_link_out(step, folder, "the folder of the recipe that names it")


def _listed(what: str) -> str:
    """Where to find the existing names."""
    if what == "overlay":
        return f"the catalogue has {', '.join(catalogue_names(overlays=True))}"
    return "`lightspan recipes` lists the names of the catalogue"


def label(path: Path) -> str:
    """How messages call a file: relative to the current folder if that is shorter."""
    path = path.absolute()
    return os.path.relpath(path) if Path.cwd() in path.parents else str(path)


def load(name: str) -> Recipe:
    """Reads a recipe and its bases. Raises: UserError for a missing file, bad YAML, or bases that form a cycle."""
    path = find(name)
    own = read(path, label(path))
    about = own.child("about")
    if about is not None and not isinstance(about.value, dict):
        raise UserError(f"{about.where} about: must be a mapping with the keys {', '.join(ABOUT_KEYS)}")
    catalogue = catalogue_folder()
    inside = catalogue.resolve() in path.resolve().parents
    shown = path.resolve().relative_to(catalogue.resolve()).with_suffix("").as_posix() if inside else _own_name(path)
    return Recipe(shown, path, plain(about) if about is not None else {}, tuple(_with_bases(own, path, (), [])))


def _own_name(path: Path) -> str:
    """What a recipe outside of the catalogue is called: like its file, or its folder if it is the record of a run."""
    return path.resolve().parent.name if path.name == RESOLVED else path.stem


def stand_ins(name: str) -> str:
    """`-c scale/NAME ...`, the overlays with which a recipe is planned without the files that it reads, as its own
    header or theirs says; "" if neither names any.
    """
    said = re.compile(rf"lightspan plan {re.escape(name)}((?: -c scale/stand_ins_\w+)+)")
    overlays = (overlay for overlay in catalogue_names(overlays=True) if "/stand_ins_" in overlay)
    files = (catalogue_folder() / f"{each}.yaml" for each in (name, *overlays))
    found = (said.search(file.read_text(encoding="utf-8")) for file in files if file.is_file())
    return next((match[1].strip() for match in found if match), "")


def load_overlay(name: str) -> list[Node]:
    """An overlay, preceded by what it builds on. Raises: UserError as `load`, and for a recipe of the catalogue."""
    path = find(name, what="overlay")
    if path.resolve() in {(catalogue_folder() / f"{recipe}.yaml").resolve() for recipe in catalogue_names()}:
        raise UserError(
            f"overlay {name!r} is a recipe, which would replace most of the one that it is laid over and keep its "
            "name; write what you want of it into a file of your own "
            f"(`lightspan show {name.removesuffix('.yaml')}` prints it)"
        )
    return _with_bases(read(path, label(path)), path, (), [])


def _with_bases(root: Node, path: Path, chain: tuple[Path, ...], read_so_far: list[Path]) -> list[Node]:
    if path.resolve() in chain:
        names = " -> ".join(label(step) for step in (*chain[chain.index(path.resolve()) :], path))
        raise UserError(f"{label(path)}: base: is circular: {names}")
    chain = (*chain, path.resolve())
    read_so_far.append(path)
    if len(read_so_far) > MAX_BASES:
        raise UserError(f"{label(path)}: base: more than {MAX_BASES} files build on one another; merge some of them")
    layers: list[Node] = []
    base = root.child("base")
    if base is not None:
        nodes = base.value if isinstance(base.value, list) else [base]
        for node in nodes:
            if not isinstance(node.value, str):
                raise UserError(f"{node.where} base: must be a recipe name or a list of names, got {plain(node)!r}")
            try:
                below = find(node.value, path.parent)
            except UserError as error:
                raise UserError(f"{node.where} base: {error}") from error
            layers += _with_bases(read(below, label(below)), below, chain, read_so_far)
    own = {key: child for key, child in root.value.items() if key not in ("about", "base")}
    return [*layers, Node(own, root.where)]
