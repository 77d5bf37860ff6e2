"""torch.save into an open file, with the cause of a failed write and the sha256 of what was written."""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch


class HashingWriter:
    """A file for writing that knows the sha256 of what went through it and why a write failed."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        try:
            written = self._file.write(data)
        except BaseException as error:
            self.error = self.error or error
            raise
        self.digest.update(data)
        return int(written)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def torch_save(content: Any, file: Any) -> "hashlib._Hash":
    """Writes `content` to an open file; returns the sha256 of what it wrote. Raises: OSError if a write fails."""
    summed = HashingWriter(file)
    with causes_kept(summed):
        torch.save(content, summed)
    return summed.digest


@contextlib.contextmanager
def causes_kept(file: HashingWriter) -> Iterator[None]:
    """Raises what ended a write by torch: a full disk, or a Ctrl-C inside or between the writes.

    torch's zip writer still writes the end of the archive, and replaces the cause by a message about file positions
    or names of files.
    """
    try:
        yield
    except Exception as error:
        raise file.error or _interruption(error) or error from error
    if file.error is not None:
        raise file.error


def _interruption(error: BaseException | None) -> BaseException | None:
    """The KeyboardInterrupt or SystemExit during whose handling `error` occurred, if any."""
    while error is not None and isinstance(error, Exception):
        error = error.__context__
    return error
