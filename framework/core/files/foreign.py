"""Files that others may have written: how much of them is read, and how. One limit of each kind, kept by every reader.

A limit stops what would fill the memory or never end, far above what people train on. It is raised in the environment,
out of reach of any recipe: `LIGHTSPAN_MAX_PIXELS=200000000 lightspan fit ...`.

Faults are ValueErrors that say what "it" is, and the reader names the file and the setting that chose it.
"""

import bz2
import faulthandler
import gzip
import io
import json
import lzma
import math
import os
import resource
import signal
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lightspan.core.errors import UserError, one_line
from lightspan.core.files.atomic import irregular, opened

LIMITS = "LIGHTSPAN_MAX_"
"""How the variables of the environment begin that raise a limit."""


class TooMuchError(ValueError):
    """What is beyond a limit, where all other faults are of the file itself."""


@dataclass(frozen=True)
class Limit:
    """The most of something that a file may have.

    Attributes:
        unit: what is counted, in the plural.
        default: the limit unless the environment sets another one.
        setting: the variable of the environment that does.
        instead: what to do rather than raise the limit, for the message.
    """

    unit: str
    default: int
    setting: str
    instead: str = ""

    @property
    def most(self) -> int:
        """Raises: UserError if the environment has something other than a whole number from 1."""
        said = os.environ.get(self.setting, "")
        if not said:
            return self.default
        if not (said.isascii() and said.isdigit() and len(said) < 19 and int(said)):
            raise UserError(f"{self.setting}={one_line(said)[:80]} must be a whole number of {self.unit} from 1")
        return int(said)

    def require(self, count: int) -> None:
        """Raises: TooMuchError if `count` is above the limit."""
        if count > self.most:
            shown = f"{count:,}" if count < 2**63 else "more than 2^63"
            raise TooMuchError(
                f"it has {shown} {self.unit}, and the limit is {self.most:,}; {self.instead}if you trust it, raise the "
                f"limit with {self.setting} in the environment"
            )


PIXELS = Limit("pixels", 2**26, "LIGHTSPAN_MAX_PIXELS")
"""Of a picture: width times height."""
NUMBERS = Limit("numbers", 2**28, "LIGHTSPAN_MAX_NUMBERS")
"""Of an array, a recording or a scene, over all bands and channels."""
TRIANGLES = Limit("triangles", 2**23, "LIGHTSPAN_MAX_TRIANGLES")
"""Of a surface, each of which takes 36 bytes or more."""
FRAMES = Limit("frames", 2**24, "LIGHTSPAN_MAX_FRAMES")
"""Of a video: a week of 25 a second."""
CELLS = Limit("cells", 2**26, "LIGHTSPAN_MAX_CELLS")
"""Of a table: rows times columns, each of which takes about 60 bytes as text."""
BYTES = Limit("bytes", 2**32, "LIGHTSPAN_MAX_BYTES")
"""Of a file that is read whole, and of what is unpacked from one."""
SETTINGS_BYTES = Limit("bytes", 2**24, "LIGHTSPAN_MAX_SETTINGS_BYTES")
"""Of settings and lists of files as JSON, which take twenty times as much memory once read."""
VOCABULARY_BYTES = Limit("bytes", 2**28, "LIGHTSPAN_MAX_VOCABULARY_BYTES")
"""Of a tokenizer's vocabulary, which takes as much again: the largest that are published have an eighth of it."""
CHARACTERS = Limit(
    "characters",
    2**24,
    "LIGHTSPAN_MAX_CHARACTERS",
    "split it into shorter texts, such as files of one document each or one JSON object a line (.jsonl), or, ",
)
"""Of the texts that a tokenizer cuts at once, each of which takes about 300 bytes meanwhile."""
SECONDS = Limit("seconds", 60, "LIGHTSPAN_MAX_SECONDS")
"""Of processor time, for a program that is part of a file, each time that it runs."""


_TRUSTED = "; if you trust it, raise the limit with {} in the environment"


def _most(known: int | None) -> tuple[int, str]:
    """The bytes that a file may become, of which its reader may know, and what to say of more."""
    if known is not None and known < BYTES.most:
        return known, ", far more than its header announces"
    return BYTES.most, _TRUSTED.format(BYTES.setting)


def ran_too_long(seconds: int) -> TooMuchError:
    """For a program that is part of a file and took so many of processor time."""
    return TooMuchError(f"it runs for more than {seconds:,} seconds{_TRUSTED.format(SECONDS.setting)}")


def _has_limits() -> bool:
    """Whether this thread can limit what it takes: the main one of Linux."""
    return sys.platform == "linux" and threading.current_thread() is threading.main_thread()


@contextmanager
def bounded_memory(most: int | None = None) -> Iterator[None]:
    """For a reader whose file says how much it becomes, and may lie. On the main thread of Linux, where alone a process
    can limit its address space in passing; elsewhere it reads on.

    Args:
        most: bytes that it may take, where its reader knows; never more than the limit of `BYTES`.
    Raises: TooMuchError where it takes more memory.
    """
    most, way_out = _most(most)
    if not _has_limits():
        yield
        return
    with open("/proc/self/statm", encoding="ascii") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if all(limit == resource.RLIM_INFINITY or taken + most < limit for limit in (soft, hard)):
        resource.setrlimit(resource.RLIMIT_AS, (taken + most, hard))
    try:
        yield
    except MemoryError as error:
        raise TooMuchError(f"it needs more than {most:,} bytes{way_out}") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


