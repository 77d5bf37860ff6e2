"""Missing input files: a run refuses to start, whereas `lightspan check` notes them and checks the rest."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from lightspan.core.errors import UserError

_tolerated: ContextVar[bool] = ContextVar("tolerated", default=False)


class MissingFile(UserError):
    """A file or folder that a recipe reads does not exist."""


@contextmanager
def without_missing_weights() -> Iterator[None]:
    """Inside, networks whose form is known keep their random weights where a run would load a file that is missing."""
    token = _tolerated.set(True)
    try:
        yield
    finally:
        _tolerated.reset(token)


@contextmanager
def unless_missing() -> Iterator[None]:
    """What loads weights: inside of `without_missing_weights`, it ends without them at a file that is missing."""
    try:
        yield
    except MissingFile:
        if not _tolerated.get():
            raise


def weights_may_be_missing() -> bool:
    """Whether this is inside of `without_missing_weights`."""
    return _tolerated.get()
