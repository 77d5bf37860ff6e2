"""A digest of any Python value that is the same in every process and differs if the value differs.

Code is described by its bytecode, not by its file: only what runs counts. Code of installed packages is described by
their versions; that of editable installations, and of files beside them, by bytecode.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from functools import cache, cached_property, partial
from importlib import metadata
from types import BuiltinFunctionType, CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from lightning import LightningModule
from torch import Tensor, nn

from lightspan.core.errors import UserError

_NUMBERS = (type(None), bool, int, float, complex, str, bytes, type(...))
_OF_PROCESS = {"_original_object_hash"}
"""Attributes of installed packages that differ in every process: transformers keeps Python's hash of a text."""
_CHILDREN = ("_parameters", "_buffers", "_modules")


class Description:
    """The sha256 of a value, and the versions of the packages whose code it depends on.

    Values are followed into containers, attributes, closures and defaults; functions and classes into the functions,
    classes and constants that they name. What functions import while they run is not followed, nor objects that are
    globals of a file.

    Args:
        where: the name of the value in errors.
    Raises: UserError for a value that is only a place in memory or something outside of Python.
    """

    def __init__(self, where: str, value: Any) -> None:
        self._digest = hashlib.sha256()
        self.packages: dict[str, str] = {}
        self._where = [where]
        self._seen: dict[int, tuple[int, Any]] = {}  # and the values, so that their ids stay theirs
        try:
            self._add(value)
        except RecursionError as error:
            raise self._refusal(value) from error
        self.sha256 = self._digest.hexdigest()

    def _add(self, value: Any) -> None:
        if isinstance(value, _NUMBERS):
            self._write(type(value).__name__, repr(value))
        elif isinstance(value, Tensor):
            self._write("tensor", str(value.dtype), list(value.shape))
            self._digest.update(self._bytes(value))
        elif isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
            self._write("array", str(value.dtype), list(value.shape))
            self._digest.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, tuple):
            self._children("tuple", enumerate(value), name_of(type(value)))
        elif isinstance(value, set | frozenset):
            self._write("set", sorted(self._apart(child) for child in value))
        elif isinstance(value, CodeType):
            self._code(value)
        elif isinstance(value, MethodType):
            self._children("method", {"function": value.__func__, "self": value.__self__}.items())
        elif id(value) in self._seen:
            self._write("again", self._seen[id(value)][0])
        else:
            self._seen[id(value)] = (len(self._seen), value)
            self._once(value)

    def _once(self, value: Any) -> None:
        if isinstance(value, ModuleType):
            if (version := self._version(value.__name__)) is None:
                raise self._refusal(value)
            self._write("module", value.__name__, version)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, BuiltinFunctionType):
            self._children("builtin", [("self", value.__self__)], value.__qualname__, self._version(value.__module__))
        elif isinstance(value, torch.jit.ScriptModule | torch.jit.ScriptFunction):
            raise self._refusal(value)
        elif isinstance(value, nn.Module):
            self._module(value)
        elif callable(value) and hasattr(value, "__wrapped__"):  # of functools.cache and the like
            self._children("wrapper", [("class", type(value)), ("function", value.__wrapped__)])
        elif type(value) in (dict, MappingProxyType):
            pairs = [pair for pair in value.items() if pair[0] not in _OF_PROCESS]
            self._children("mapping", enumerate(part for pair in pairs for part in pair))
        elif type(value) is list:
            self._children("list", enumerate(value))
        else:
            self._object(value)

    def _module(self, module: nn.Module) -> None:
        self._children("network", [("class", type(module))])
        for name in _CHILDREN:
            self._children(name, vars(module)[name].items(), list(vars(module)[name]))
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        self._children("hooks", enumerate(hooks), len(module._forward_pre_hooks))
        attributes = {name: value for name, value in sorted(vars(module).items()) if name not in _of_every_module()}
        self._children("attributes", attributes.items(), list(attributes))

    def _object(self, value: Any) -> None:
        """By what pickle would store: class, arguments, state, items."""
        try:
            reduced = value.__reduce_ex__(4)
        except Exception as error:
            raise self._refusal(value) from error
        if isinstance(reduced, str):
            self._children("name", [("class", type(value))], reduced)
            return
        kinds = ("made by", "arguments", "state", "items", "pairs")
        parts = [list(part) if isinstance(part, Iterator) else part for part in reduced[: len(kinds)]]
        self._children("object", zip(kinds, parts, strict=False), name_of(type(value)))

    def _class(self, kind: type) -> None:
        version = self._version(kind.__module__)
        self._write("class", name_of(kind), version)
        if version is not None and "<" not in kind.__qualname__:
            return
        for base in kind.__mro__[1:]:
            self._add(base)
        for name, value in sorted(vars(kind).items()):
            if isinstance(value, staticmethod | classmethod):
                value = value.__func__
            if isinstance(value, property | cached_property):
                value = value.fget if isinstance(value, property) else value.func
            if not (name.startswith("__") and not isinstance(value, FunctionType)):
                self._named(name, value, ())

    def _function(self, function: FunctionType) -> None:
        version, name = self._version(function.__module__), function.__qualname__
        self._write("function", function.__module__, name, version)
        if version is not None and "<" not in name:
            return
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        parts = {"defaults": function.__defaults__, "keywords": function.__kwdefaults__, "closure": cells}
        self._children("code", {"code": function.__code__, **parts, "attributes": function.__dict__}.items())
        if version is None:
            names = _names(function.__code__)
            for one in names:
                if one in function.__globals__:
                    self._named(one, function.__globals__[one], names)

    def _named(self, name: str, value: Any, names: tuple[str, ...]) -> None:
        """A global of a function or an attribute of a class: functions, classes and constants, and those of modules."""
        if isinstance(value, ModuleType) and self._version(value.__name__) is None:
            for one in names:
                if one in vars(value) and vars(value)[one] is not value:
                    self._named(f"{name}.{one}", vars(value)[one], names)
        elif _is_constant(value):
            self._children("named", [(name, value)], name)

    def _code(self, code: CodeType) -> None:
        names = [code.co_names, code.co_varnames, code.co_freevars, code.co_argcount, code.co_kwonlyargcount]
        self._write("bytecode", code.co_code.hex(), *names, code.co_flags)
        self._children("constants", enumerate(code.co_consts))

    def _children(self, kind: str, children: Any, *about: Any) -> None:
        children = list(children)
        self._write(kind, len(children), *about)
        for name, child in children:
            self._where.append(str(name))
            self._add(child)
            self._where.pop()

    def _apart(self, value: Any) -> str:
        """The digest of an element of a set, which has no order."""
        description = Description(".".join(self._where), value)
        self.packages |= description.packages
        return description.sha256

    def _write(self, *what: Any) -> None:
        self._digest.update(json.dumps(what).encode() + b"\n")

    def _bytes(self, tensor: Tensor) -> memoryview:
        try:
            return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            raise self._refusal(tensor) from error

    def _version(self, module: str | None) -> str | None:
        """Of the package that a Python module belongs to; None if its code may change without a new version."""
        package = (module or "builtins").split(".")[0]
        if (version := _installed(package)) is not None and package not in sys.stdlib_module_names:
            self.packages[package] = version
        return version

    def _refusal(self, value: Any) -> UserError:
        return UserError(
            f"{'.'.join(self._where)} is a {name_of(type(value))}, which the feature store cannot describe, so that it "
            "would not notice a change; keep it out of the encoder, or write the features yourself for a FeatureFile"
        )


