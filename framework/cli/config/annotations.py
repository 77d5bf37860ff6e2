"""Whether a plain value fits a type annotation, as far as source alone can tell.

Three answers: it fits, it does not, and unknown (None). A class that no plain value can be an instance of accepts only
a mapping, which may hold its constructor's arguments; of types other than numbers, texts, literals, lists, mappings and
their unions nothing is known. Unknown is left to the typed builder.
"""

import ast
import contextlib
import sys
from typing import Any

from lightspan.cli.config.signatures import signature_of
from lightspan.core.files.places import PathUse
from lightspan.core.source import (
    Definition,
    Seen,
    Source,
    base_definitions,
    descends,
    exported,
    load,
    lookup,
    resolve,
    submodules,
)

_TUPLES = ("tuple", "Tuple")
_SEQUENCES = (*_TUPLES, "list", "List", "Sequence", "Iterable", "set", "Set", "Collection")
_MAPPINGS = ("dict", "Dict", "Mapping", "MutableMapping")
_TEXTS = ("str", "Path", "PathLike", "_PATH")
_NAMES = {"int": (int,), "float": (int, float), "bool": (bool,), **dict.fromkeys(_TEXTS, (str,))}
_NEVER_PLAIN = ("Tensor", "Module", "Optimizer", "LRScheduler", "Callback", "Logger")  # told by name, unread
# Bases of classes that a plain value may be made into.
_PLAIN = {
    "int",
    "float",
    "str",
    "Enum",
    "IntEnum",
    "StrEnum",
    "LightningEnum",
    "IntFlag",
    "Flag",
    "Generic",
    "Protocol",
}
_UNTYPED = ("Any", "object")
_BOUND = {"OptimizerCallable": 1, "LRSchedulerCallable": 1}  # of lightning.pytorch.cli
_MODULE = "torch.nn.modules.module.Module"
_FURTHER = {  # modules with classes of a kind, beside the one that defines the kind
    "torch.optim.optimizer.Optimizer": (
        "torch.optim",
        "lightspan.optim.low_rank.optimizer",
        "lightspan.optim.low_rank.presets",
        "lightspan.optim.muon",
    ),
    "torch.optim.lr_scheduler.LRScheduler": ("lightspan.optim.schedules",),
}
_USE = "lightspan.core.files.places.PathUse"
_MAX_DEPTH = 10


def fits(value: Any, annotation: ast.expr, source: Source, depth: int = 0) -> bool | None:
    """Whether plain data (scalars, lists, dicts) fits an annotation written in a module; None where unknown."""
    if depth > _MAX_DEPTH:
        return None
    union = members(annotation, source)
    if len(union) > 1:
        answers: list[bool | None] = []
        for member, where in union:
            if answer := fits(value, member, where, depth + 1):  # to try the others may take parsing a large module
                return True
            answers.append(answer)
        return None if None in answers else False
    annotation, source = union[0]
    if isinstance(annotation, ast.Constant) and annotation.value is None:
        return value is None
    name = _name(annotation)
    if name in _NAMES:
        return isinstance(value, _NAMES[name]) and (name == "bool" or not isinstance(value, bool))
    if name in _MAPPINGS:
        return isinstance(value, dict)
    if name in _SEQUENCES:
        if not isinstance(value, list):
            return False
        inner = _arguments(annotation)
        if not inner:
            return True
        if name in ("tuple", "Tuple") and not _is_ellipsis(inner[-1]):
            if len(inner) != len(value):
                return False
        else:
            inner = inner[:1] * len(value)
        answers = [fits(item, each, source, depth + 1) for item, each in zip(value, inner, strict=True)]
        return False if False in answers else None if None in answers else True
    if name == "Literal":
        choices = literal_choices(annotation)
        return None if choices is None else any(value == choice and type(value) is type(choice) for choice in choices)
    if (name in _NEVER_PLAIN or name.endswith("Callable")) and not isinstance(value, dict):
        return False
    if not isinstance(value, dict):
        found = resolve(annotation, source)
        if isinstance(found, Definition) and isinstance(found.node, ast.ClassDef):
            # The builder reads some classes of Python's own, such as `timedelta`, from a text.
            read = isinstance(value, str) and found.source.name.split(".")[0] in sys.stdlib_module_names
            return None if read or _may_be_plain(found.node, found.source) else False
    return None


