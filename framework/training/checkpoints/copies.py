"""Copies of checkpoints in an object store, and the way back: whole or absent there too.

ADDRESS/step=N-SHA256/ is one copy: what a run folder would hold of that checkpoint, `checkpoints/step=N.ckpt` (a file,
or a folder with its files) beside the run's settings, and LIST with the size and SHA-256 of each of these files. The
copy's name has the SHA-256 of LIST, so that no copy is written over by another one. LIST comes after all that it lists
has been read back from the store, and ADDRESS/latest, the name of the newest copy, after LIST.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from filelock import FileLock

from lightspan.core.errors import UserError, one_line
from lightspan.core.files import stores
from lightspan.core.files.atomic import atomic_path, discard, explained_os_errors, remove, temporary_path
from lightspan.core.files.attempts import retried
from lightspan.core.files.caches import CacheFolder
from lightspan.core.files.places import PathUse
from lightspan.core.files.runs import CHECKPOINTS, RESOLVED
from lightspan.training.checkpoints.manifest import LATEST, SUFFIX, summed

FORMAT, LIST, TRIED = 1, "COPY.json", "TRIED"
IN_USE_S = 3600.0
"""What was fetched stays this long after its last use, and until another one is fetched."""

_MOST_LIST, _MOST_LATEST, _BLOCK_BYTES = 2**24, 512, 2**20
_COPY = re.compile(r"step=(0|[1-9]\d{0,17})-([0-9a-f]{64})")
_WAY_OUT = "name another copy, or continue from a checkpoint of this machine"
Files = dict[str, dict[str, Any]]


def checked(address: str, setting: str) -> str:
    """An address without a slash at its end. Raises: UserError unless it is one of a store, without keys in it."""
    if not stores.in_store(address):
        raise UserError(
            f"{setting}={address!r:.200} is no address in a store ({', '.join(stores.STORES)}); write s3://BUCKET/NAME"
        )
    stores.require_object(address, setting)
    return address.rstrip("/")


def upload(address: Annotated[str, PathUse.SERVER], checkpoint: Path, step: int, settings: Path) -> str:
    """Writes a copy of a whole checkpoint, and returns its name below `address`.

    Args:
        settings: of the run, which a resumed one is compared with; left out if there are none.
    Raises: UserError that names the object that could not be written, or is another one when it is read back. Then
        `latest` still names the copy before.
    """
    name = f"{CHECKPOINTS}/step={step}{SUFFIX}"
    inside = sorted(path for path in checkpoint.rglob("*") if path.is_file()) if checkpoint.is_dir() else [checkpoint]
    places = {str(PurePosixPath(name, path.relative_to(checkpoint).as_posix())): path for path in inside}
    if settings.is_file():
        places[RESOLVED] = settings
    sums = summed(Path(), [str(path.absolute()) for path in places.values()])
    files = {listed: sums[str(path.absolute())] for listed, path in places.items()}
    content = json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1, sort_keys=True).encode()
    copy = f"step={step}-{_entry(content)['sha256']}"
    for listed, path in places.items():
        retried(partial(_put, f"{address}/{copy}/{listed}", path, files[listed]))
    for place, text in ((f"{copy}/{LIST}", content), (LATEST, f"{copy}\n".encode())):
        retried(partial(_put, f"{address}/{place}", text, _entry(text)))
    return copy


def try_out(address: str) -> None:
    """Writes an object and reads it back. Raises: UserError where that is not possible."""
    note = b"Copies of the checkpoints of a run come here.\n"
    retried(partial(_put, f"{address}/{TRIED}", note, _entry(note)))


def remove_copy(address: str, copy: str) -> None:
    """The list first: without it, what is left is no copy. Raises: UserError."""
    address = f"{address}/{copy}"
    _, _, files = _listed(address)
    with _named(f"{address}/{LIST}", "removed"):
        for name in (LIST, *files):
            stores.remove(f"{address}/{name}")


def fetched(address: str) -> Path:
    """The checkpoint of a copy, in the user's cache, every file with the size and SHA-256 of the list.

    All processes of a machine fetch it once. Nothing of it is read before all of it is there.

    Args:
        address: of one copy, or of a folder of copies, whose newest is taken.
    Raises: UserError for a place without a whole copy, and for one that is not what its name and its list say.
    """
    address = checked(address, "--resume")
    if _COPY.fullmatch(address.rpartition("/")[2]) is None:
        named = retried(partial(_small, f"{address}/{LATEST}", _MOST_LATEST)).decode(errors="replace").strip()
        if _COPY.fullmatch(named) is None:
            raise UserError(f"{address}/{LATEST} does not name a copy of a checkpoint; {_WAY_OUT}")
        address = f"{address}/{named}"
    step, digest, files = _listed(address)
    part = CacheFolder(None, "copies", "XDG_CACHE_HOME").part()
    copy = part / digest
    with explained_os_errors(copy, setting="XDG_CACHE_HOME"), FileLock(part / f"{digest}.lock"):
        if not _is_there(copy, files):
            _make_room(part, copy, sum(entry["bytes"] for entry in files.values()))
            with atomic_path(copy, setting="XDG_CACHE_HOME") as temporary:
                for name, entry in files.items():
                    (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                    retried(partial(_get, f"{address}/{name}", temporary / name, entry))
        os.utime(copy)
    return copy / CHECKPOINTS / f"step={step}{SUFFIX}"


def _listed(address: str) -> tuple[int, str, Files]:
    """The step of one copy, the SHA-256 of its list, and its files. Raises: UserError for a list that is not the one
    of the copy's name.
    """
    found = _COPY.fullmatch(address.rpartition("/")[2])
    assert found is not None
    step, digest = int(found[1]), found[2]
    content = retried(partial(_small, f"{address}/{LIST}", _MOST_LIST))
    if (sha256 := _entry(content)["sha256"]) != digest:
        raise UserError(
            f"{address}/{LIST} has sha256 {sha256}, but the name of the copy says {digest}: it was damaged or "
            f"exchanged, and nothing was read; {_WAY_OUT}"
        )
    return step, digest, _files(content, step, f"{address}/{LIST}")


def _files(content: bytes, step: int, where: str) -> Files:
    """{name: {"bytes", "sha256"}} of a list. Raises: UserError for one of another form, and for names that lead out."""
    own, newer = f"{CHECKPOINTS}/step={step}{SUFFIX}", False
    try:
        listed = json.loads(content)
        newer = type(listed["format"]) is int and listed["format"] > FORMAT
        files = listed["files"]
        known = listed["format"] == FORMAT and listed["step"] == step and isinstance(files, dict)
        known = known and all(_is_known(name, entry, step) for name, entry in files.items())
        # One file of the checkpoint's name, or files in a folder of that name.
        known = known and (set(files) - {RESOLVED} == {own} or (own not in files and bool(set(files) - {RESOLVED})))
    except (ValueError, TypeError, KeyError, RecursionError):
        known = False
    if newer:
        raise UserError(f"{where} has a newer format than {FORMAT}, which this lightspan reads; upgrade lightspan")
    if not known:
        raise UserError(f"{where} is no list of the files of a checkpoint of step {step}; {_WAY_OUT}")
    return dict(files)


def _is_known(name: str, entry: Any, step: int) -> bool:
    plain = PurePosixPath(name)
    kept = plain.as_posix() == name and not plain.is_absolute() and ".." not in plain.parts
    kept = kept and not set(name) & set("\\:\0") and name.isprintable()
    own = name == RESOLVED or plain.parts[:2] == (CHECKPOINTS, f"step={step}{SUFFIX}")
    return kept and own and type(entry["bytes"]) is int and entry["bytes"] >= 0 and isinstance(entry["sha256"], str)


def _is_there(copy: Path, files: Mapping[str, Any]) -> bool:
    """Whether an earlier start has fetched it; it got its name when it was whole."""
    try:
        return all((copy / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except OSError:
        return False


def _make_room(part: Path, copy: Path, incoming: int) -> None:
    """Removes what earlier starts have fetched. Raises: UserError where the disk has no room for another one."""
    for other in part.iterdir():
        if re.fullmatch(r"[0-9a-f]{64}", other.name) and time.time() - other.stat().st_mtime > IN_USE_S:
            remove(other)
    for leftover in part.glob(temporary_path(copy, "*").name):
        discard(leftover)  # of a killed process: this one holds the lock
    if incoming > (free := shutil.disk_usage(part).free):
        raise UserError(
            f"the copy has {incoming:,} bytes, and the disk of {part} has {free:,} free; free some space, or choose a "
            "folder on another disk with XDG_CACHE_HOME"
        )


def _put(address: str, source: Path | bytes, entry: Mapping[str, Any]) -> None:
    """Writes an object and reads it back: a store may not have what it says it has."""
    with _named(address, "written"):
        stores.put_file(address, source) if isinstance(source, Path) else stores.write(address, source)
    if found := _read(address, entry):
        raise UserError(f"{address} {found} that it was given") from ConnectionError()  # another attempt may help


def _entry(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _get(address: str, target: Path, entry: Mapping[str, Any]) -> None:
    if found := _read(address, entry, target):
        raise UserError(f"{address} {found} that the list says: it was damaged or exchanged; {_WAY_OUT}")


def _read(address: str, entry: Mapping[str, Any], target: Path | None = None) -> str | None:
    """Reads an object to its end, into a file where one is named. Returns what is wrong with it, to which the reader
    adds where its size and sum are from.
    """
    with _named(address, "read"):
        stream = stores.ObjectStream(address)
    if stream.length != entry["bytes"]:
        return f"has {stream.length:,} bytes instead of the {entry['bytes']:,}"
    digest = hashlib.sha256()
    with target.open("wb") if target else contextlib.nullcontext() as file:
        while block := _block(stream):
            digest.update(block)
            if file is not None:
                file.write(block)
    found = digest.hexdigest()
    return None if found == entry["sha256"] else f"has sha256 {found} instead of the {entry['sha256']}"


def _block(stream: stores.ObjectStream) -> bytes:
    with _named(stream.address, "read"):
        return stream.read1(_BLOCK_BYTES)


def _small(address: str, most: int) -> bytes:
    """An object of at most `most` bytes. Raises: UserError."""
    with _named(address, "read"):
        stream = stores.ObjectStream(address)
        if stream.length > most:
            raise UserError(f"{address} has {stream.length:,} bytes, and {most:,} are the limit; {_WAY_OUT}")
        return stream.read()


@contextlib.contextmanager
def _named(address: str, done: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{address} cannot be {done}: {one_line(error)}") from error
