"""Reads the folder form of torch.distributed.checkpoint (DCP) without running or trusting what is in it.

torch reads two parts of that form by plain unpickling: `.metadata`, which says where each shard is, and values that
are not tensors (learning rates). Here the first is read with a short list of classes and then checked, and the second
with `weights_only=True`, so that a folder from elsewhere runs no code, and none of its tensors is left unfilled.
"""

import contextlib
import io
import itertools
import math
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem

from lightspan.core.errors import UserError, first_lines
from lightspan.core.files.atomic import require_regular_file
from lightspan.training.checkpoints.manifest import packed_fault

METADATA = ".metadata"


class SafeReader(dcp.FileSystemReader):
    """Reads `.metadata` with the few classes that torch writes into it; anything else is refused by name."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        path = Path(self.path)
        require_regular_file(path / METADATA)
        with explained_reading(path):
            with (path / METADATA).open("rb") as file:
                found = _MetadataUnpickler(file).load()
            if not isinstance(found, metadata.Metadata):
                raise UserError(f"checkpoint {path} is damaged: its {METADATA} contains {type(found).__name__}")
            if fault := _metadata_fault(found, path):
                raise UserError(f"checkpoint {path} cannot be used: its {METADATA} {fault}")
            found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found

    def _slice_file(self, file: Any, sinfo: Any) -> BinaryIO:
        """The bytes of one tensor or value, which torch gives to `torch.load`."""
        part = cast(BinaryIO, super()._slice_file(file, sinfo))
        if packed := packed_fault(part):
            raise UserError(f"checkpoint {self.path} cannot be used: {sinfo.relative_path} {packed}")
        part.seek(0)
        return part


# Classes by name only: some are private to torch, and importing this module must not need any of them.
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
}
# Each operating system has its own path class, and Python 3.13 moved them to another module: they contain only a name.
_PATH_MODULES, _PATHS = {"pathlib", "pathlib._local"}, {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if module in _PATH_MODULES and name in _PATHS:
            return PurePosixPath
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a list of shards")


class SafePlanner(DefaultLoadPlanner):
    """Reads values that are not tensors with `weights_only=True`."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # refuses what the unpickler of the next line would run
        value.seek(0)
        super().load_bytes(read_item, value)


def read_parts(reader: SafeReader, wanted: Callable[[str], bool]) -> dict[str, Any]:
    """{first name: nested content} of what is stored under the `wanted` names, in CPU memory, without other ranks.

    Raises: UserError.
    """
    found = reader.read_metadata()
    stored = {name: entry for name, entry in found.state_dict_metadata.items() if wanted(name)}
    with explained_reading(Path(reader.path)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns if there is no process group
        flat = {name: _space(entry) if _is_tensor(entry) else None for name, entry in stored.items()}
        planner = SafePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        dcp.load(flat, storage_reader=reader, planner=planner, no_dist=True)
        return _nested(flat, found.planner_data or {})


def stored_weights(reader: SafeReader) -> dict[str, Tensor]:
    """{name: tensor of the right shape and dtype, without memory} of the weights in a checkpoint folder."""
    return {
        name.removeprefix("state_dict."): torch.zeros((), dtype=entry.properties.dtype).expand(entry.size)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith("state_dict.") and isinstance(entry, metadata.TensorStorageMetadata)
    }


@contextlib.contextmanager
def explained_reading(path: Path) -> Iterator[None]:
    """Turns whatever reading a checkpoint's content raises into a UserError: all of it comes from outside."""
    try:
        yield
    except CheckpointException as failed:
        _, (cause, _) = next(iter(failed.failures.items()))
        with explained_reading(path):
            raise cause from None
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path} contains more than tensors and plain values, so it was not loaded and no code in it "
            f"was run ({cause_of(error)})"
        ) from error
    except Exception as error:
        raise UserError(f"checkpoint {path} cannot be read: {cause_of(error)}") from error


def cause_of(error: BaseException) -> str:
    """What an error says, without what torch adds: places in its code, and advice to load unsafe files."""
    inner = re.search(r"WeightsUnpickler error:\s*([^\n]+)", str(error))
    return inner[1][:200] if inner else first_lines(error)


def _is_tensor(entry: Any) -> bool:
    return isinstance(entry, metadata.TensorStorageMetadata)


def _space(entry: Any) -> Tensor:
    return torch.zeros(entry.size, dtype=entry.properties.dtype)


