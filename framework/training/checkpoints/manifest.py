"""What makes a checkpoint whole: a manifest with the sha256 of its content, and a pointer to the newest whole one.

A single-file checkpoint carries its manifest inside, as the comment of the zip archive that torch.save writes: one
rename then publishes content and manifest together (a separate file could be a step older or newer), copies
keep it, and torch reads the file as before. A checkpoint folder has a file COMPLETE, written after everything else.
`latest` is a small text file with the name of the newest whole checkpoint; it moves after that one is whole.

Nothing here needs torch, so that the command line can choose a checkpoint before torch is loaded.
"""

import hashlib
import json
import os
import re
import struct
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lightspan import __version__
from lightspan.core.files.atomic import irregular, write_atomic
from lightspan.core.files.runs import RESOLVED

FORMAT = 2
"""Increases when older code can no longer read our checkpoints. 1: no manifest, no random states."""

COMPLETE = "COMPLETE"
LATEST = "latest"
SUFFIX = ".ckpt"
LAST = f"last{SUFFIX}"
WEIGHTS_ALONE = (
    "holds weights alone, as safetensors, and is no checkpoint; a network gets them in a recipe by "
    "class_path: lightspan.backbones.weights.with_weights"
)

_END, _END_BYTES, _MOST_COMMENT = b"PK\x05\x06", 22, 2**16 - 1  # of a zip archive's last record
_RECORD = struct.Struct("<4s6xH8xIIHHH12x")  # in its list: mark, method, both sizes, lengths of what follows
_MOST_MANIFEST = 2**28  # bytes of COMPLETE: about 200 for each file of a folder
_NAME = re.compile(rf"[^./\0][^/\0]{{0,240}}{re.escape(SUFFIX)}")
_seen_whole: dict[Path, tuple[int, ...]] = {}


@dataclass(frozen=True)
class Fault:
    """Why a checkpoint is not used: `text` continues a sentence after its path. Not `torn`: written by newer code."""

    text: str
    torn: bool = True


