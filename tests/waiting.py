"""Waiting in tests: a time-out guards against a hang and says nothing about speed, so it is long on any machine."""

import time
from collections.abc import Callable

HANG_S = 1200.0
"""Seconds after which a process, a connection or a condition counts as stuck."""


def wait_until(condition: Callable[[], object], what: str, every_s: float = 0.02) -> None:
    """Returns once `condition` holds. Raises: TimeoutError naming `what` if it never does."""
    end_s = time.monotonic() + HANG_S
    while not condition():
        if time.monotonic() > end_s:
            raise TimeoutError(f"waited {HANG_S:g} s for {what}")
        time.sleep(every_s)
