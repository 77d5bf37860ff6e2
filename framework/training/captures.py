"""Captures: a training step whose numbers are not finite, in files from which `lightspan replay` repeats it.

    RUN/captures/step-N/weights.safetensors   the module's state before the step, whole
                        capture.json          what happened; written last, so a capture without it is not whole
                        rank-R.safetensors    each rank's micro-batches and states, as `pack` divides them

Nothing is pickled. A nested value is a JSON skeleton, in which tensors stand as numbers of entries beside it; named
tuples and dataclasses stand with the name of their class, which a reader may refuse: `module.Name`, or of one that is
nested in another `module:Outer.Name`.
"""

import dataclasses
import importlib
import json
import math
import operator
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightspan.core.errors import UserError, one_line
from lightspan.core.files.atomic import atomic_path, write_atomic
from lightspan.core.files.foreign import settings_object
from lightspan.core.files.runs import CAPTURE, CAPTURED_WEIGHTS
from lightspan.core.files.tensors import DTYPES, Form, stored_tensors, write_tensors

_VERSION = 1
_PLAIN = (str, bool, int, type(None))


@dataclass(frozen=True)
class Capture:
    """What capture.json says.

    Attributes:
        step: optimiser steps finished before this one.
        epoch: of the step.
        ranks: that trained.
        broken: those of them whose loss or gradient was not finite.
        accumulate: micro-batches of a step, by which losses are divided.
        precision: the trainer's.
        reason: the message of the error.
        remarks: what the capture lacks.
    """

    step: int
    epoch: int
    ranks: int
    broken: list[int]
    accumulate: int
    precision: str
    reason: str
    remarks: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Completes the capture in this folder."""
        record = {"version": _VERSION, **dataclasses.asdict(self)}
        write_atomic(folder / CAPTURE, json.dumps(record, indent=1) + "\n")

    @staticmethod
    def read(folder: Path) -> "Capture":
        """Raises: UserError for a capture that is missing, not whole, or written by another program."""
        if not (folder / CAPTURE).exists():
            raise UserError(f"{folder} is not a whole capture: it has no {CAPTURE}")
        try:
            record = settings_object(folder / CAPTURE)
            if record["version"] != _VERSION:
                raise ValueError(f"it has version {record['version']!r}, and this lightspan reads {_VERSION}")
            fields = {one.name: record[one.name] for one in dataclasses.fields(Capture)}
            capture = Capture(**fields)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / CAPTURE} cannot be read: {one_line(error)[:200]}") from error
        counts = (capture.step, capture.epoch, capture.ranks, capture.accumulate)
        sound = all(type(count) is int and count >= 0 for count in counts)
        sound = sound and isinstance(capture.broken, list) and isinstance(capture.remarks, list)
        sound = sound and all(type(rank) is int and 0 <= rank < capture.ranks for rank in capture.broken)
        if not sound or capture.ranks < 1 or capture.accumulate < 1:
            raise UserError(f"{folder / CAPTURE} has numbers that no run has; it is damaged")
        return capture


def captures(folder: Path) -> dict[int, Path]:
    """The whole captures in a run's folder of captures, {step: folder}, in the order of steps."""
    found = {}
    for path in folder.glob(f"step-*/{CAPTURE}"):
        step = path.parent.name.removeprefix("step-")
        if step.isascii() and step.isdecimal():
            found[int(step)] = path.parent
    return dict(sorted(found.items()))


def capture_folder(folder: Path, step: int) -> Path:
    """Where the capture of a step goes in a run's folder of captures."""
    return folder / f"step-{step}"


