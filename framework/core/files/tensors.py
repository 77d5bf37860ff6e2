"""Safetensors files: written piece by piece, so that at most one piece is in memory, and read as files of others.

The format is 8 bytes with the length of a JSON header, the header, and the bytes of the tensors (little-endian, rows
first) without gaps: https://github.com/huggingface/safetensors. Its own writer takes all tensors at once.
"""

import json
import os
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightspan.core.errors import UserError, one_line
from lightspan.core.files.atomic import irregular, opened, require_regular_file
from lightspan.core.files.foreign import SETTINGS_BYTES, TooMuchError, settings_object
from lightspan.core.files.runs import MODEL

INDEX = f"{MODEL}.index.json"
"""Of a folder of several safetensors files, as transformers writes it: which file has which tensor."""

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


@dataclass(frozen=True)
class Form:
    """A tensor's description without its numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numbers(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numbers * self.dtype.itemsize


def write_tensors(
    path: Path, forms: Mapping[str, Form], pieces: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file; `path` comes from `lightspan.core.files.atomic.atomic_path`.

    Args:
        forms: every tensor of the file, in the order of their bytes.
        pieces: (name, numbers) in the same order. A tensor may come in several pieces, in the order of its numbers.
        metadata: text by name.
    Raises: UserError for a dtype that the format does not have.
    """
    assert sys.byteorder == "little", "safetensors are little-endian"
    with path.open("wb") as file:
        file.write(header(forms, metadata))
        left = {name: form.nbytes for name, form in forms.items()}
        names = iter(forms)
        name = next(names, None)
        for given, piece in pieces:
            while name is not None and not left[name] and name != given:
                name = next(names, None)
            assert given == name, f"{given} comes where {name} was to come"
            assert piece.dtype == forms[name].dtype, f"{name} comes as {piece.dtype}"
            left[name] -= _write(file, piece)
            del piece  # before the next one is computed
        assert not any(left.values()), f"tensors came short: {[name for name, bytes in left.items() if bytes]}"


def header(forms: Mapping[str, Form], metadata: Mapping[str, str]) -> bytes:
    """All of a safetensors file before its numbers. Raises: UserError for a dtype that the format does not have."""
    described: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name, form in forms.items():
        if form.dtype not in DTYPES:
            raise UserError(f"tensor {name} is {form.dtype}, which safetensors files cannot contain")
        described[name] = {
            "dtype": DTYPES[form.dtype],
            "shape": list(form.shape),
            "data_offsets": [at, at + form.nbytes],
        }
        at += form.nbytes
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def _write(file: BinaryIO, piece: Tensor) -> int:
    data = piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    file.write(data.numpy().data)
    return data.numel()


_KINDS = {list: "a list", dict: "a mapping", bool: "true or false", int: "a whole number", str: "text"}


def facts_of(metadata: Mapping[str, str], path: str | Path, **kinds: type) -> dict[str, Any]:
    """The named facts in a file's metadata, each of its given type; all except text is JSON. Another program may have
    written it.

    Raises: UserError that names the file and the first fact that is missing or of another type.
    """
    facts: dict[str, Any] = {}
    for name, kind in kinds.items():
        if name not in metadata:
            raise UserError(f"{path} has no {name!r} in its metadata; it is damaged, or another program wrote it")
        try:
            facts[name] = metadata[name] if kind is str else json.loads(metadata[name])
        except (ValueError, RecursionError):
            facts[name] = None
        if type(facts[name]) is not kind:
            raise UserError(
                f"{path} has {name!r}: {one_line(metadata[name])[:60]!r} in its metadata, not {_KINDS[kind]}; it is "
                "damaged, or another program wrote it"
            )
    return facts


@contextmanager
def opened_tensors(path: str | Path, way_out: str = "write or export it again") -> Iterator[Any]:
    """A safetensors file as `safetensors.safe_open` gives it: its tensors are memory-mapped until they are used.

    Raises: UserError for what is no regular file, is damaged, has a header above the limit of `SETTINGS_BYTES`, or
        lacks a tensor that is asked for.
    """
    require_regular_file(path, "safetensors file")
    try:
        SETTINGS_BYTES.require(_header_bytes(path))
    except TooMuchError as error:
        raise UserError(f"{path} has too long a list of tensors: {error}") from error
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a complete safetensors file ({one_line(error)[:200]}); {way_out}") from error


def _header_bytes(path: str | Path) -> int:
    """How long a file's header is; 0 of a file that is shorter than that, or cannot be read, which its reader says."""
    with suppress(OSError), opened(path) as file:
        if file is None:
            return 0
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        return length if 8 + length <= os.fstat(file.fileno()).st_size else 0
    return 0


def stored_tensors(
    path: str | Path, way_out: str = "write or export it again"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, metadata) of a safetensors file. Raises: UserError as `opened_tensors`."""
    with opened_tensors(path, way_out) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no mapping


def shards_of(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file, as the index of a sharded Hugging Face folder has it; None for a folder without an index.

    Raises: UserError for an index that is damaged, or names what lies outside the folder or is not there.
    """
    index = folder / INDEX
    if not index.is_file():
        return None
    try:
        shards = settings_object(index)["weight_map"]
        files = sorted(set(shards.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of safetensors files ({error}); export the folder again") from error
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or irregular(folder / file):
            raise UserError(f"{index} names {file!r:.80}, which is not in {folder}; the folder is not whole")
    return dict(shards)


def safetensors_of(folder: Path) -> list[Path]:
    """The files that make up a folder's checkpoint: those of its index, or model.safetensors, or all there are.

    Raises: UserError as `shards_of`.
    """
    if (shards := shards_of(folder)) is not None:
        return [folder / file for file in sorted(set(shards.values()))]
    return [folder / MODEL] if (folder / MODEL).is_file() else sorted(folder.glob("*.safetensors"))
