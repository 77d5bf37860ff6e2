"""Files and folders written whole or not at all: a temporary name beside them, fsync, rename, fsync of the folder.

So no reader, crash or full disk ever leaves half a file: the file has either the old content or the new one.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lightspan.core.errors import UserError

_LEFTOVER_PREFIX, _LEFTOVER_SUFFIX, _ASIDE_SUFFIX = ".lightspan-", ".tmp", ".old"
_ASIDE = re.compile(rf"{re.escape(_LEFTOVER_PREFIX)}[0-9a-f]+-(?P<name>.+){re.escape(_ASIDE_SUFFIX)}")

_ANOTHER_FOLDER = "choose a folder you may write to with {setting}"
_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space or choose a folder on another disk with {setting}"),
    errno.EDQUOT: (
        "your disk quota is used up",
        "delete some of your files or choose a folder on another disk with {setting}",
    ),
    errno.EFBIG: (
        "the file would be larger than the file system or `ulimit -f` allows",
        "raise the limit or choose a folder on another disk with {setting}",
    ),
    errno.EIO: (
        "the disk or network file system reports an error",
        "have it checked, or choose a folder on another disk with {setting}",
    ),
    errno.EROFS: ("the file system is read-only", _ANOTHER_FOLDER),
    errno.EACCES: ("permission is denied", _ANOTHER_FOLDER),
    errno.EPERM: ("the operation is not permitted", _ANOTHER_FOLDER),
    errno.ENOTDIR: (
        "a part of this path is a file, not a folder",
        "rename that file or choose another folder with {setting}",
    ),
    errno.EEXIST: (
        "there is a file where a folder is needed",
        "rename that file or choose another folder with {setting}",
    ),
    errno.EISDIR: ("there is a folder of this name", "rename that folder or choose another one with {setting}"),
    errno.ESTALE: (
        "the file server no longer knows this file",
        "remount it or choose another folder with {setting}",
    ),
    errno.ETIMEDOUT: (
        "the file server does not answer",
        "check the server or choose another folder with {setting}",
    ),
    errno.ENAMETOOLONG: ("a name in this path is too long", "choose a shorter one with {setting}"),
    errno.ELOOP: ("links in this path are circular", "fix the link or choose another folder with {setting}"),
}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK, errno.EINVAL}
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def irregular(path: str | Path) -> str | None:
    """Why `path` is not a regular file or a link to one, as the end of a sentence about it; None if it is one.

    Reading anything else may never end or begin: a named pipe blocks whoever opens it, a device gives bytes forever.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
    return None if stat.S_ISREG(mode) else f"is {kind}, not a regular file"


def require_regular_file(path: str | Path, what: str = "") -> None:
    """Raises: UserError if `path` is missing, cannot be reached, or is not a regular file (or a link to one).

    `what` says in one word what it should be, for the message.
    """
    if reason := irregular(path):
        raise UserError(f"{what} {path} {reason}; name a file".lstrip())


def refuse_link_out(path: Path, home: Path, whose: str, way_out: str = "copy what it leads to, or remove it") -> None:
    """For folders that others may have written: no file of the reader becomes part of what is shown of them.

    Args:
        home: the folder in which a link has to stay.
        whose: what `home` is, for the message.
        way_out: for the message on a link that leads somewhere.
    Raises: UserError if `path` is a link that leads out of `home`, or nowhere.
    """
    if not path.is_symlink():
        return
    place = Path(os.path.realpath(path))  # of circular links the link itself, where `resolve` fails
    if place.is_symlink() or home.resolve() not in place.parents:
        where = "nowhere; remove it" if place.is_symlink() or not place.exists() else f"out of {whose}; {way_out}"
        raise UserError(f"{path} is a link that leads {where}")


