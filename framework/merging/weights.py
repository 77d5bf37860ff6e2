"""The weights of a checkpoint, tensor by tensor: of a run, a checkpoint file or folder, or safetensors files.

Files stay on disk until a tensor is read, and its numbers are memory-mapped, not copied.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightspan.core.absent import MissingFile
from lightspan.core.errors import UserError, one_line
from lightspan.core.files.atomic import expanded
from lightspan.core.files.places import ReadPath
from lightspan.core.files.runs import CHECKPOINTS
from lightspan.core.files.tensors import DTYPES, INDEX, Form, opened_tensors, safetensors_of, shards_of
from lightspan.training.checkpoints.io import outline, read_checkpoint, refuse_torn
from lightspan.training.checkpoints.manifest import COMPLETE, newest_whole

_TORCH = {name: dtype for dtype, name in DTYPES.items()}


class Weights(ABC):
    """Named tensors.

    Attributes:
        forms: shape and dtype of each, in the order of the checkpoint; names that share memory each have one.
        aliases: {name: the name that it shares its memory with}.
        origin: path and sha256, for the record.
        home: the file or folder whose format the checkpoint has.
    """

    forms: dict[str, Form]
    aliases: dict[str, str]
    origin: dict[str, str]
    home: Path

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor, whole, perhaps in a wider dtype than it is stored in; nobody writes into it."""

    @property
    def is_huggingface(self) -> bool:
        """Whether it is a folder as transformers writes it."""
        return self.home.is_dir() and (self.home / "config.json").is_file()


def open_weights(path: str | Path) -> Weights:
    """The weights at a path: a safetensors file, a folder of them as Hugging Face writes it or any other, a `.ckpt`, or
    a run folder (its newest whole one).

    Raises: UserError for what is none of these, or is damaged.
    """
    place = place_of(path)
    if is_adapter(place):
        raise UserError(
            f"{place} is an adapter, a change of a model and no model of its own; name the model that it changes as "
            "the base, which is --base of `lightspan merge`"
        )
    if place.is_dir() and not (place / COMPLETE).exists():
        if files := safetensors_of(place):
            return _Safetensors(place, files)
        found, passed = newest_whole(place / CHECKPOINTS)
        if found is None:
            reasons = ": " * bool(passed) + "; ".join(f"{one} {fault.text}" for one, fault in passed.items())
            raise UserError(
                f"{place} contains no complete checkpoint and no safetensors file{reasons}; name a run folder, a "
                ".ckpt, a safetensors file, or a folder as Hugging Face writes it"
            )
        place = found
    return _Safetensors(place, [place]) if place.suffix == ".safetensors" else _Checkpoint(place)


def place_of(path: str | Path) -> Path:
    """Where a checkpoint is, with `~` expanded. Raises: UserError for what is not there or cannot be reached."""
    if not str(path):
        raise UserError("the path of a checkpoint is empty; is a shell variable not set?")
    place = expanded(path, "the path of the checkpoint")
    try:
        there = place.exists()
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise UserError(f"checkpoint {one_line(str(place))[:200]} cannot be read ({error.strerror})") from error
    if not there:
        raise MissingFile(f"checkpoint {place} does not exist; name a run folder, a .ckpt or a safetensors file")
    return place


def is_adapter(place: Path) -> bool:
    """Whether this is a folder of Hugging Face PEFT."""
    return (place / "adapter_config.json").is_file()