_timed = False  # whether the main thread is inside of `bounded_time`


@contextmanager
def bounded_time(share: float = 1.0) -> Iterator[None]:
    """For a program that is part of a file, such as a regular expression, and for a list that a file makes long. On the
    main thread of Linux, as `bounded_memory`.

    Inside of another one it leaves the time to that.

    Args:
        share: of `SECONDS`; above 1 for more work than usual.
    Raises: TooMuchError where it takes more than its share of `SECONDS` of processor time. Where no exception can stop
        it, since it stays inside one operation of C or Rust, the process ends by SIGVTALRM after twice as many, and
        Python says where it was.
    """
    global _timed
    if not _has_limits() or _timed:
        yield
        return
    seconds, _timed = math.ceil(share * SECONDS.most), True

    def stop(*_: object) -> None:
        raise ran_too_long(seconds)

    handler = signal.signal(signal.SIGPROF, stop)
    last_resort = signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    with suppress(RuntimeError, ValueError, OSError, AttributeError):  # a program without standard error
        faulthandler.register(signal.SIGVTALRM, sys.__stderr__, all_threads=False, chain=True)  # type: ignore[arg-type]
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, 2 * seconds)
        signal.setitimer(signal.ITIMER_PROF, seconds, seconds)  # again: compilers of templates ignore errors
        yield
    finally:
        _timed = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        faulthandler.unregister(signal.SIGVTALRM)
        signal.signal(signal.SIGVTALRM, last_resort)
        signal.signal(signal.SIGPROF, handler)


@contextmanager
def bounded_program() -> Iterator[None]:
    """For a program that is part of a file, such as a template in Jinja, whose language confines what it reaches and
    not how long it runs. Limits as `bounded_time` and `bounded_memory`.

    Raises: TooMuchError where it takes more than `SECONDS` of processor time, or `BYTES` of memory.
    """
    with bounded_time(), bounded_memory():
        yield


@contextmanager
def opened_regular(path: Path) -> Iterator[BinaryIO]:
    """A regular file, or a link to one, for reading. Raises: ValueError for anything else, or without permission."""
    with opened(path) as file:
        if file is None:
            raise ValueError(f"it {irregular(path) or 'cannot be opened; change its permissions'}")
        yield file


def content_of(path: Path, limit: Limit = BYTES) -> bytes:
    """All of a regular file, or of a link to one.

    Raises: ValueError for anything else, and where reading fails; TooMuchError for a file above the limit.
    """
    with opened_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        limit.require(size)
        try:
            # Python makes room for all that it is asked to read.
            content = file.read(size + 1)
            if len(content) > size:  # files of /proc say a size of 0
                content += file.read(limit.most + 1 - len(content))
        except OSError as error:
            raise ValueError(f"it cannot be read ({error.strerror or error})") from error
    limit.require(len(content))
    return content


def whole_text(path: Path, limit: Limit = BYTES) -> str:
    """As `content_of`, as UTF-8, without the mark with which programs of Windows begin it, lines ending in "\\n".

    Raises: ValueError as `content_of`, and for what is not UTF-8.
    """
    try:
        return content_of(path, limit).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text: {error}") from error


def settings_object(path: Path) -> dict[str, Any]:
    """A JSON object of settings. Raises: ValueError as `content_of`, and for anything else, or if nested too deep."""
    try:
        found = json.loads(whole_text(path, SETTINGS_BYTES))
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("it is JSON that is nested too deep") from error
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


_PACKERS: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
"""By the first bytes of what they packed; each reads on where several packed files were put one after the other."""


def unpacked(packed: bytes, most: int | None = None) -> bytes:
    """What gzip, zlib, bzip2 or xz has packed, as its first bytes tell; any other content is returned as it is.

    Args:
        most: bytes that it may become, where its reader knows; never more than the limit of `BYTES`.
    Raises: ValueError for more, or for damage.
    """
    most, way_out = _most(most)
    if packed[:1] == b"\x78":
        return drained(zlib.decompressobj(), packed, most, way_out)
    opener = next((opener for start, opener in _PACKERS.items() if packed.startswith(start)), None)
    if opener is None:
        return packed
    try:
        with opener(io.BytesIO(packed)) as file:
            content: bytes = file.read(most + 1)
    except EOFError as error:
        raise ValueError("it is cut short") from error
    except (OSError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"it cannot be unpacked: {error}") from error
    return _few_enough(content, most, way_out)


def drained(decompressor: Any, packed: bytes, most: int, way_out: str = "") -> bytes:
    """What a decompressor of zlib, bz2 or lzma makes of `packed`. Raises: ValueError for more than `most` bytes, or for
    damage.
    """
    try:
        content: bytes = decompressor.decompress(packed, most + 1)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"it cannot be unpacked: {error}") from error
    _few_enough(content, most, way_out)
    if not decompressor.eof:
        raise ValueError("it is cut short")
    return content


def _few_enough(content: bytes, most: int, way_out: str) -> bytes:
    if len(content) > most:
        raise ValueError(f"it unpacks to more than {most:,} bytes{way_out}")
    return content
