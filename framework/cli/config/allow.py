"""The gate: what a configuration may name, and where a run may write.

A `class_path` is imported and called, and a recipe may come from a stranger. So every name is judged before anything is
imported, by where it is DEFINED: the sources are read and re-exports followed, for a module contains everything that it
imports (`lightspan.callbacks.watching.ledger.write_atomic`, `X.subprocess.run`). Only what `parts` lists passes; what
cannot be determined is refused. `resolve` checks every configuration here, `build` checks it again, and the typed
builder then imports nothing but the definitions that were found here.

`--allow-module M` is the user's permission for everything that is defined in M.
"""

import difflib
import importlib.util
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightspan.cli.config.limits import out_of_range
from lightspan.cli.config.parts import (
    CLASSES_OF,
    FUNCTIONS_OF,
    LIGHTNING,
    TOPS,
)
from lightspan.cli.config.places import RUN, refused_places
from lightspan.cli.config.problems import Problem
from lightspan.cli.config.tree import KeyPath, Node, dotted, plain, walk
from lightspan.core.errors import UserError
from lightspan.core.source import Absent, Definition, exported, locate, under
from lightspan.core.spelling import nearest

_NAME = r"[A-Za-z][A-Za-z0-9_]*"  # ASCII: other alphabets have letters that only look the same
_IMPORT_PATH = re.compile(rf"{_NAME}(?:\.{_NAME})+")
_DOTTED = re.compile(r"\w+(?:\.\w+)+")


def gate(root: Node, modules: Sequence[str] = ()) -> list[Problem]:
    """Everything in a raw tree that may not be imported, written to or passed to a builder at all."""
    found = (*_refused_names(root, modules), *refused_places(root, modules), *_refused_values(root))
    return [Problem(node.where, dotted(path), message) for path, node, message in found]