def write_weights(folder: Path, forms: Mapping[str, Form], pieces: Iterable[tuple[str, Tensor]]) -> None:
    """Writes parameters and buffers, by name and in the order of `forms`."""
    with atomic_path(folder / CAPTURED_WEIGHTS) as temporary:
        write_tensors(temporary, forms, pieces, {})


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Raises: UserError for a file that is missing or damaged."""
    return _read(folder / CAPTURED_WEIGHTS)[0]


def write_rank(folder: Path, rank: int, value: Any) -> list[str]:
    """Writes what a rank knows of the step. Returns: remarks on what could not be written."""
    tensors: list[Tensor] = []
    remarks: dict[str, None] = {}
    skeleton = pack(value, tensors, remarks)
    numbered = {str(number): tensor for number, tensor in enumerate(tensors)}
    forms = {name: Form(tuple(tensor.shape), tensor.dtype) for name, tensor in numbered.items()}
    with atomic_path(rank_file(folder, rank)) as temporary:
        write_tensors(temporary, forms, numbered.items(), {"skeleton": json.dumps(skeleton)})
    return list(remarks)


def read_rank(folder: Path, rank: int, may_name: Callable[[str], str | None]) -> Any:
    """What `write_rank` wrote, on the CPU.

    Args:
        may_name: why a class may not be imported, or None if it may.
    Raises: UserError for a file that is missing or damaged, or that names such a class.
    """
    path = rank_file(folder, rank)
    tensors, metadata = _read(path)
    try:
        return unpack(json.loads(metadata["skeleton"]), tensors, may_name)
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{path} is damaged: it has no entry {one_line(error)[:200]}") from error
    except (ValueError, TypeError, AttributeError, ImportError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)[:200]}") from error


def nbytes(value: Any) -> int:
    """Bytes of the tensors in a nested value."""
    tensors: list[Tensor] = []
    pack(value, tensors, {})
    return sum(tensor.nbytes for tensor in tensors)


def pack(value: Any, tensors: list[Tensor], remarks: dict[str, None]) -> Any:
    """A nested value as JSON. Its tensors are appended to `tensors`; a value of a type that has no place here
    becomes None with a remark.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {"array": pack(torch.from_numpy(np.ascontiguousarray(value)), tensors, remarks)}
    if isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in DTYPES:
        tensors.append(value.detach())
        return {"tensor": len(tensors) - 1}
    if isinstance(value, _PLAIN) and type(value) in _PLAIN:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, np.generic):
        return pack(value.item(), tensors, remarks)
    if isinstance(value, Mapping):
        return {"items": [[pack(part, tensors, remarks) for part in item] for item in value.items()]}
    named = isinstance(value, tuple) and hasattr(value, "_fields")
    if named and _found_again(type(value)):
        return {"class": _name(value), "tuple": [pack(part, tensors, remarks) for part in value]}
    if isinstance(value, tuple) and not named:
        return {"tuple": [pack(part, tensors, remarks) for part in value]}
    if isinstance(value, list):
        return [pack(part, tensors, remarks) for part in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and _found_again(type(value)):
        parts = {one.name: getattr(value, one.name) for one in dataclasses.fields(value) if one.init}
        return {"class": _name(value), "fields": {name: pack(part, tensors, remarks) for name, part in parts.items()}}
    why = ": its class cannot be imported by its name" if named or dataclasses.is_dataclass(value) else ""
    remarks[f"a {type(value).__module__}.{type(value).__qualname__} could not be written and is None{why}"] = None
    return None


def unpack(skeleton: Any, tensors: Mapping[str, Tensor], may_name: Callable[[str], str | None]) -> Any:
    """What `pack` packed. Raises: UserError for a class that may not be named."""
    if isinstance(skeleton, list):
        return [unpack(part, tensors, may_name) for part in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    if "tensor" in skeleton:
        return tensors[str(skeleton["tensor"])]
    if "array" in skeleton:
        return unpack(skeleton["array"], tensors, may_name).numpy()
    if "float" in skeleton:
        return float(skeleton["float"])
    if "items" in skeleton:
        return {unpack(key, tensors, may_name): unpack(part, tensors, may_name) for key, part in skeleton["items"]}
    made = _class(skeleton["class"], may_name) if "class" in skeleton else None
    if "fields" in skeleton:
        parts = {name: unpack(part, tensors, may_name) for name, part in skeleton["fields"].items()}
        if not isinstance(made, type) or not dataclasses.is_dataclass(made):
            raise TypeError(f"{made} is no dataclass")
        return made(**parts)
    values = [unpack(part, tensors, may_name) for part in skeleton["tuple"]]
    if made is None:
        return tuple(values)
    if not (issubclass(made, tuple) and hasattr(made, "_fields")):
        raise TypeError(f"{made} is no named tuple")
    return made(*values)


def _name(value: Any) -> str:
    module, path = type(value).__module__, type(value).__qualname__
    return f"{module}:{path}" if "." in path else f"{module}.{path}"


def _found_again(kind: type) -> bool:
    """Whether a class is where its name says; one that a function defined is not."""
    try:
        return operator.attrgetter(kind.__qualname__)(sys.modules[kind.__module__]) is kind
    except (AttributeError, KeyError):
        return False


def _class(name: str, may_name: Callable[[str], str | None]) -> Any:
    """The class of this name. Who may name a class may name those that are defined inside it, and nothing else that it
    leads to.
    """
    module, nested, path = name.partition(":")
    if not nested:
        module, _, path = name.rpartition(".")
    if (reason := may_name(f"{module}.{path.partition('.')[0]}")) is not None:
        raise UserError(f"the captured batch has parts of a class of its own: {reason}")
    made = operator.attrgetter(path)(importlib.import_module(module))
    if nested and (getattr(made, "__module__", None), getattr(made, "__qualname__", None)) != (module, path):
        raise TypeError(f"{name} is not defined there")
    return made


def rank_file(folder: Path, rank: int) -> Path:
    """Where a rank's part of a capture is."""
    return folder / f"rank-{rank}.safetensors"


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path} is missing: the capture is not whole")
    return stored_tensors(path, "the capture is damaged")