def _may_be_plain(node: ast.ClassDef, source: Source, depth: int = 0) -> bool:
    """Whether a plain value may stand for an object of a class; also where a base cannot be read."""
    if depth > _MAX_DEPTH or {ast.unparse(base).split(".")[-1].split("[")[0] for base in node.bases} & _PLAIN:
        return True
    return any(
        base is None or (isinstance(base.node, ast.ClassDef) and _may_be_plain(base.node, base.source, depth + 1))
        for base in base_definitions(node, source)
    )


def members(annotation: ast.expr, source: Source, depth: int = 0) -> list[tuple[ast.expr, Source]]:
    """The members of a union (one for any other annotation), aliases and quoted annotations resolved."""
    if depth > _MAX_DEPTH:
        return [(annotation, source)]
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        try:
            return members(ast.parse(annotation.value, mode="eval").body, source, depth + 1)
        except SyntaxError:
            return [(annotation, source)]
    inner: list[ast.expr] = []
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        inner = [annotation.left, annotation.right]
    name = _name(annotation)
    if name == "Optional":
        inner = [*_arguments(annotation), ast.Constant(None)]
    elif name == "Union":
        inner = _arguments(annotation)
    elif name in ("Annotated", "Final"):
        inner = _arguments(annotation)[:1]
    elif isinstance(annotation, ast.Name | ast.Attribute) and name not in (*_NAMES, *_SEQUENCES, *_MAPPINGS):
        found = resolve(annotation, source, glance=True)  # an alias is wanted
        if isinstance(found, Definition) and isinstance(found.node, ast.Subscript | ast.BinOp):
            return members(found.node, found.source, depth + 1)
    if not inner:
        return [(annotation, source)]
    return [pair for member in inner for pair in members(member, source, depth + 1)]


def use_of(annotation: ast.expr, source: Source, depth: int = 0) -> PathUse | None:
    """What happens at the place that a text of this type names, None if it names none; see
    `lightspan.core.files.places`.
    """
    if depth > _MAX_DEPTH:
        return None
    name, inner = _name(annotation), [(part, source) for part in _arguments(annotation)]
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        with contextlib.suppress(SyntaxError):
            inner = [(ast.parse(annotation.value, mode="eval").body, source)]
    elif isinstance(annotation, ast.BinOp):
        inner = [(annotation.left, source), (annotation.right, source)]
    elif name == "Annotated":
        for mark, _ in inner[1:]:
            found = resolve(mark.value, source) if isinstance(mark, ast.Attribute) else None
            if isinstance(mark, ast.Attribute) and isinstance(found, Definition) and found.name == _USE:
                return PathUse[mark.attr]
        inner = inner[:1]
    elif isinstance(annotation, ast.Name | ast.Attribute) and name not in _NAMES:
        alias = resolve(annotation, source, glance=True)
        inner = []
        if isinstance(alias, Definition) and isinstance(alias.node, ast.expr):
            inner = [(alias.node, alias.source)]
    elif name not in ("Optional", "Union", "Final"):
        return None
    return next((use for part, where in inner if (use := use_of(part, where, depth + 1)) is not None), None)


def takes_only_plain(annotation: ast.expr, source: Source) -> bool:
    """Whether a text given for this annotation can only be a text: no class, no callable, nothing unknown."""
    for member, where in members(annotation, source):
        name = _name(member)
        inner = _arguments(member)
        plain = name in _NAMES or name == "Literal" or (isinstance(member, ast.Constant) and member.value is None)
        if name in _SEQUENCES or name in _MAPPINGS:
            plain = bool(inner) and all(takes_only_plain(item, where) for item in inner if not _is_ellipsis(item))
        if not plain:
            return False
    return True