class StatisticsFiles:
    """Files of numbers by tensor name that belong to checkpoints, opened when they are first asked.

    Args:
        merger: who asks, for messages.
        files: of each checkpoint by its name.
    """

    def __init__(self, merger: str, files: Mapping[str, ReadPath]) -> None:
        self.merger, self.files = merger, dict(files)

    def require(self, names: Sequence[str]) -> None:
        """Raises: UserError unless each of the checkpoints has its file."""
        if not names or set(self.files) != set(names):
            raise UserError(
                f"{self.merger} has statistics of {', '.join(self.files) or 'none'}; the checkpoints are "
                f"{', '.join(names) or 'none'}: each needs its own"
            )

    @cached_property
    def _open(self) -> dict[str, Weights]:
        return {name: open_weights(path) for name, path in self.files.items()}

    def require_tensors(self, forms: Mapping[str, Form]) -> None:
        """Raises: UserError where the files name none of these tensors: all of them would be averaged."""
        if not any(file.forms.keys() & forms.keys() for file in self._open.values()):
            path, file = next(iter(zip(self.files.values(), self._open.values(), strict=True)))
            raise UserError(
                f"{path} has nothing of any tensor of the checkpoints: it names {', '.join(list(file.forms)[:3])}, and "
                f"they have {', '.join(list(forms)[:3])}; compute it with the prefix of the checkpoints' names"
            )

    def of(self, tensor: str, names: Sequence[str]) -> list[Tensor] | None:
        """Those of one tensor, in the order of the checkpoints; None where no file has any.

        Raises: UserError where some files have them and others do not.
        """
        having = [name for name in names if tensor in self._open[name].forms]
        if not having:
            return None
        if len(having) < len(names):
            lacking = next(name for name in names if name not in having)
            raise UserError(
                f"{self.files[lacking]} has nothing of {tensor}, which {self.files[having[0]]} has; compute both in "
                "one way"
            )
        return [real_finite(self._open[name], tensor, "number") for name in names]


def real_finite(weights: Weights, name: str, what: str) -> Tensor:
    """A tensor of numbers to weigh with. Raises: UserError for complex ones, and for NaN or infinity among them."""
    numbers = weights.read(name)
    if numbers.is_complex() or not numbers.double().isfinite().all():
        raise UserError(f"{weights.origin['path']}: each {what} of {name} must be real and finite; make the file anew")
    return numbers


class _Safetensors(Weights):
    def __init__(self, place: Path, files: list[Path]) -> None:
        self._files: dict[str, Any] = {}
        self._open = ExitStack()
        self.aliases, self.forms = {}, {}
        for path in files:
            file = self._open.enter_context(opened_tensors(path, "export it again"))
            try:
                here = {name: _form(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118 - no mapping
            except KeyError as error:
                raise UserError(f"{path} holds numbers of the dtype {error}, which cannot be merged") from error
            if again := sorted(self._files.keys() & here.keys()):
                raise UserError(f"{place}: {again[0]} is in two of its files; name one of them")
            self._files |= dict.fromkeys(here, file)
            self.forms |= here
            # Of tensors that share memory only one is stored, and the metadata names the others.
            self.aliases |= {name: kept for name, kept in (file.metadata() or {}).items() if kept in here}
        if absent := sorted((shards_of(place) or {}).keys() - self._files.keys()) if place.is_dir() else []:
            raise UserError(f"{place / INDEX} promises {absent[0]}, which no file holds; the folder is not whole")
        self.forms |= {name: self.forms[kept] for name, kept in self.aliases.items()}
        digest = sha256_of(files[0]) if len(files) == 1 else _of_digests([sha256_of(path) for path in files])
        self.origin, self.home = {"path": str(place), "sha256": digest}, place

    def read(self, name: str) -> Tensor:
        name = self.aliases.get(name, name)
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


class _Checkpoint(Weights):
    """A folder that several ranks wrote is read completely into memory; a file is memory-mapped."""

    def __init__(self, path: Path) -> None:
        refuse_torn(path)
        content = read_checkpoint(path, optimizers=False) if path.is_dir() else outline(path)
        state: Mapping[str, Any] = content["state_dict"]
        self._state = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
        if sparse := [name for name, tensor in self._state.items() if tensor.layout != torch.strided]:
            raise UserError(f"{path} holds {sparse[0]} as a sparse tensor, which cannot be merged; save a dense one")
        self.forms = {name: Form(tuple(tensor.shape), tensor.dtype) for name, tensor in self._state.items()}
        seen: dict[object, str] = {}
        self.aliases = {}
        for name, tensor in self._state.items():
            if tensor.numel():
                memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
                if (kept := seen.setdefault(memory, name)) != name:
                    self.aliases[name] = kept
        self.origin = {"path": str(path), "sha256": sha256_of(path / COMPLETE if path.is_dir() else path)}
        self.home = path

    def read(self, name: str) -> Tensor:
        return self._state[name]


def _form(stored: Any) -> Form:
    return Form(tuple(stored.get_shape()), _TORCH[stored.get_dtype()])


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_digests(digests: list[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()
