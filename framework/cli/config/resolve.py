"""From a recipe's name to one checked configuration, without importing torch.

`resolve` is where every verb starts. It raises one UserError with all problems at once.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightspan.cli.config import allow, places, recipes
from lightspan.cli.config.check import RECIPES, ROOT_KEYS, find_problems, kind_of
from lightspan.cli.config.flags import allow_options, flag_layer
from lightspan.cli.config.merge import merge_layers, without_removed
from lightspan.cli.config.problems import Problem
from lightspan.cli.config.tree import COMMAND_LINE, Node, dotted, plain, read, walk, wrap
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import refuse_link_out
from lightspan.core.files.foreign import settings_object
from lightspan.core.files.places import PathUse
from lightspan.core.files.runs import PROVENANCE, RESOLVED

TRAINED = ("model",)
ANY_KIND = tuple(RECIPES)


@dataclass(frozen=True)
class Resolved:
    """A merged and checked configuration.

    Attributes:
        config: plain data; callbacks and loggers are still mappings by name, `${run}` is not filled in.
        notes: what the user should know, such as settings that were dropped with their class.
        sources: `key.path` -> where its value was written, for every scalar.
        about: the recipe's description.
        name: the recipe's name, or the stem of its file.
        tree: the merged tree with its history, entries removed by null included.
        allow_modules: names given with --allow-module.
    """

    config: dict[str, Any]
    notes: list[str]
    sources: dict[str, str]
    about: dict[str, Any]
    name: str
    tree: Node = field(repr=False)
    allow_modules: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The kind of the recipe: "model", "estimator" or "merger"."""
        return kind_of(self.config)

    def located(self) -> Node:
        """`config` as a tree in which each value has the place where it was written."""
        return wrap(self.config, f"{self.name}:", self.sources)

    def permissions(self) -> list[str]:
        """What no recipe can say, as arguments for another command line: places that only the user may name, and
        --allow-module.
        """
        return [*places.as_flags(self.located(), self.allow_modules), *allow_options(self.allow_modules)]

    def document(self) -> dict[str, Any]:
        """The content of resolved.yaml: `about` first, then the configuration."""
        return {"about": self.about, **self.config} if self.about else dict(self.config)


def merged(recipe: str, overlays: Sequence[str], flags: Sequence[str]) -> tuple[recipes.Recipe, Node, list[str]]:
    """The recipe and its layers merged, not yet checked: (recipe, tree with history, notes)."""
    found = recipes.load(recipe)
    layers = [*found.layers, *overlay_layers(overlays)]
    if flags:
        layers.append(flag_layer(list(flags)))
    tree, notes = merge_layers(layers)
    return found, tree, notes


def overlay_layers(overlays: Sequence[str]) -> list[Node]:
    """All overlays, each preceded by what it builds on, lowest first."""
    return [layer for overlay in overlays for layer in recipes.load_overlay(overlay)]


def resolve(
    recipe: str,
    overlays: Sequence[str] = (),
    flags: Sequence[str] = (),
    allow_modules: Sequence[str] = (),
    kinds: Sequence[str] = TRAINED,
) -> Resolved:
    """Merges and checks a recipe.

    Args:
        recipe: a name of the catalogue or a path.
        overlays: names or paths, later wins.
        flags: `key.path=value`, after all overlays.
        allow_modules: top-level modules beyond the allow-list; also looked up in the current folder.
        kinds: kinds of recipes that the caller can use, from `check.RECIPES`.
    Raises: UserError naming every problem with its file and line, or refusing a recipe of another kind.
    """
    found, tree, notes = merged(recipe, overlays, flags)
    return checked(found, tree, notes, allow_modules, kinds)


def checked(
    found: recipes.Recipe, tree: Node, notes: list[str], allow_modules: Sequence[str], kinds: Sequence[str]
) -> Resolved:
    """What `merged` gives, checked; arguments and errors are those of `resolve`."""
    _open_modules(allow_modules)
    refuse_kind(kind_of(tree.value), kinds, found.name)
    notes = [*notes, *allow.missing_modules(allow_modules)]
    return _checked(tree, notes, found.about, found.name, tuple(allow_modules), recipes.label(found.path))


def with_layer(resolved: Resolved, layer: dict[str, Any], where: str = COMMAND_LINE) -> Resolved:
    """The configuration with one more layer on top, checked again; `where` is what `sources` records for its values."""
    return with_layers(resolved, [wrap(layer, where)], where)


def with_layers(resolved: Resolved, layers: Sequence[Node], origin: str = COMMAND_LINE) -> Resolved:
    """The configuration with more layers on top, checked again; `origin` is named for what has no place of its own."""
    tree, notes = merge_layers([resolved.tree, *layers])
    notes = resolved.notes + notes
    return _checked(tree, notes, resolved.about, resolved.name, resolved.allow_modules, origin)


