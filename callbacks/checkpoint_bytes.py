"""torch.save into an open file, with the cause of a failed write and the sum of what was written."""

import hashlib
from typing import Any

import torch


class Summed:
    """A file for writing that knows the sha256 of what went through it and why a write failed."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            written = self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.digest.update(data)
        return int(written)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def torch_save(content: Any, file: Any) -> "hashlib._Hash":
    """Writes `content` to an open file; returns the sha256 of what it wrote. Raises: OSError where a write fails."""
    summed = Summed(file)
    try:
        torch.save(content, summed)
    except RuntimeError as error:
        # torch's zip writer replaces the cause (disk full) by a message about file positions.
        raise summed.error or error from error
    return summed.digest
