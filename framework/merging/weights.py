"""The weights of a checkpoint, tensor by tensor: of a run, a checkpoint file or folder, or safetensors files.

Files stay on disk until a tensor is read, and its numbers are memory-mapped, not copied.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightspan.checkpoints.io import outline, read_checkpoint, refuse_torn
from lightspan.checkpoints.manifest import COMPLETE, newest_whole
from lightspan.errors import UserError
from lightspan.files import require_regular_file
from lightspan.run_files import CHECKPOINTS
from lightspan.tensor_files import DTYPES, Form

_TORCH = {name: dtype for dtype, name in DTYPES.items()}


class Weights(ABC):
    """Named tensors.

    Attributes:
        forms: shape and dtype of each, in the order of the checkpoint; names that share memory each have one.
        aliases: {name: the name that it shares its memory with}.
        origin: path and sha256, for the record.
    """

    forms: dict[str, Form]
    aliases: dict[str, str]
    origin: dict[str, str]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The whole tensor; nothing writes into it."""


def open_weights(path: str | Path) -> Weights:
    """The weights at a path: a safetensors file or a folder of them, a `.ckpt`, or a run folder (its newest whole one).

    Raises: UserError for what is none of these, or is damaged.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise UserError(f"checkpoint {place} does not exist; name a run folder, a .ckpt or a safetensors file")
    if place.is_dir() and not (place / COMPLETE).exists():
        if files := sorted(place.glob("*.safetensors")):
            return _Safetensors(place, files)
        found, passed = newest_whole(place / CHECKPOINTS)
        if found is None:
            reasons = "; ".join(f"{one} {fault.text}" for one, fault in passed.items())
            raise UserError(
                f"{place} contains no complete checkpoint and no safetensors file" + f": {reasons}" * bool(reasons)
            )
        place = found
    return _Safetensors(place, [place]) if place.suffix == ".safetensors" else _Checkpoint(place)


class _Safetensors(Weights):
    def __init__(self, place: Path, files: list[Path]) -> None:
        self._files: dict[str, Any] = {}
        self.aliases, self.forms = {}, {}
        for path in files:
            require_regular_file(path, "safetensors file")
            try:
                file = safe_open(path, "pt").__enter__()
                here = {name: _form(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118 - no mapping
            except (SafetensorError, OSError, KeyError) as error:  # KeyError: a dtype that torch does not have
                raise UserError(f"{path} is not a complete safetensors file ({error}); export it again") from error
            if again := sorted(self._files.keys() & here.keys()):
                raise UserError(f"{place}: {again[0]} is in two of its files; name one of them")
            self._files |= dict.fromkeys(here, file)
            self.forms |= here
            # Of tensors that share memory only one is stored, and the metadata names the others.
            self.aliases |= {name: kept for name, kept in (file.metadata() or {}).items() if kept in here}
        self.forms |= {name: self.forms[kept] for name, kept in self.aliases.items()}
        digest = _sha256(files[0]) if len(files) == 1 else _of_digests([_sha256(path) for path in files])
        self.origin = {"path": str(place), "sha256": digest}

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
        self.forms = {name: Form(tuple(tensor.shape), tensor.dtype) for name, tensor in self._state.items()}
        seen: dict[object, str] = {}
        self.aliases = {}
        for name, tensor in self._state.items():
            if tensor.numel():
                memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
                if (kept := seen.setdefault(memory, name)) != name:
                    self.aliases[name] = kept
        self.origin = {"path": str(path), "sha256": _sha256(path / COMPLETE if path.is_dir() else path)}

    def read(self, name: str) -> Tensor:
        return self._state[name]


def _form(stored: Any) -> Form:
    return Form(tuple(stored.get_shape()), _TORCH[stored.get_dtype()])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_digests(digests: list[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()