def inside_run(resolved: Resolved) -> Resolved:
    """The configuration with all that it writes in the run folder, also where the command line names another place."""
    tree, _ = places.kept_inside(resolved.tree, resolved.allow_modules, (PathUse.RUN,))
    return _checked(tree, resolved.notes, resolved.about, resolved.name, resolved.allow_modules, COMMAND_LINE)


def recorded(run_dir: Path | str) -> dict[str, Any]:
    """What a run folder was trained with, as plain data to compare with: nothing in it is built or checked.

    Raises: UserError if there is no resolved.yaml, or it is not a mapping.
    """
    root = _read_record(Path(run_dir))
    return {str(key): plain(node) for key, node in root.value.items() if key != "about"}


def load_resolved(run_dir: Path | str, allow_modules: Sequence[str] = ()) -> Resolved:
    """Reads back what a run folder was trained with. It is data like any recipe, and checked like one.

    Raises: UserError if there is no resolved.yaml, or it names a class that is not allowed.
    """
    run_dir = Path(run_dir)
    root = _read_record(run_dir)
    _open_modules(allow_modules)
    about = root.child("about")
    tree = Node({key: node for key, node in root.value.items() if key != "about"}, root.where)
    refuse_kind(kind_of(tree.value), TRAINED, str(run_dir))
    # Those that a command line named: a record is not the word of its user.
    tree, notes = places.kept_inside(tree, allow_modules, (PathUse.RUN, PathUse.CACHE))
    return _checked(
        tree,
        [*notes, *allow.missing_modules(allow_modules)],
        plain(about) if about is not None else {},
        _recorded_name(run_dir),
        tuple(allow_modules),
        str(run_dir / RESOLVED),
    )


def _checked(
    tree: Node, notes: list[str], about: dict[str, Any], name: str, modules: tuple[str, ...], origin: str
) -> Resolved:
    clean = without_removed(tree)
    if problems := find_problems(clean if clean.where else Node(clean.value, origin), modules):
        said = {problem.message for problem in problems}
        refuse([*(message for message in allow.missing_modules(modules) if message not in said), *problems], name)
    config = plain(clean)
    ordered = {key: config[key] for key in ROOT_KEYS if key in config}
    sources = {
        dotted(path): node.where for path, node in walk(clean) if path and not isinstance(node.value, dict | list)
    }
    return Resolved(ordered, notes, sources, about, name, tree, modules)


def verb_for(kind: str) -> str:
    """The verb of the command line that uses a recipe of this kind."""
    return "fit" if kind in TRAINED else "run"


def refuse_kind(kind: str, kinds: Sequence[str], name: str) -> None:
    """Raises: UserError for a recipe that is of another kind than these."""
    if kind not in kinds:
        does = "trains" if kind in TRAINED else "does not train"
        article = "an" if kind[0] in "aeiou" else "a"
        raise UserError(
            f"{name} is the recipe of {article} {kind}, which {does}; use it with `lightspan {verb_for(kind)}`"
        )


def refuse(problems: Sequence[Problem | str], name: str) -> None:
    """Raises one UserError with all problems, if there are any."""
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(
            f"{count} in the configuration of {name}:\n" + "\n".join(f"  {problem}" for problem in problems)
        )


def with_lists(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as the Trainer expects it: named callbacks and loggers become lists."""
    trainer = dict(config.get("trainer", {}))
    for key in ("callbacks", "logger"):
        if isinstance(trainer.get(key), dict):
            trainer[key] = list(trainer[key].values())
    if trainer.get("logger") == []:
        trainer["logger"] = False  # an empty list would mean the default logger
    return {**config, "trainer": trainer}


def with_run_folder(value: Any, run_dir: Path) -> Any:
    """Fills in `${run}` in every text."""
    if isinstance(value, dict):
        return {key: with_run_folder(child, run_dir) for key, child in value.items()}
    if isinstance(value, list):
        return [with_run_folder(child, run_dir) for child in value]
    return value.replace("${run}", str(run_dir)) if isinstance(value, str) else value


def _open_modules(modules: Sequence[str]) -> None:
    allow.refuse_modules(modules)
    here = str(Path.cwd())
    if modules and here not in sys.path:
        sys.path.append(here)  # last, so that nothing installed is shadowed


def _read_record(run_dir: Path) -> Node:
    path = run_dir / RESOLVED
    if not path.is_file():
        raise UserError(
            f"{run_dir} is not a run folder: it has no {RESOLVED}; give the folder that `lightspan fit` named"
        )
    refuse_link_out(path, run_dir, "its run folder")  # its lines would be shown in messages
    return read(path, recipes.label(path))


def _recorded_name(run_dir: Path) -> str:
    try:
        return str(settings_object(run_dir / PROVENANCE)["recipe"])
    except (ValueError, KeyError):
        return run_dir.name
