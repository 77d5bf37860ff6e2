"""`lightspan new`: the files of a new method, with content that already runs. `templates` has a TOML file with the
skeleton of each kind of method, and what all kinds share.

In a checkout of lightspan, method, recipe, test and evidence go where such files belong. In any folder outside of one
they form their own project: a package named after the method, with recipe, test and evidence beside it.
"""

import argparse
import ast
import builtins
import importlib.util
import keyword
import re
import sys
import tomllib
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template
from typing import Any

from lightspan.cli.commands.arguments import folder
from lightspan.core.errors import UserError, one_line, printable
from lightspan.core.files.atomic import read_small, refuse_link_out
from lightspan.core.spelling import nearest

NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
LONGEST = 40
RESERVED = ("scale",)  # contains overlays, not recipes
TEMPLATES = resources.files("lightspan.cli.commands") / "templates"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="FAMILY/NAME", help="such as contrastive/my_method")
    parser.add_argument(
        "--in",
        dest="folder",
        type=folder,
        default=Path(),
        metavar="FOLDER",
        help="where to write: a checkout of lightspan, or your own project (default: the current folder)",
    )
    parser.add_argument(
        "--like", metavar="FAMILY", help="begin as methods of this family do (default: the family itself)"
    )


@dataclass(frozen=True)
class NewFiles:
    """Where the files go, how they name the method, and what to do next.

    Attributes:
        files: what `_filled` calls their parts, by path relative to the folder; None stands for an empty file.
        module: where the class is.
        evidence: what the recipe says about its evidence.
        optional: those of `files` that may exist already, and are then kept.
        commands: to type next, in the folder.
    """

    files: dict[str, str | None]
    module: str
    evidence: str
    optional: tuple[str, ...]
    commands: list[str]


def run(args: argparse.Namespace) -> int:
    from lightspan.core.files.atomic import write_atomic

    family, name = _parts(args.name)
    root: Path = args.folder
    if not root.is_dir():
        raise UserError(f"--in {root}: there is no such folder; create it first")
    house = is_checkout(root)
    if not house and (around := next(filter(is_checkout, root.resolve().parents), None)) is not None:
        raise UserError(
            f"{root.resolve()} lies inside a checkout of lightspan; add the method to that with --in {around}, or name "
            "a folder outside of it for a project of your own"
        )
    kind = _kind_of(family, args.like)
    layout = _in_the_house(family, name) if house else _of_ones_own(name)
    there = [path for path in layout.files if (root / path).exists() and path not in layout.optional]
    if there:
        raise UserError(f"{', '.join(str(root / path) for path in there)} exists; choose another name, or remove it")
    if not house and _is_installed(name):
        raise UserError(f"a package named {name} would hide the installed one; choose another name")
    given = {
        "title": name.replace("_", " ").capitalize(),
        "cls": _class_of(name),
        "family": family,
        "module": layout.module,
        "class_path": f"{layout.module}.{_class_of(name)}",
        "evidence": layout.evidence,
    }
    tail = (TEMPLATES / f"evidence_{'house' if house else 'own'}.py.txt").read_text(encoding="utf-8")
    own = "lightspan" if house else name
    texts = {path: _filled(kind, part, given, tail, own) if part else "" for path, part in layout.files.items()}
    _require_class_of_its_own(args.name, _class_of(name), texts)
    new = {root / path: text for path, text in texts.items() if not (root / path).exists()}
    for file in layout.files:
        for parent in Path(file).parents[:-1]:
            refuse_link_out(root / parent, root, "the folder of --in")
    for path, text in new.items():
        write_atomic(path, text, setting="--in")
    # Printed when all is there: where nobody reads it, printing raises.
    print(printable("".join(f"wrote {path}\n" for path in new)), end="")
    elsewhere = house and not _is_imported(root)
    start = "This checkout is not the lightspan that runs here; install it first" if elsewhere else "It runs as it is"
    steps = ([] if root == Path() else [f"cd {root}"]) + ["pip install -e ."] * elsewhere + layout.commands
    print(printable(f"\n{start}. Next:\n" + "".join(f"  {step}\n" for step in steps)), end="")
    return 0


def is_checkout(root: Path) -> bool:
    """Whether a folder is the root of a checkout of lightspan."""
    project = root / "pyproject.toml"
    named = re.search(rb'(?m)^name = "lightspan"$', read_small(project) or b"")
    return named is not None and (root / "framework" / "training" / "method.py").is_file()


def _is_imported(root: Path) -> bool:
    """Whether a checkout is where this code comes from, as after `pip install -e .`; another would not be looked at."""
    return (root / "framework" / "cli" / "commands" / "new.py").resolve() == Path(__file__).resolve()


def _is_installed(name: str) -> bool:
    """Whether Python knows a module of this name; a folder without code, such as a new project's, does not count."""
    found = importlib.util.find_spec(name)
    return name in sys.stdlib_module_names or (found is not None and found.origin is not None)