def name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # of a name that is not bound yet
        return False


def _names(code: CodeType) -> tuple[str, ...]:
    """The names that a function and those inside it use."""
    inner = [name for constant in code.co_consts if isinstance(constant, CodeType) for name in _names(constant)]
    return tuple(sorted({*code.co_names, *inner}))


def _is_constant(value: Any) -> bool:
    if isinstance(value, Mapping):
        return type(value) is dict and all(_is_constant(child) for pair in value.items() for child in pair)
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_constant, value))
    code = (type, FunctionType, BuiltinFunctionType, MethodType, partial, nn.Module)
    if isinstance(value, (*_NUMBERS, *code, Tensor, np.ndarray, np.generic, torch.dtype)) or is_dataclass(value):
        return True
    return callable(value) and isinstance(getattr(value, "__wrapped__", None), FunctionType)


@cache
def _of_every_module() -> frozenset[str]:
    """Attributes that torch and Lightning keep in every module; hooks, weights and submodules are described apart."""
    return frozenset({*vars(nn.Module()), *vars(LightningModule()), "trainer"})


@cache
def _installed(package: str) -> str | None:
    if package in sys.stdlib_module_names:
        return sys.version.split()[0]
    names = _distributions().get(package, [package])
    try:
        distributions = [metadata.distribution(name) for name in sorted(set(names))]
    except metadata.PackageNotFoundError:
        return None
    if any(_is_editable(distribution) for distribution in distributions):
        return None
    return "+".join(distribution.version for distribution in distributions)


@cache
def _distributions() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def _is_editable(distribution: metadata.Distribution) -> bool:
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    return bool(origin.get("dir_info", {}).get("editable"))
