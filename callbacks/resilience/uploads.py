"""Checkpoints on their way into an object store in a thread while training continues."""

import secrets
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

from lightspan.core.errors import one_line, printable
from lightspan.core.files.atomic import discard, link_atomic, temporary_path
from lightspan.core.files.places import PathUse
from lightspan.core.files.runs import RESOLVED
from lightspan.training.checkpoints.copies import remove_copy, upload

KEPT = 2
"""Copies of one start that stay; older ones are removed once a newer one is whole."""


class Uploads:
    """Copies checkpoints one after another. One that cannot be copied gives a warning on stderr.

    A checkpoint that waits while another one is copied is dropped once there is a newer one.

    Args:
        address: where copies go, as `lightspan.training.checkpoints.copies.checked` gives it.
    """

    def __init__(self, address: Annotated[str, PathUse.SERVER]) -> None:
        self.address = address
        self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1, thread_name_prefix="lightspan-uploads")
        self._lock = threading.Lock()
        self._waiting: tuple[Path, Path, int] | None = None
        self._made: list[str] = []

    def add(self, checkpoint: Path, step: int) -> None:
        """Copies a whole checkpoint as it is now, whatever happens to its name afterwards, and returns at once."""
        assert self._thread is not None, "a checkpoint was written after the end of the run"
        kept = temporary_path(checkpoint, secrets.token_hex(4))  # `remove_leftovers` knows such names
        try:
            link_atomic(checkpoint, kept)
        except Exception as error:  # a file system without links, and a disk without room for a second one
            _tell(checkpoint, step, error)
            return
        with self._lock:
            overtaken, self._waiting = self._waiting, (kept, checkpoint, step)
        if overtaken is not None:
            discard(overtaken[0])
        self._thread.submit(self._next)

    def close(self) -> None:
        """Returns when the newest checkpoint has been copied, or has failed to be."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _next(self) -> None:
        with self._lock:
            taken, self._waiting = self._waiting, None
        if taken is None:
            return
        kept, checkpoint, step = taken
        try:
            self._made.append(upload(self.address, kept, step, checkpoint.parent.parent / RESOLVED))
            while len(self._made) > KEPT:
                remove_copy(self.address, self._made.pop(0))
        except Exception as error:  # of any kind: a run does not end for a copy
            _tell(checkpoint, step, error)
        finally:
            discard(kept)


def _tell(checkpoint: Path, step: int, error: Exception) -> None:
    text = f"warning: step {step} was not copied: {one_line(error)}; training continues, and {checkpoint} stays"
    print(printable(text), file=sys.stderr, flush=True)