def header(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says without torch: format, version, optimiser step, ranks, and run ids of the loggers."""
    stamp = checkpoint.get("lightspan", {})
    return {
        "format": FORMAT,
        "lightspan": __version__,
        "step": checkpoint.get("global_step"),
        "ranks": len(stamp.get("random_states", [None])),
        "loggers": stamp.get("loggers", {}),
    }


def seal_file(file: BinaryIO, head: Mapping[str, Any], digest: "hashlib._Hash") -> None:
    """Writes the manifest into an open archive that torch.save has just finished; `digest` is that of all it wrote."""
    comment = _with_sum(head, digest).encode("ascii")
    assert len(comment) <= _MOST_COMMENT, "the header of a checkpoint's manifest is too long"
    file.seek(-2, os.SEEK_END)  # the last field of an archive without a comment is the comment's length
    file.write(struct.pack("<H", len(comment)) + comment)


def seal_folder(folder: Path, head: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> None:
    """Writes COMPLETE, the manifest of everything in `folder`. Sums of files in `known` come from their writers."""
    rest = [name for name in _names(folder) if name not in (known or {})]
    files = {**(known or {}), **summed(folder, rest)}
    write_atomic(folder / COMPLETE, _with_sum({**head, "files": files}, hashlib.sha256()) + "\n")


def summed(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """{name: {"bytes": size, "sha256": digest}} of files in `folder`; hashing releases the interpreter's lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda name: _sha256(folder / name), names)
        return {
            name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
            for name, digest in zip(names, digests, strict=True)
        }


def manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint, unchecked; None if it has none that can be read."""
    file = path / COMPLETE if path.is_dir() else path
    if irregular(file):
        return None
    try:
        if path.is_dir():
            text = file.read_bytes() if file.stat().st_size <= _MOST_MANIFEST else b""
        else:
            with path.open("rb") as archive:
                text = _end_of_archive(archive)[1]
        content = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and type(content.get("format")) is int else None


def last_checkpoint_note(last: Path, way_on: str = "") -> str:
    """What a run that stops says about its last checkpoint, followed by `way_on` if there is one."""
    return f"{last} is whole{way_on}" if last.exists() else "no checkpoint was written yet"


def not_a_checkpoint(path: Path) -> str | None:
    """What stands at `path` where that is a run folder, or weights alone, and not a checkpoint at all."""
    if (path / RESOLVED).is_file():
        return f"is a run folder, not a checkpoint: name one of its own, such as {path / 'checkpoints' / LAST}"
    return WEIGHTS_ALONE if path.suffix == ".safetensors" and path.is_file() else None


def fault(path: Path, contents: bool = True) -> Fault | None:
    """What is wrong with the checkpoint at `path`, or None if it is whole.

    Args:
        contents: also read everything and compare the sha256; otherwise only sizes count. Files without a
            manifest, such as Lightning's own: the check sums that every zip archive keeps of its records are compared.
    """
    if other := not_a_checkpoint(path):
        return Fault(other)
    try:
        if path.is_dir():
            return _folder_fault(path, contents)
        reason = irregular(path)
        return Fault(reason) if reason else _file_fault(path, contents)
    except OSError as error:
        return Fault(f"cannot be read ({error.strerror or error})")
    except RecursionError:
        return Fault("is damaged: its manifest is nested too deep")


def fault_at_use(path: Path) -> Fault | None:
    """Like `fault` with its contents, but what `newest_whole` has just read is not read again if unchanged."""
    state = _seen_whole.pop(path, None)
    return fault(path, contents=state is None or state != _state(path))


def checkpoints(folder: Path) -> list[Path]:
    """Every checkpoint in `folder`, whole or not, the newest first: by step; without a manifest last, by time."""

    def age(path: Path) -> tuple[int, float]:
        step = (manifest(path) or {}).get("step")
        try:
            return step if type(step) is int else -1, path.stat().st_mtime
        except OSError:  # a link to nothing
            return -1, 0.0

    return sorted((p for p in folder.glob(f"[!.]*{SUFFIX}")), key=age, reverse=True)


def latest(folder: Path) -> Path | None:
    """The checkpoint that the pointer names, existing or not; None without a pointer, or if it names no checkpoint."""
    if irregular(folder / LATEST):
        return None
    try:
        with (folder / LATEST).open(encoding="utf-8") as file:
            name = file.read(512).strip()
    except (OSError, ValueError):
        return None
    return folder / name if _NAME.fullmatch(name) else None


def set_latest(checkpoint: Path) -> None:
    """Moves the pointer of the checkpoint's folder to it, in one step."""
    write_atomic(checkpoint.parent / LATEST, checkpoint.name + "\n")


def newest_whole(folder: Path, contents: bool = True) -> tuple[Path | None, dict[Path, Fault]]:
    """The checkpoint to continue from, and the skipped ones with the reason.

    It is the one the pointer names, or else the newest whole one.

    Args:
        contents: compare the sha256, on the one rank that chooses for all; otherwise only sizes count.
    """
    passed: dict[Path, Fault] = {}
    pointed = latest(folder)
    candidates = checkpoints(folder)
    if pointed is not None:
        candidates = [pointed, *(path for path in candidates if path != pointed)]
    for path in candidates:
        before = _state(path)
        found = fault(path, contents) if before else Fault("does not exist")
        if found is None:
            if contents:
                _seen_whole[path] = before
            return path, passed
        passed[path] = found
    return None, passed


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a checkpoint is rewritten: for a folder, that of its manifest; empty if nothing is there."""
    try:
        found = os.stat(path / COMPLETE if path.is_dir() else path)
    except OSError:
        return (0,) if os.path.lexists(path) else ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _file_fault(path: Path, contents: bool) -> Fault | None:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(2)
        if not head:
            return Fault("is empty")
        if head != b"PK":
            return Fault("is not a file that torch.save wrote")
        try:
            at, comment = _end_of_archive(file)
        except ValueError:
            return Fault(f"is cut off after {size} bytes: its end is missing")
        try:
            if packed := packed_fault(file):
                return Fault(packed)
        except ValueError as error:
            return Fault(f"is damaged ({error})")
    if not comment:
        return _archive_fault(path) if contents else None
    found = manifest(path)
    if found is None:
        return Fault("is damaged: its manifest cannot be read")
    if too_new := _too_new(found):
        return too_new
    if contents and not _sum_agrees(found, _digest(path, at)):
        return Fault("is damaged: its content is not what its manifest says")
    return None


def packed_fault(file: BinaryIO) -> str | None:
    """What makes the content of an archive larger than its file, as the end of a sentence about it: torch unpacks
    compressed records, although it writes none, and reads the same bytes as several. None if there is nothing, or if
    it is no archive.

    The list of records is read where its end says that it is, as torch does; `zipfile` may find another one.
    Raises: ValueError for a list that cannot be read.
    """
    file.seek(0)
    if file.read(2) != b"PK":
        return None
    size = _size(file)
    held = 0
    try:
        start, count = _records_at(file)
        file.seek(start)
        for _ in range(count):
            mark, method, stored, whole, name, extra, comment = _RECORD.unpack(file.read(_RECORD.size))
            file.seek(name, os.SEEK_CUR)
            further = file.read(extra)
            file.seek(comment, os.SEEK_CUR)
            if mark != b"PK\1\2":
                raise ValueError("its list of records is damaged")
            if method != zipfile.ZIP_STORED or stored != whole:
                return "is not a file that torch.save wrote: its records are compressed"
            # Of a large record the extra part gives the size.
            held += whole if whole < 2**32 - 1 else struct.unpack_from("<Q", further, 4)[0]
    except (struct.error, OSError) as error:
        raise ValueError("its list of records is damaged") from error
    return "is not a file that torch.save wrote: its records overlap" if held > size else None


def _records_at(file: BinaryIO) -> tuple[int, int]:
    """(the byte at which the list of an archive's records begins, how many they are)."""
    end = _end_of_archive(file)[0] - (_END_BYTES - 2)
    file.seek(max(0, end - 20))
    mark, _, large, _ = struct.unpack("<4sIQI", file.read(20))
    if mark == b"PK\6\7":  # of archives beyond 4 GiB, which torch always writes
        file.seek(large)
        _, count, _, start = struct.unpack("<32sQQQ", file.read(56))
    else:
        file.seek(end)
        _, count, _, start, _ = struct.unpack("<10sHIIH", file.read(_END_BYTES))
    return start, count


def _archive_fault(path: Path) -> Fault | None:
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, ValueError, EOFError, RuntimeError, OverflowError, struct.error) as error:
        return Fault(f"is damaged ({error})")
    return Fault(f"is damaged: the check sum of its record {bad} is wrong") if bad else None


def _folder_fault(path: Path, contents: bool) -> Fault | None:
    if not (path / COMPLETE).is_file():
        return Fault(f"has no {COMPLETE} file: its save was cut off, or lightspan did not write it")
    found = manifest(path)
    files = found.get("files") if found else None
    if found is None or not isinstance(files, dict):
        return Fault(f"is damaged: its {COMPLETE} file cannot be read")
    if too_new := _too_new(found):
        return too_new
    if strange := next((name for name, entry in files.items() if not isinstance(entry, dict)), None):
        return Fault(f"is damaged: its {COMPLETE} file does not give the size and sum of {strange}")
    if not _sum_agrees(found, hashlib.sha256()):
        return Fault(f"is damaged: its {COMPLETE} file has changed")
    there = set(_names(path))
    missing = [name for name in files if name not in there]
    if missing:
        return Fault(f"is damaged: {_few(missing)} missing")
    inside = path.resolve()
    if linked := [name for name in files if inside not in (path / name).resolve().parents]:
        return Fault(f"is not a checkpoint that lightspan wrote: {_few(linked)} outside of its folder")
    wrong = [name for name, entry in files.items() if (path / name).stat().st_size != entry.get("bytes")]
    if not wrong and contents:
        now = summed(path, list(files))
        wrong = [name for name in files if now[name] != files[name]]
    return Fault(f"is damaged: {_few(wrong)} not as the manifest says") if wrong else None


def _too_new(found: Mapping[str, Any]) -> Fault | None:
    if found["format"] <= FORMAT:
        return None
    return Fault(
        f"has format {found['format']} (written by lightspan {found.get('lightspan')}), but lightspan {__version__} "
        f"reads formats up to {FORMAT}; upgrade lightspan",
        torn=False,
    )


def _size(file: BinaryIO) -> int:
    """Asked with `tell`: `seek` of torch's view of a part of a file says where that is in the whole file."""
    file.seek(0, os.SEEK_END)
    return file.tell()


def _end_of_archive(file: BinaryIO) -> tuple[int, bytes]:
    """(offset of the comment's length, comment) of a zip archive. Raises: ValueError if its end is missing."""
    start = max(0, _size(file) - _END_BYTES - _MOST_COMMENT)
    file.seek(start)
    tail = file.read()
    at = tail.rfind(_END)
    if at < 0 or len(tail) < at + _END_BYTES:
        raise ValueError("it has no end record")
    (length,) = struct.unpack_from("<H", tail, at + _END_BYTES - 2)
    comment = tail[at + _END_BYTES :]
    if len(comment) != length:
        raise ValueError(f"it has a comment of {len(comment)} bytes, not {length}")
    return start + at + _END_BYTES - 2, comment


def _with_sum(head: Mapping[str, Any], digest: "hashlib._Hash") -> str:
    """A manifest as text, with one sha256 over what `digest` has seen and over the manifest itself."""
    digest.update(_canonical(head))
    return json.dumps({**head, "sha256": digest.hexdigest()}, indent=1)


def _sum_agrees(found: Mapping[str, Any], digest: "hashlib._Hash") -> bool:
    digest.update(_canonical({name: value for name, value in found.items() if name != "sha256"}))
    return digest.hexdigest() == found.get("sha256")


def _canonical(head: Mapping[str, Any]) -> bytes:
    return json.dumps(head, sort_keys=True).encode("ascii")


def _digest(path: Path, end: int) -> "hashlib._Hash":
    """Of an archive as torch.save wrote it, without the comment whose length is at byte `end`."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while end > 0 and (block := file.read(min(end, 2**20))):
            digest.update(block)
            end -= len(block)
    digest.update(b"\0\0")
    return digest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _names(folder: Path) -> list[str]:
    """Relative names of the files in a checkpoint folder, without the manifest itself."""
    found = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    return [name for name in found if name != COMPLETE]


def _few(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more + (" are" if len(names) > 1 else " is")
