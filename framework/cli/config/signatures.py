"""Constructor parameters of classes and functions, read from source.

Follows base classes if a class has no constructor of its own or passes `**kwargs` on. What cannot be read is left
open: an open signature accepts unknown names, and the typed builder has the last word.
"""

import ast
from dataclasses import dataclass, field, replace
from functools import cache

from lightspan.core.source import Absent, Definition, Source, base_definitions, locate


@dataclass(frozen=True)
class Parameter:
    """One parameter; `source` is the module whose names its annotation uses."""

    name: str
    annotation: ast.expr | None
    required: bool
    source: Source


@dataclass(frozen=True)
class Signature:
    """What a class or function takes, without self.

    Attributes:
        parameters: by name, in order.
        open: whether further names may be accepted that could not be read.
    """

    parameters: dict[str, Parameter] = field(default_factory=dict)
    open: bool = False


@cache
def signature(class_path: str) -> Signature | Absent | None:
    """The signature of what a full import path names.

    Returns: Absent if its module is known to have no such name, None if that is unknown.
    """
    found = locate(class_path)
    return signature_of(found) if isinstance(found, Definition) else found


def signature_of(definition: Definition) -> Signature | None:
    """The signature of a class or function definition; None for any other name."""
    if isinstance(definition.node, ast.ClassDef):
        return _of_class(definition.node, definition.source, 0)
    if isinstance(definition.node, ast.FunctionDef):
        return _of_function(definition.node, definition.source, skip_first=False)
    return None


def is_dataclass(definition: Definition | Absent | None) -> bool:
    """Whether the definition is a class decorated as a dataclass."""
    return (
        isinstance(definition, Definition)
        and isinstance(definition.node, ast.ClassDef)
        and any("dataclass" in ast.unparse(decorator) for decorator in definition.node.decorator_list)
    )


def member(class_path: str, name: str) -> Definition | None:
    """As `member_of`, of the class that a full import path names."""
    found = locate(class_path)
    return member_of(found, name) if isinstance(found, Definition) else None


def member_of(definition: Definition, name: str, depth: int = 0) -> Definition | None:
    """The method `name` of a class, or the expression it is set to in the class; of its first base that has it. None if
    there is none, or the source does not tell.
    """
    if not isinstance(definition.node, ast.ClassDef) or depth > 12:
        return None
    for statement in definition.node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == name:
            return Definition(statement, definition.source)
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        value = getattr(statement, "value", None)
        if value is not None and any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return Definition(value, definition.source)
    for base in base_definitions(definition.node, definition.source):
        if base is not None and (found := member_of(base, name, depth + 1)) is not None:
            return found
    return None


def signature_of_method(method: ast.FunctionDef, source: Source) -> Signature:
    """What a method takes."""
    return _of_function(method, source, skip_first=True)


def _of_class(node: ast.ClassDef, source: Source, depth: int) -> Signature:
    if depth > 12:
        return Signature(open=True)
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            own = signature_of_method(statement, source)
            if not own.open:
                return own
            if not _hands_on(statement) and any(base is not None for base in base_definitions(node, source)):
                return own
            inherited = _inherited(node, source, depth)
            supplied = _supplied(statement, list(inherited.parameters))
            rest = {
                name: replace(parameter, required=parameter.required and name not in supplied)
                for name, parameter in inherited.parameters.items()
                if name not in own.parameters
            }
            return Signature(own.parameters | rest, inherited.open)
    if is_dataclass(Definition(node, source)):
        inherited = _inherited(node, source, depth)
        return Signature({**inherited.parameters, **_fields(node, source)}, inherited.open)
    if any(isinstance(statement, ast.FunctionDef) and statement.name == "__new__" for statement in node.body):
        return Signature(open=True)
    return _inherited(node, source, depth)


def _hands_on(constructor: ast.FunctionDef) -> bool:
    """Whether a constructor passes its **kwargs to that of a base; otherwise their receiver is unknown."""
    return _call_of_base(constructor) is not None


def _call_of_base(constructor: ast.FunctionDef) -> ast.Call | None:
    """The call of a base's constructor that gets the **kwargs of this one."""
    kwargs = constructor.args.kwarg
    for call in ast.walk(constructor):
        if (
            kwargs is not None
            and isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr == "__init__"
            and any(word.arg is None and kwargs.arg in ast.unparse(word.value) for word in call.keywords)
        ):
            return call
    return None


def _supplied(constructor: ast.FunctionDef, inherited: list[str]) -> set[str]:
    """What a constructor itself gives to that of its base; everything if that is unknown."""
    call, kwargs = _call_of_base(constructor), constructor.args.kwarg
    if call is None or kwargs is None:
        return set(inherited)
    assert isinstance(call.func, ast.Attribute)
    uses = [node for node in ast.walk(constructor) if isinstance(node, ast.Name) and node.id == kwargs.arg]
    handed_on_as_it_is = any(word.arg is None and word.value is uses[0] for word in call.keywords)
    if len(uses) > 1 or not handed_on_as_it_is or any(isinstance(given, ast.Starred) for given in call.args):
        return set(inherited)
    with_self = isinstance(call.func.value, ast.Name)  # Base.__init__(self, ...)
    return {*inherited[: len(call.args) - with_self], *(word.arg for word in call.keywords if word.arg is not None)}


def _inherited(node: ast.ClassDef, source: Source, depth: int) -> Signature:
    """What the first base with parameters takes; open if a base cannot be read."""
    if node.keywords:  # a metaclass may change how the class is called
        return Signature(open=True)
    for base in base_definitions(node, source):
        if base is None or not isinstance(base.node, ast.ClassDef):
            return Signature(open=True)
        taken = _of_class(base.node, base.source, depth + 1)
        if taken.parameters or taken.open:
            return taken
    # A root class that takes **kwargs passes them to nothing that could be read here.
    has_own = any(isinstance(s, ast.FunctionDef) and s.name == "__init__" for s in node.body)
    return Signature(open=has_own)


def _of_function(node: ast.FunctionDef, source: Source, *, skip_first: bool) -> Signature:
    positional = node.args.posonlyargs + node.args.args
    first_default = len(positional) - len(node.args.defaults)
    parameters = [
        Parameter(argument.arg, argument.annotation, index < first_default, source)
        for index, argument in enumerate(positional)
    ][1 if skip_first else 0 :]
    parameters += [
        Parameter(argument.arg, argument.annotation, default is None, source)
        for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    ]
    return Signature({parameter.name: parameter for parameter in parameters}, node.args.kwarg is not None)


def _fields(node: ast.ClassDef, source: Source) -> dict[str, Parameter]:
    return {
        statement.target.id: Parameter(statement.target.id, statement.annotation, statement.value is None, source)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and "ClassVar" not in ast.unparse(statement.annotation)
    }