def refusal(class_path: object, modules: Sequence[str] = ()) -> str | None:
    """Why a class path may not be imported, or None if it may.

    Args:
        class_path: what the configuration says.
        modules: names given with --allow-module.
    """
    if not isinstance(class_path, str) or not _IMPORT_PATH.fullmatch(class_path):
        if isinstance(class_path, str) and any(part.startswith("_") for part in class_path.split(".")):
            return f"{class_path!r} is private; name a public class"
        return f"{class_path!r:.80} is not a class; write its full import path, such as torch.optim.AdamW"
    top = class_path.split(".")[0]
    leave = [module for module in modules if under(class_path, module)]
    if top not in TOPS and not leave:
        allowed = (*TOPS, *(module.split(".")[0] for module in modules if _is_there(module)))
        near = difflib.get_close_matches(top, allowed, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        # With a similar name among the modules that were allowed, no further permission is advised.
        way = "" if near and near[0] not in TOPS else permission_advice(class_path)
        return f"{class_path} is outside the allowed modules ({', '.join(allowed)}); {hint}{way}".rstrip("; ")
    found = locate(class_path)
    if isinstance(found, Absent):
        name = class_path.removeprefix(found.module + ".").split(".")[0]
        hint = nearest(name, found.names) or f"it has {', '.join(sorted(found.names)[:12])}" if found.names else ""
        return f"module {found.module} has no {name}; {hint}".rstrip("; ")
    if found is None or found.name is None:
        # Even with the user's permission, the builder imports nothing that is defined elsewhere.
        return None if leave else f"{class_path} is not defined as a class in any source that can be read; refused"
    defined = found.name
    if any(under(defined, module) for module in modules) or _is_part(found):
        return None
    through = "" if defined == class_path else f", which is {defined},"
    if defined.split(".")[0] not in TOPS:
        return f"{class_path}{through} is outside the allowed modules ({', '.join(TOPS)}); {permission_advice(defined)}"
    if not found.is_class:
        return (
            f"{class_path}{through} is a function; only classes may be named, and builders that the modules of "
            f"{' and '.join(FUNCTIONS_OF)} list in __all__; {alternative_advice(defined)}"
        )
    listed = ", ".join(part for part in (*CLASSES_OF, *LIGHTNING) if under(part, defined.split(".")[0]))
    return (
        f"{class_path}{through} is not among the parts of {defined.split('.')[0]} that a configuration may name "
        f"({listed}); {permission_advice(defined)}"
    )


def permission_advice(name: str) -> str:
    """What to do about a refused full name. Permission is advised for the user's code and single modules of Lightning,
    whose parts do what they say; never for other parts of a library or of Python itself.
    """
    top = name.split(".")[0]
    if top in sys.stdlib_module_names:
        return (
            f"{top} belongs to Python itself, with which a stranger's recipe could do anything here, and no part "
            "of a run needs it; refused"
        )
    if top == "lightning":
        return f"its code was not reviewed; to use it anyway, add --allow-module {name.rpartition('.')[0]}"
    if top in TOPS:
        return alternative_advice(name)
    if _is_installed(top):
        return f"{top} is a library; {alternative_advice(name)}. If it is your own, add --allow-module {top}"
    return f"to use your own code, add --allow-module {top}"


def alternative_advice(name: str) -> str:
    """What to write if code is needed whose full name is refused; never permission for a whole library."""
    network = "timm networks are built by name, through lightspan.backbones.vision.timm_backbone; else " * (
        under(name, "timm") or under(name, "torchvision.models")
    )
    return f"{network}call it in your own function and allow that function's module with --allow-module"


def importable(root: Node, modules: Sequence[str] = ()) -> set[str]:
    """What a builder may import for this tree: the parts that may be named, which defaults and types name too, and from
    everything else the class paths of the tree and their definitions.
    """
    names = {*CLASSES_OF, *LIGHTNING, *modules}
    for _, node in class_paths(root):
        if refusal(node.value, modules) is None:
            names.add(node.value)
            found = locate(node.value)
            if isinstance(found, Definition) and found.name is not None:
                names.add(found.name)
    return names


def foreign(value: Any, modules: Sequence[str] = ()) -> Iterator[str]:
    """The refusals of what a typed builder is about to call, in its own tree: also what it found in defaults, files and
    short names.
    """
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        if isinstance(class_path := value.get("class_path"), str) and (message := refusal(class_path, modules)):
            yield message
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        for child in value:
            yield from foreign(child, modules)


def missing_modules(modules: Sequence[str]) -> list[str]:
    """The message for each --allow-module that cannot be found; nothing is imported to look for it."""
    return [
        f"--allow-module {module}: there is no such module here, neither installed nor in the current folder"
        for module in modules
        if not _is_there(module)
    ]


def refuse_modules(modules: Sequence[str]) -> None:
    """Raises UserError for an --allow-module that is not a module name."""
    for module in modules:
        if not re.fullmatch(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*", module, re.ASCII):
            raise UserError(f"--allow-module {module!r}: not a module name; write it as in an import, such as my_pkg")


def class_paths(root: Node) -> list[tuple[KeyPath, Node]]:
    """Every `class_path` of the raw tree, in lists too."""
    return [(path, node) for path, node in walk(root) if path and path[-1] == "class_path"]


def text_refusal(text: str, modules: Sequence[str] = ()) -> str | None:
    """Why a text may not be given where a class is possible too, or None.

    A typed builder takes `my_pkg.Model`, a YAML text or the name of a YAML file for a class; each would evade the check
    of `class_path`.
    """
    if "class_path" in text or text.lstrip()[:1] in ("{", "["):
        return f"{text[:60]!r} is YAML inside a text; write it as a mapping"
    if _DOTTED.fullmatch(text) and (refusal(text, modules) is None or _is_module(text.split(".")[0])):
        return f"{text!r} names a class as text; write a mapping with class_path: {text}"
    try:
        is_file = text.startswith(RUN) or Path(text).is_file()
    except (OSError, ValueError):
        is_file = False
    return f"{text!r} is a file where a class is expected; write a mapping with class_path" if is_file else None


def _is_part(found: Definition) -> bool:
    if found.is_class:
        return found.name in LIGHTNING or any(under(str(found.name), part) for part in CLASSES_OF)
    return any(under(str(found.name), part) for part in FUNCTIONS_OF) and str(found.name).split(".")[-1] in exported(
        found.source
    )


def _refused_names(root: Node, modules: Sequence[str]) -> Iterator[tuple[KeyPath, Node, str]]:
    for path, node in walk(root):
        key = path[-1] if path else ""
        if key == "class_path":
            if (message := refusal(plain(node), modules)) is not None:
                yield path, node, message
            elif "dict_kwargs" in path:
                yield path, node, "no class may be given below dict_kwargs, which has no types; use init_args"
        elif isinstance(key, str) and (key.startswith("__") or "class_path" in key.split(".")):
            # A typed builder reads a dotted key as a path of keys, and keeps its own notes under such names.
            yield path, node, "no setting can have such a name"


def _refused_values(root: Node) -> Iterator[tuple[KeyPath, Node, str]]:
    for path, node in walk(root):
        if (message := out_of_range(path, node.value)) is not None:
            yield path, node, message
        elif isinstance(node.value, str) and node.value.lstrip().startswith("pipe:"):
            yield path, node, f"{node.value!r:.80} would run a command; name files or https addresses"


def _is_there(module: str) -> bool:
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    if spec is None or top == "lightspan":  # its folders may be in several places
        return spec is not None
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    for part in rest:
        found = [path for place in places for path in place.glob(f"{part}*") if path.name.split(".")[0] == part]
        if not found:
            return False
        places = [path for path in found if path.is_dir()]
    return True


def _is_installed(top: str) -> bool:
    """Whether a top-level module is where installers put packages; the user's own editable install is not."""
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    places = [spec.origin or "", *(spec.submodule_search_locations or ())] if spec is not None else []
    return any({"site-packages", "dist-packages"} & set(Path(place).parts) for place in places)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
