"""The feature store: what an encoder makes of a data set, computed once and then read from disk.

Each key has a folder, named by its sha256. In it, `entry` holds `features.safetensors` with the tensors `features`,
`index` and, where there are any, `label`, sorted by index, and COMPLETE, the manifest of a checkpoint folder with the
key. It appears complete or not at all; while it is computed, each rank writes what it has to `parts` beside it, and
an interrupted computation continues from those. A changed key is another folder: an entry is up to date if its key is
complete, see `lightspan.evaluation.features.encoded`. To free space, delete any of them.

Shapes: N samples, B samples of a batch, D features.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from lightspan import __version__
from lightspan.core.distributed import from_first_rank, raise_on_all_ranks, rank, world_size
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import (
    atomic_path,
    expanded,
    explained_os_errors,
    make_folder,
    refuse_link_out,
    remove,
    remove_leftovers,
)
from lightspan.core.files.caches import user_cache
from lightspan.core.files.places import CachePath
from lightspan.core.files.tensors import Form, stored_tensors, write_tensors
from lightspan.evaluation.features.features import Features
from lightspan.training.checkpoints.manifest import COMPLETE, FORMAT, fault, manifest, seal_folder

SETTING = "--features"
ENTRY, CONTENT, PARTS, LOCK = "entry", "features.safetensors", "parts", "lock"
PART_BYTES = 2**26
ROWS_AT_A_TIME = 4096
GIB = 2**30
_ANEW = "delete {}, and the features are computed again"

Rows = Mapping[str, Tensor]
"""`features` [B ...], `index` [B] and perhaps `label` [B ...] of some samples."""


class FeatureStore:
    """A folder of entries that any number of runs share. The constructor opens no file.

    Args:
        folder: None means $XDG_CACHE_HOME/lightspan/features, usually below ~/.cache.
        limit_gib: of one entry; a larger one is refused before it fills the disk.
        device: where encoders compute.
        verify: compare the sha256 of an entry's content whenever it is opened; sizes are always compared.
    """

    def __init__(
        self, folder: CachePath | Path | None = None, limit_gib: float = 64.0, device: str = "cpu", verify: bool = True
    ) -> None:
        if not limit_gib > 0:
            raise UserError(f"limit_gib={limit_gib} of a feature store must be above 0")
        self.folder = expanded(folder or user_cache() / "features", SETTING).absolute()
        self.limit_bytes, self.device, self.verify = int(limit_gib * GIB), torch.device(device), verify

    def entry(self, key: Mapping[str, Any]) -> Path:
        """Where the features of a key are, or would be; a key is plain data."""
        return self.folder / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:40] / ENTRY

    def holds(self, key: Mapping[str, Any]) -> bool:
        """Whether the entry exists and is complete."""
        entry = self.entry(key)
        return (entry / COMPLETE).is_file() and fault(entry, contents=self.verify) is None

    def get(
        self,
        key: Mapping[str, Any],
        compute: Callable[[set[int]], Iterable[Rows]],
        held_bytes: int | None = None,
    ) -> Features:
        """The features of a key, computed if they are not in the store. All ranks call it together.

        Args:
            key: the same on every rank.
            compute: given the indices of samples that are done, yields the rows of this rank's others, in batches.
                A sample that appears twice counts once.
            held_bytes: so many are collected in memory before they are written, None is 64 MiB; with 0 an
                interruption loses nothing that was computed.
        Raises: UserError, on every rank, if the disk is full, the entry would exceed the limit, or there is no sample;
            whatever `compute` raises, and a UserError on the ranks where it did not raise.
        """
        with self._alone(key):
            if not from_first_rank(lambda: self.holds(key)):
                parts = self.entry(key).with_name(PARTS)
                with raise_on_all_ranks("compute features"):
                    self._compute(parts, compute, PART_BYTES if held_bytes is None else held_bytes)
                with raise_on_all_ranks("write features"):
                    if rank() == 0:
                        self._assemble(key, parts)
        return self._open(key)

    def _compute(self, parts: Path, compute: Callable[[set[int]], Iterable[Rows]], held_bytes: int) -> None:
        make_folder(parts, SETTING)
        there = sorted(parts.glob("*.safetensors"))
        done = {index for path in there for index in _stored(path)["index"].tolist()}
        before, mine = sum(path.stat().st_size for path in there), 0
        held: list[Rows] = []
        for rows in compute(done):
            _require_rows(rows, "rows for a feature store")
            held.append(rows)
            if (size := sum(map(_bytes, held))) >= held_bytes:
                mine += size
                self._write_part(parts, held, before + mine * world_size())
                held = []
        if held:
            self._write_part(parts, held, before + (mine + sum(map(_bytes, held))) * world_size())

    def _write_part(self, parts: Path, held: list[Rows], total: int) -> None:
        """`total` bytes are those of all ranks, as far as one of them knows."""
        if total > self.limit_bytes:
            raise UserError(
                f"these features exceed {self.limit_bytes / GIB:g} GiB, the limit of an entry; pool them, store "
                "bfloat16, take fewer samples, or raise --features-limit"
            )
        columns = {name: _joined(name, held) for name in held[0]}
        first = int(columns["index"][0]) if len(columns["index"]) else 0
        with atomic_path(parts / f"{first:012d}-{rank()}-{os.getpid()}.safetensors", setting=SETTING) as temporary:
            forms = {name: Form(tuple(x.shape), x.dtype) for name, x in columns.items()}
            write_tensors(temporary, forms, columns.items(), {"format": "pt"})

    def _assemble(self, key: Mapping[str, Any], parts: Path) -> None:
        """One sorted file of all parts; at most a few thousand rows are in memory at a time."""
        stored = [_stored(path) for path in sorted(parts.glob("*.safetensors"))]
        lengths = torch.tensor([len(rows["index"]) for rows in stored], dtype=torch.int64)
        if not int(lengths.sum()):
            raise UserError("there is no sample to compute features of; give the data set samples")
        if len({frozenset(rows) for rows in stored}) > 1:
            raise UserError(f"the files in {parts} have different columns; {_ANEW.format(parts)}")
        index_N = torch.cat([rows["index"] for rows in stored])
        order_N = index_N.argsort(stable=True)
        first_N = torch.ones_like(order_N, dtype=torch.bool)
        first_N[1:] = index_N[order_N].diff() != 0
        order_N = order_N[first_N]
        part_N = torch.repeat_interleave(torch.arange(len(stored)), lengths)[order_N]
        place_N = order_N - (lengths.cumsum(0) - lengths)[part_N]
        columns = {name: [rows[name] for rows in stored] for name in stored[0]}
        other_runs = f"; if they are of other runs, {_ANEW.format(parts)}"
        firsts = {name: _one_form(name, column, other_runs) for name, column in columns.items()}
        forms = {name: Form((len(order_N), *first.shape[1:]), first.dtype) for name, first in firsts.items()}
        entry = self.entry(key)
        with atomic_path(entry, over_folder=True, setting=SETTING) as temporary:
            temporary.mkdir()
            pieces = ((name, piece) for name in forms for piece in _sorted(columns[name], part_N, place_N))
            write_tensors(temporary / CONTENT, forms, pieces, {"format": "pt"})
            head = {"format": FORMAT, "lightspan": __version__, "key": key, "samples": len(order_N)}
            seal_folder(temporary, head)
        remove(parts)

    def _open(self, key: Mapping[str, Any]) -> Features:
        entry = self.entry(key)
        if reason := fault(entry, contents=False):
            raise UserError(f"the features at {entry} {reason.text}; {_ANEW.format(entry)}")
        columns = _stored(entry / CONTENT)
        stored = (manifest(entry) or {}).get("key")
        if stored != json.loads(json.dumps(key)):
            raise UserError(
                f"the features at {entry} were stored under another key than the one asked for: {_apart(stored, key)}; "
                f"{_ANEW.format(entry)}"
            )
        key_text = json.dumps(stored, sort_keys=True)
        return Features(columns["features"], columns.get("label"), columns["index"], key_text)

    @contextmanager
    def _alone(self, key: Mapping[str, Any]) -> Iterator[None]:
        """Locks the entry for the ranks of one run; another run that wants it too waits, and then finds it."""
        folder = self.entry(key).parent
        lock = FileLock(folder / LOCK)
        try:
            with raise_on_all_ranks("open the feature store"):
                if rank() == 0:
                    # Files are written, moved and deleted in these, and a store may be that of others.
                    refuse_link_out(folder, self.folder, "the feature store")
                    for name in (ENTRY, PARTS, LOCK):
                        refuse_link_out(folder / name, folder, "its entry of the feature store")
                    make_folder(folder, SETTING)
                    with explained_os_errors(folder, "lock", setting=SETTING):
                        lock.acquire()
                    remove_leftovers(folder)
                    remove_leftovers(folder / PARTS)
            yield
        finally:
            lock.release()


def _apart(stored: Any, asked: Mapping[str, Any]) -> str:
    if not isinstance(stored, dict):
        return "it has none"
    names = [name for name in {**stored, **asked} if stored.get(name) != asked.get(name)]
    return "; ".join(
        f"{name} {stored.get(name, 'unstated')} there, {asked.get(name, 'unstated')} here" for name in names
    )


def _require_rows(rows: Rows, name: str, way_out: str = "") -> None:
    shapes = {column: list(x.shape) for column, x in rows.items()}
    if not {"features", "index"} <= rows.keys() or len({(*shape[:1],) for shape in shapes.values()}) > 1:
        raise UserError(f"{name} need `features` and `index` of the same length, but have {shapes}{way_out}")
    index = rows["index"]
    if index.dtype != torch.int64 or index.ndim != 1:
        raise UserError(f"{name} need an `index` that is int64 [B], but have {index.dtype} {shapes['index']}{way_out}")


def _joined(name: str, held: Sequence[Rows]) -> Tensor:
    columns = [rows[name] for rows in held if name in rows]
    if len(columns) < len(held):
        raise UserError(f"some samples have a {name} and some have none; give one to all, or to none")
    _one_form(name, columns)
    return torch.cat([column.detach().cpu() for column in columns])


def _one_form(name: str, columns: Sequence[Tensor], way_out: str = "") -> Tensor:
    """The first column. Raises: UserError if samples differ in shape or dtype."""
    for column in columns:
        if column.shape[1:] != columns[0].shape[1:] or column.dtype != columns[0].dtype:
            raise UserError(
                f"{name} of one sample is {list(columns[0].shape[1:])} in {columns[0].dtype}, of another "
                f"{list(column.shape[1:])} in {column.dtype}; a store needs a single form: pool, or resize the samples"
                f"{way_out}"
            )
    return columns[0]


def _bytes(rows: Rows) -> int:
    return sum(column.nbytes for column in rows.values())


def _sorted(columns: Sequence[Tensor], part_N: Tensor, place_N: Tensor) -> Iterator[Tensor]:
    for part_R, place_R in zip(part_N.split(ROWS_AT_A_TIME), place_N.split(ROWS_AT_A_TIME), strict=True):
        piece = columns[0].new_empty(len(part_R), *columns[0].shape[1:])
        for part in part_R.unique().tolist():
            piece[part_R == part] = columns[part][place_R[part_R == part]]
        yield piece


def _stored(path: Path) -> Rows:
    """The columns of a file, memory-mapped: numbers are read when they are used. Another program may have written it.

    Raises: UserError for a file that is damaged, or has no rows.
    """
    way_out = _ANEW.format(path.parent)
    columns, _ = stored_tensors(path, way_out)
    _require_rows(columns, f"the rows in {path}", f"; {way_out}")
    return columns