@contextlib.contextmanager
def opened(path: str | Path, links: bool = True) -> Iterator[BinaryIO | None]:
    """A regular file, or with `links` a link to one, for reading; None for anything else, or if it cannot be opened.

    For files that others may have written: a pipe or a device in place of a file does not make the reader wait.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | (0 if links else getattr(os, "O_NOFOLLOW", 0))
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError):
        yield None
        return
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        yield None
        return
    with open(path, "rb", opener=lambda *_: descriptor) as file:  # named as the path, unlike with os.fdopen
        yield file


def read_small(path: str | Path, most: int = 2**24, links: bool = True) -> bytes | None:
    """The content of a regular file of at most `most` bytes; None for anything else, or if it cannot be read.

    For files that others may have written: a pipe or a device in place of a file neither makes the reader wait nor
    fills its memory. Without `links` a link is anything else.
    """
    with opened(path, links) as file:
        if file is None:
            return None
        content = b""
        try:
            while len(content) <= most and (part := os.read(file.fileno(), most + 1 - len(content))):
                content += part
        except OSError:
            return None
    return content if len(content) <= most else None


@contextlib.contextmanager
def explained_os_errors(path: Path, doing: str = "write", *, setting: str = "--run") -> Iterator[None]:
    """Turn the errors a user can fix (full disk, read-only folder, ...) into a `UserError` that names `path`.

    Args:
        doing: what fails, for the message.
        setting: the option that chooses the folder of `path`, for the message.

    Errors that carry the name of a file outside the folder of `path` pass through: they are about something else.
    """
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0)
        if reason is None or not _concerns(error, path):
            raise
        what, way_out = reason
        raise UserError(
            f"cannot {doing} {path}: {what} ({os.strerror(error.errno or 0)}); {way_out.format(setting=setting)}"
        ) from error


def _concerns(error: OSError, path: Path) -> bool:
    if not isinstance(error.filename, (str, os.PathLike)):
        return True  # the error of a failed write to an open file has no name
    named = Path(error.filename).absolute()
    folder = path.absolute().parent
    return named == folder or folder in named.parents or named in folder.parents


@contextlib.contextmanager
def atomic_path(path: str | Path, over_folder: bool = False, setting: str = "--run") -> Iterator[Path]:
    """Yield a temporary path in the folder of `path` (made if missing); on success it becomes `path` in one step.

    When the block raises, also by Ctrl-C, the temporary is removed and whatever was at `path` is unchanged.
    A block may make it a folder, which then replaces a file or folder as `replace_folder` does. A folder at
    `path` is not replaced by a file, or with `over_folder` in the same way. `setting` is what chooses the folder of
    `path`, for messages.

    Raises: UserError if the disk is full, or the folder is read-only or cannot be made; other errors pass through.
    """
    path = Path(path)
    temporary = temporary_path(path, secrets.token_hex(4))
    with explained_os_errors(path, setting=setting):
        make_folder(path.parent, setting)
        try:
            with _nothing_can_be_made(path, temporary, setting):
                yield temporary
            if temporary.is_dir() or (over_folder and path.is_dir()):
                replace_folder(temporary, path)
            else:
                _fsync(temporary)
                os.replace(temporary, path)
                _fsync(path.parent)
        finally:
            discard(temporary)


@contextlib.contextmanager
def _nothing_can_be_made(path: Path, temporary: Path, setting: str) -> Iterator[None]:
    """For /proc and other file systems in which users cannot make files, whose folders are there and say otherwise."""
    try:
        yield
    except FileNotFoundError as error:
        if str(error.filename) != str(temporary):
            raise
        way_out = _ANOTHER_FOLDER.format(setting=setting)
        raise UserError(f"cannot write {path}: {error.strerror}; {way_out}") from error


def expanded(path: str | Path, setting: str) -> Path:
    """`path` with `~` and `~user` expanded. Raises: UserError that names `setting` if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: {error}; correct {setting}") from error