def takes_class_itself(annotation: ast.expr, source: Source) -> bool:
    """Whether a class is wanted and not an object of it: `type[...]`, and every kind of timm module, whose annotations
    name the class that they take (`block: Union[BasicBlock, Bottleneck]`). Where timm says `nn.Module`, it takes one.
    """
    for member, where in members(annotation, source):
        if _name(member) in ("type", "Type"):
            return True
        found = resolve(member, where) if source.name.startswith("timm.") else None
        if isinstance(found, Definition) and found.is_class and found.name != _MODULE and descends(found, _MODULE):
            return True
    return False


def is_untyped(annotation: ast.expr, source: Source) -> bool:
    """Whether every value fits, so that nothing is known about what the class does with it."""
    return any(_name(member) in _UNTYPED for member, _ in members(annotation, source))


def item_annotation(annotation: ast.expr, source: Source, key: int | str) -> tuple[ast.expr, Source] | None:
    """What an item of a list (by its position) or a value of a mapping (by its key) is declared as, None if not."""
    for member, where in members(annotation, source):
        name, inner = _name(member), _arguments(member)
        if isinstance(key, int) and name in _SEQUENCES and inner:
            fixed = name in ("tuple", "Tuple") and not _is_ellipsis(inner[-1])
            if not fixed or key < len(inner):
                return inner[key if fixed else 0], where
        if isinstance(key, str) and name in _MAPPINGS and len(inner) == 2:
            return inner[1], where
    return None


def bound_arguments(annotation: ast.expr | None, source: Source) -> int | None:
    """How many leading arguments the caller supplies to a class given for this annotation.

    `Callable[[Optimizer, int], ...]` supplies 2, `Callable[..., X]` any number (-1), a plain class none (0); None if
    there is no annotation.
    """
    if annotation is None:
        return None
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return bound_arguments(annotation.left, source) or bound_arguments(annotation.right, source)
    name = _name(annotation)
    if name in ("Optional", "Union"):
        return next((count for member in _arguments(annotation) if (count := bound_arguments(member, source))), 0)
    if name == "Callable":
        inner = _arguments(annotation)
        return len(inner[0].elts) if inner and isinstance(inner[0], ast.List) else -1
    if name in _BOUND:
        return _BOUND[name]
    # Only names that contain Callable are looked up: reading the source of every class would cost more than all else.
    found = resolve(annotation, source) if name.endswith("Callable") else None
    if isinstance(found, Definition) and isinstance(found.node, ast.expr):
        return bound_arguments(found.node, found.source)
    return -1 if name.endswith("Callable") else 0


def class_names(annotation: ast.expr, source: Source) -> list[str]:
    """The full names of the classes that an annotation takes, or whose builders it takes; empty if one is unknown."""
    names: list[str] = []
    for member, where in members(annotation, source):
        name, inner = _name(member), _arguments(member)
        if name == "Callable":
            found = class_names(inner[1], where) if len(inner) == 2 else []
        elif name in _NAMES or name == "Literal" or (isinstance(member, ast.Constant) and member.value is None):
            continue
        else:
            what = resolve(member, where, glance=True)
            found = [what.name] if isinstance(what, Definition | Seen) and what.is_class and what.name else []
        if not found:
            return []
        names += found
    return names


def kinds_of(annotation: ast.expr, source: Source) -> list[str]:
    """The full names of the classes that an annotation takes an object of, or that a callable may make, as far as the
    modules that define its members hold them: `SVDBasis` and its like for `Basis | None`. Classes of lightspan are also
    in the modules beside that one, and what torch calls an optimiser or a schedule in those of `_FURTHER`.
    """
    names: list[str] = []
    for member, where in members(annotation, source):
        inner = _arguments(member) if _name(member) == "Callable" else []
        made = inner[1] if len(inner) == 2 else member
        wanted = resolve(made, where)
        if not isinstance(wanted, Definition) or wanted.name is None:
            continue
        if made is member and _name(made) in _NEVER_PLAIN:
            continue  # networks, for example, are anywhere
        further = _FURTHER.get(wanted.name, ()) if made is not member else ()
        for module in dict.fromkeys((*further, wanted.source.name, *_beside(wanted.source))):
            known = load(module)
            for name in _classes_of(known) if known is not None else ():
                found = lookup(known, name) if known is not None else None
                if (
                    isinstance(found, Definition)
                    and found.is_class
                    and found.name != wanted.name
                    and _is_concrete(found)
                    and (made is not member or _can_be_configured(found))
                    and descends(found, wanted.name)
                ):
                    names.append(f"{module}.{name}")
    return names


