"""What some tests need beyond `pip install -e '.[dev]'`: they are skipped, with the reason, where it is missing."""

import contextlib
from collections.abc import Iterator

import pytest

from lightspan.core.errors import UserError

INSTALLS = "install"
"""Stands in every message of lightspan that says how to get a missing package, extra or system package."""


@contextlib.contextmanager
def skip_without_packages() -> Iterator[None]:
    """Skips where lightspan asks for a package; whatever else it refuses is a fault."""
    try:
        yield
    except UserError as error:
        if INSTALLS not in str(error):
            raise
        pytest.skip(str(error))