def write_atomic(path: str | Path, data: bytes | str, setting: str = "--run") -> None:
    """Write `data` (text as UTF-8, newlines untouched) to `path`, whole or not at all.

    Raises: UserError as `atomic_path` does, naming the `setting` that chose the folder.
    """
    with atomic_path(path, setting=setting) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def link_atomic(source: Path, path: Path) -> None:
    """Give the content of `source`, a file or folder that is never changed in place, also the name `path`, in one step.

    Hard links cost no bytes; if the file system has none, the files are copied. Raises: UserError as `atomic_path`.
    """
    with atomic_path(path, over_folder=True) as temporary:
        if not source.is_dir():
            _link_or_copy(source, temporary)
            return
        for folder, _, names in os.walk(source):
            inside = temporary / Path(folder).relative_to(source)
            inside.mkdir()
            for name in names:
                _link_or_copy(Path(folder, name), inside / name)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)


def make_folder(folder: Path, setting: str = "--run") -> None:
    """Make `folder`, which `setting` chose, and its missing parents.

    Raises: UserError if that is impossible.
    """
    with explained_os_errors(folder, "make folder", setting=setting):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # /proc and other file systems in which users cannot make files
            way_out = _ANOTHER_FOLDER.format(setting=setting)
            raise UserError(f"cannot make folder {folder}: {error.strerror}; {way_out}") from error


def temporary_path(path: Path, mark: str) -> Path:
    """The temporary name beside `path`; equal marks give equal names, so that ranks can share one."""
    return path.with_name(f"{_LEFTOVER_PREFIX}{mark}-{path.name}{_LEFTOVER_SUFFIX}")


def replace_folder(temporary: Path, path: Path) -> None:
    """Give the finished `temporary` the name `path`, with everything in it on disk, if one of the two is a folder.

    A folder at `path` is moved aside first, since no rename replaces a folder that is not empty; a process
    killed between the two renames leaves it there, and `put_back` returns it.
    """
    for folder, _, names in os.walk(temporary):
        for name in names:
            _fsync(Path(folder, name))
        _fsync(Path(folder))
    if temporary.is_file():
        _fsync(temporary)
    aside = path.with_name(f"{_LEFTOVER_PREFIX}{secrets.token_hex(4)}-{path.name}{_ASIDE_SUFFIX}")
    if path.exists():
        os.rename(path, aside)
    os.rename(temporary, path)
    _fsync(path.parent)
    remove(aside)


def put_back(folder: Path) -> None:
    """Return what `replace_folder` moved aside and a killed process did not replace; harmless on several ranks."""
    for aside in leftovers(folder):
        named = _ASIDE.fullmatch(aside.name)
        if named and not (place := folder / named["name"]).exists():
            with contextlib.suppress(OSError):  # another rank was faster
                os.rename(aside, place)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists. A folder is renamed first, so that no half of it keeps the name.

    Raises: UserError if that is not permitted, or the disk fails; it names what is left of a folder.
    """
    with explained_os_errors(path, "remove"):
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)
            return
        doomed = path if path.name.startswith(_LEFTOVER_PREFIX) else temporary_path(path, secrets.token_hex(4))
        if doomed != path:
            os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
    if doomed != path and doomed.exists():
        raise UserError(f"a part of {path} could not be removed; it is in {doomed} now: remove that by hand")


def discard(path: Path) -> None:
    """`remove` for a temporary at the end of a write. Where that fails, as on a file system that is read-only by now,
    it hides no other error: `remove_leftovers` finds what is left.
    """
    with contextlib.suppress(OSError, UserError):
        remove(path)


def leftovers(folder: Path) -> list[Path]:
    """What killed processes left in `folder`: temporary files and folders, and those moved aside."""
    return sorted(p for end in (_LEFTOVER_SUFFIX, _ASIDE_SUFFIX) for p in folder.glob(f"{_LEFTOVER_PREFIX}*{end}"))


def remove_leftovers(folder: str | Path) -> None:
    """Delete what killed processes left in `folder`, after moving back what they had moved aside.

    Call it only while nothing else is writing.
    """
    put_back(Path(folder))
    for leftover in leftovers(Path(folder)):
        discard(leftover)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder; the rename itself has happened by then.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)