def _parts(text: str) -> tuple[str, str]:
    family, _, name = text.partition("/")
    for part in (family, name):
        if not NAME.fullmatch(part) or len(part) > LONGEST or keyword.iskeyword(part) or part in RESERVED:
            raise UserError(
                f"{text!r} must be FAMILY/NAME, such as contrastive/my_method: small letters, digits and single "
                f"underscores, a letter first, at most {LONGEST} characters, and not a Python keyword"
            )
    return family, name


def _class_of(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


def _require_class_of_its_own(given: str, cls: str, texts: dict[str, str]) -> None:
    """Raises: UserError if one of the files, or Python itself, already uses the name of the class."""
    if hasattr(builtins, cls):  # or a constant such as None, with which the files could not be parsed
        owner = "Python"
    else:
        sources = (path for path in texts if path.endswith(".py"))
        owner = next((path for path in sources if _names_given(texts[path]).count(cls) > 1), "")
    if owner:
        raise UserError(f"{given!r} gives a class {cls}, but {owner} already has one of that name; choose another name")


def _names_given(text: str) -> list[str]:
    """The names of imports, classes and variables in Python source, each as often as it is bound."""
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.alias):
            names.append(node.asname or node.name)
        elif isinstance(node, ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
    return names


def _in_the_house(family: str, name: str) -> NewFiles:
    test, evidence = f"tests/methods/{family}/test_{name}.py", f"evidence/test_{name}.py"
    package = f"framework/methods/{family}/__init__.py"
    return NewFiles(
        {
            package: None,
            f"framework/methods/{family}/{name}.py": "method",
            f"recipes/{family}/{name}.yaml": "recipe.yaml",
            test: "test",
            evidence: "evidence.py",
        },
        f"lightspan.methods.{family}.{name}",
        evidence,
        (package,),
        [
            f"lightspan check {family}/{name}",
            f"lightspan fit {family}/{name}",
            f"python -m pytest {test}",
            f"python -m pytest {evidence}",
            "make pages",
        ],
    )


def _of_ones_own(name: str) -> NewFiles:
    test, evidence = f"test_{name}.py", f"evidence_{name}.py"
    return NewFiles(
        {
            f"{name}/__init__.py": None,
            f"{name}/method.py": "method",
            f"{name}.yaml": "recipe.yaml",
            test: "test",
            evidence: "evidence.py",
        },
        f"{name}.method",
        evidence,
        (),
        [
            f"lightspan check {name}.yaml --allow-module {name}",
            f"lightspan fit {name}.yaml --allow-module {name}",
            f"python -m pytest {test}",
            f"python {evidence}",
        ],
    )


def _kinds() -> dict[str, dict[str, Any]]:
    """Skeletons by family."""
    kinds = [_toml(file) for file in (TEMPLATES / "kinds").iterdir()]
    return {family: kind for kind in kinds for family in kind["families"]}


def _kind_of(family: str, like: str | None) -> dict[str, Any]:
    """Raises: UserError for a family without a skeleton, with the nearest one that has one."""
    kinds = _kinds()
    if (wanted := like or family) in kinds:
        return kinds[wanted]
    other = "" if like else "; for a family of another name, add --like FAMILY with one of these"
    raise UserError(
        f"there is no skeleton for the family {one_line(wanted)}; {nearest(wanted, kinds)}there are some for "
        f"{', '.join(sorted(kinds))}{other}"
    )


def _filled(kind: dict[str, Any], part: str, given: dict[str, str], tail: str, own: str) -> str:
    """The file for a part: "method" and "test" are of the kind, "recipe.yaml" and "evidence.py" are shared.

    Args:
        tail: what ends the evidence: a test in the house, a script elsewhere.
        own: the package whose imports come last.
    """
    if part in ("method", "test"):
        return _with_sorted_imports(Template(kind[part]).substitute(given), own)
    data = _toml(TEMPLATES / "data" / f"{kind['data']}.toml")
    fragments = data | {key: kind[key] for key in ("model", "build")}
    fragments["imports"] = kind["imports"] + data["imports"]
    if kind["views"]:
        fragments |= {"recipe": data["recipe_views"], "code": data["code_views"]}
        fragments["imports"] += data["imports_views"]
    filled = {key: Template(text).substitute(given).rstrip("\n") for key, text in fragments.items()}
    shared = (TEMPLATES / f"{part}.txt").read_text(encoding="utf-8")
    text = Template(shared).substitute(given | filled)
    return text if part == "recipe.yaml" else _with_sorted_imports(text + tail, own)


def _toml(file: Traversable) -> dict[str, Any]:
    return tomllib.loads(file.read_text(encoding="utf-8"))


def _with_sorted_imports(text: str, own: str) -> str:
    """The imports in the order that linters want, which depends on whose project the file belongs to."""
    lines = text.split("\n")
    places = [i for i, line in enumerate(lines) if line.startswith(("import ", "from "))]
    sections: list[list[str]] = [[], [], []]
    for place in places:
        root = lines[place].split()[1].split(".")[0]
        sections[0 if root in sys.stdlib_module_names else 2 if root == own else 1].append(lines[place])
    ordered = [sorted(section, key=lambda line: (line.startswith("from "), line.split()[1])) for section in sections]
    block = "\n\n".join("\n".join(section) for section in ordered if section)
    return "\n".join([*lines[: places[0]], block, *lines[places[-1] + 1 :]])
