"""Which classes a configuration may name.

A `class_path` is imported, and importing runs code. So the whole raw tree is checked here before anything is imported:
only known libraries, of those only the parts that hold models, optimisers, data and callbacks, and of those only
classes (by the capital letter of their last component; lightspan and modules that the user allowed may also name
functions).
"""

import difflib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from lightspan.config.tree import KeyPath, Node, dotted, walk
from lightspan.errors import UserError

SAFE_PREFIXES = (
    "lightspan",
    "torch.nn",
    "torch.optim",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.cli.ReduceLROnPlateau",
    "lightning.pytorch.demos.boring_classes",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "lightning.fabric.plugins",
    "pytorch_lightning.callbacks",
    "pytorch_lightning.loggers",
    "pytorch_lightning.plugins",
    "pytorch_lightning.profilers",
    "pytorch_lightning.strategies",
    "torchvision.models",
    "torchvision.ops",
    "torchvision.transforms",
    "torchmetrics",
    "timm",
    "transformers",
    "peft",
)
# Parts of the above that run commands, load pickles, or talk to the network.
UNSAFE_PREFIXES = (
    "lightspan.cli",
    "lightspan.commands",
    "lightspan.config",
    "lightspan.files",
    "lightspan.report",
    "timm.models._hub",
    "transformers.commands",
    "transformers.pipelines",
    "transformers.tools",
    "transformers.utils",
)
_IMPORT_PATH = re.compile(r"^[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+$")


def under(name: str, prefix: str) -> bool:
    """Whether a dotted name is `prefix` or lies inside it; `torchevil` is not under `torch`."""
    return name == prefix or name.startswith(prefix + ".")


def refusal(class_path: object, modules: Sequence[str] = ()) -> str | None:
    """Why a class path may not be imported, or None where it may.

    Args:
        class_path: what the configuration says.
        modules: names given with --allow-module.
    """
    if not isinstance(class_path, str) or not _IMPORT_PATH.match(class_path):
        return f"{class_path!r} is not a class; write its full import path, such as torch.optim.AdamW"
    parts = class_path.split(".")
    if any(part.startswith("_") for part in parts):
        return f"{class_path} is private; name a public class"
    if any(under(class_path, module) for module in modules):
        return None
    top = parts[0]
    known = sorted({prefix.split(".")[0] for prefix in SAFE_PREFIXES})
    if top not in known:
        near = difflib.get_close_matches(top, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return (
            f"{class_path} is outside the allowed modules ({', '.join(known)}); {hint}"
            f"to use code of your own, add --allow-module {top}"
        )
    if any(under(class_path, prefix) for prefix in UNSAFE_PREFIXES) or not any(
        under(class_path, prefix) for prefix in SAFE_PREFIXES
    ):
        parts_of_top = ", ".join(prefix for prefix in SAFE_PREFIXES if under(prefix, top))
        return f"{class_path} is not among the parts of {top} that a configuration may name ({parts_of_top})"
    if top != "lightspan" and not parts[-1][0].isupper():
        return f"{class_path} is not a class: only classes may be named here, and their names begin with a capital"
    return None


def refuse_modules(modules: Sequence[str]) -> None:
    """Raises UserError for an --allow-module that is no module name."""
    for module in modules:
        if not re.match(r"^[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*$", module):
            raise UserError(f"--allow-module {module!r}: not a module name; write it as in an import, such as my_pkg")


def class_paths(root: Node) -> list[tuple[KeyPath, Node]]:
    """Every `class_path` of the raw tree, in lists too."""
    return [(path, node) for path, node in walk(root) if path and path[-1] == "class_path"]


def text_refusal(text: str, modules: Sequence[str] = ()) -> str | None:
    """Why a text may not stand where a class may stand too, or None.

    A typed builder takes `my_pkg.Model`, a YAML text or the name of a YAML file for a class; each would evade the check
    of `class_path`.
    """
    if "class_path" in text or text.lstrip()[:1] in ("{", "["):
        return f"{text[:60]!r} is YAML inside a text; write it as a mapping"
    if _IMPORT_PATH.match(text) and (refusal(text, modules) is None or _is_module(text.split(".")[0])):
        return f"{text!r} names a class as text; write a mapping with class_path: {text}"
    try:
        is_file = Path(text).is_file()
    except (OSError, ValueError):
        is_file = False
    return f"{text!r} is a file where a class is expected; write a mapping with class_path" if is_file else None


def check(root: Node, modules: Sequence[str] = ()) -> list[tuple[str, str, str]]:
    """All refusals of the raw tree as (where, key, message)."""
    return [
        (node.where, dotted(path), message)
        for path, node in class_paths(root)
        if (message := refusal(node.value, modules)) is not None
    ]


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