def _nested(flat: Mapping[str, Any], paths: Mapping[str, Sequence[str | int]]) -> dict[str, Any]:
    """Values at their paths: names are keys of mappings, whole numbers are positions in lists."""
    root: dict[Any, Any] = {}
    for name, value in flat.items():
        *above, last = paths.get(name, (name,))
        node = root
        for key in above:
            node = node.setdefault(key, {})
        node[last] = value

    def listed(node: Any, level: int = 0) -> Any:
        if not isinstance(node, dict) or not node or level > 64:
            return node
        inner = {key: listed(value, level + 1) for key, value in node.items()}
        return [inner[i] for i in range(len(inner))] if all(isinstance(key, int) for key in inner) else inner

    return {key: listed(value) for key, value in root.items()}


def _metadata_fault(found: metadata.Metadata, path: Path) -> str | None:
    """What is wrong with a list of shards: every tensor must be complete, in files of the folder."""
    places, paths = found.storage_data, found.planner_data
    if not isinstance(places, dict) or not isinstance(found.state_dict_metadata, dict):
        return "is not a list of shards"
    if not (paths is None or (isinstance(paths, dict) and all(map(_is_path, paths.values())))):
        return "does not say where values belong"
    sizes: dict[str, int] = {}
    for index, place in places.items():
        name = place.relative_path
        if not isinstance(name, str) or name in ("", "..") or Path(name).parts != (name,):
            return f"names a file outside its folder, {name}; it is not opened"
        if not (_are_counts(place.offset, place.length)):
            return f"names no place in {name} for {index.fqn}"
        if getattr(place, "transform_descriptors", None):
            return f"says that {index.fqn} is packed, and packed shards are not read"
        if name not in sizes:
            sizes[name] = (path / name).stat().st_size
        if place.offset + place.length > sizes[name]:
            return f"names a place beyond the end of {name} for {index.fqn}"
    wrong = ((name, _tensor_fault(name, entry, places)) for name, entry in found.state_dict_metadata.items())
    if found_fault := next((f"{fault}: {name}" for name, fault in wrong if fault), None):
        return found_fault
    more = sum(place.length for place in places.values()) > sum(sizes.values())
    return "names the same places several times: it lists more than its files hold" if more else None


def _tensor_fault(name: Any, entry: Any, places: Mapping[Any, Any]) -> str | None:
    if not isinstance(name, str):
        return "has an entry without a name"
    if isinstance(entry, metadata.BytesStorageMetadata):
        return None if metadata.MetadataIndex(name) in places else "names no place for a value"
    if not isinstance(entry, metadata.TensorStorageMetadata):
        return "has an entry that is neither a tensor nor a value"
    dtype, chunks = entry.properties.dtype, entry.chunks
    if not isinstance(dtype, torch.dtype) or entry.properties.layout != torch.strided or not _are_counts(*entry.size):
        return "has a tensor that is not dense"
    for chunk in chunks:
        if not _are_counts(*chunk.offsets, *chunk.sizes) or not len(chunk.offsets) == len(chunk.sizes) == len(
            entry.size
        ):
            return "has a shard without a shape"
        place = places.get(metadata.MetadataIndex(name, chunk.offsets))
        volume = math.prod(chunk.sizes)
        if place is None:
            if volume:
                return "names no place for a shard of a tensor"
        elif place.length < volume * dtype.itemsize:
            return "names a place that is too small for a shard of a tensor"
    return None if _cover(chunks, entry.size) else "does not list all of a tensor"


def _cover(chunks: Sequence[Any], size: Sequence[int]) -> bool:
    """Whether the chunks, boxes of `offsets` and `sizes`, fill a tensor of `size` once."""
    boxes = sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks if math.prod(chunk.sizes))
    if sum(math.prod(sizes) for _, sizes in boxes) != math.prod(size):
        return False
    if any(start + extent > whole for at, sizes in boxes for start, extent, whole in zip(at, sizes, size, strict=True)):
        return False
    for first, (at, sizes) in enumerate(boxes):
        for other, others in itertools.islice(boxes, first + 1, None):
            if not size or other[0] >= at[0] + sizes[0]:
                break  # sorted: no later box begins inside this one
            if all(a < b + n and b < a + m for a, b, m, n in zip(at, other, sizes, others, strict=True)):
                return False
    return True


def _is_path(path: Any) -> bool:
    return isinstance(path, tuple | list) and bool(path) and all(isinstance(key, str | int) for key in path)


def _are_counts(*numbers: Any) -> bool:
    return all(type(number) is int and 0 <= number < 2**63 for number in numbers)