def _beside(source: Source) -> list[str]:
    """The modules of the same package, for one of lightspan's: there each part has a file of its own."""
    package = source.name.rpartition(".")[0]
    known = load(package) if package.startswith("lightspan.") else None
    return [f"{package}.{name}" for name in sorted(submodules(known))] if known is not None else []


def _can_be_configured(found: Definition) -> bool:
    """Whether a configuration can give all arguments of a class: none is for tensors alone."""
    known = signature_of(found)
    for parameter in known.parameters.values() if known is not None else ():
        if parameter.annotation is not None:
            kinds = [ast.unparse(member) for member, _ in members(parameter.annotation, parameter.source)]
            if all("Tensor" in kind for kind in kinds if kind != "None"):
                return False
    return True


def _classes_of(source: Source) -> list[str]:
    """The names of a module's own classes; of a package those that it exports."""
    own = [node.name for node in source.tree.body if isinstance(node, ast.ClassDef)]
    return own or sorted(exported(source))


def _is_concrete(found: Definition) -> bool:
    """Whether a class is public and declares nothing abstract itself."""
    abstract = any("abstract" in ast.unparse(mark) for part in ast.walk(found.node) for mark in _decorators(part))
    return not abstract and not str(found.name).split(".")[-1].startswith("_")


def _decorators(node: ast.AST) -> list[ast.expr]:
    return node.decorator_list if isinstance(node, ast.FunctionDef) else []


def dataclass_of(annotation: ast.expr, source: Source) -> Definition | None:
    """The class that a mapping without class_path would fill, or None if it is not a class in readable source."""
    for member, where in members(annotation, source):
        found = resolve(member, where)
        if isinstance(found, Definition) and isinstance(found.node, ast.ClassDef) and signature_of(found):
            return found
    return None


def literal_choices(annotation: ast.expr) -> list[Any] | None:
    """The values of `Literal[...]`, or None if one is not written as a plain value."""
    try:
        return [ast.literal_eval(item) for item in _arguments(annotation)]
    except ValueError:
        return None


def describe(annotation: ast.expr, source: Source) -> str:
    """The annotation in plain words: `a whole number or null`."""
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", **dict.fromkeys(_TEXTS, "a text")}
    parts = []
    for member, _ in members(annotation, source):
        name = _name(member)
        if isinstance(member, ast.Constant) and member.value is None:
            parts.append("null")
        elif name == "Literal" and (choices := literal_choices(member)):
            parts.append("one of " + ", ".join(repr(choice) for choice in choices))
        elif name in _SEQUENCES and (inner := _arguments(member)):
            values = [part for part in inner if not _is_ellipsis(part)]
            fixed = name in _TUPLES and len(inner) == len(values) > 1
            each = " or ".join(dict.fromkeys(describe(value, source) for value in values))
            parts.append(f"a list of {len(values)}, each {each}" if fixed else f"a list of {each}")
        else:
            parts.append(words.get(name, ast.unparse(member)))
    return " or ".join(dict.fromkeys(parts))


def _is_ellipsis(annotation: ast.expr) -> bool:
    return isinstance(annotation, ast.Constant) and annotation.value is Ellipsis


def _name(annotation: ast.expr) -> str:
    target = annotation.value if isinstance(annotation, ast.Subscript) else annotation
    return ast.unparse(target).split(".")[-1] if isinstance(target, ast.Name | ast.Attribute) else ""


def _arguments(annotation: ast.expr) -> list[ast.expr]:
    if not isinstance(annotation, ast.Subscript):
        return []
    inside = annotation.slice
    return list(inside.elts) if isinstance(inside, ast.Tuple) else [inside]
