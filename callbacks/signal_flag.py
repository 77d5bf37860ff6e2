"""Signals that only set a flag, from the first line of a process on. Loads neither torch nor Lightning."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable
from types import FrameType
from typing import Any

WARNINGS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What schedulers send before they end a job."""


class SignalFlag:
    """Remembers the first of some signals; installed as their handler until `restore` or `release`.

    Processes that are forked meanwhile, such as data workers, have these signals blocked: a scheduler signals every
    process of a job, and a worker that died of it would take the step, and with it the checkpoint, along.

    Args:
        signals: which; nothing is installed outside the main thread, where Python allows no handlers.
    """

    def __init__(self, signals: Iterable[signal.Signals]) -> None:
        self.received: signal.Signals | None = None
        self.since_s = 0.0
        self._before: dict[signal.Signals, Any] = {}
        self.watch(signals)
        os.register_at_fork(before=self._block, after_in_parent=self._unblock)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self.since_s = signal.Signals(number), time.monotonic()

    def age_s(self) -> float:
        """Seconds since the signal came; only after one came."""
        return time.monotonic() - self.since_s

    def watch(self, signals: Iterable[signal.Signals]) -> None:
        """Watches exactly these from now on. One that came and is not among them does now what it would have done."""
        wanted = set(signals)
        if threading.current_thread() is not threading.main_thread():
            return
        for number in wanted - self._before.keys():
            self._before[number] = signal.signal(number, self)
        self._give_back(self._before.keys() - wanted)
        if self.received is not None and self.received not in wanted:
            late, self.received = self.received, None
            signal.raise_signal(late)

    def restore(self) -> None:
        """Puts the handlers of before back and forgets what came."""
        self.received = None
        self.watch(())

    def ignore(self) -> None:
        """Forgets what came, and has its signals do nothing for as long as the process lasts."""
        for number in self._before:
            if signal.getsignal(number) is self:
                signal.signal(number, signal.SIG_IGN)
        self._before.clear()
        self.received = None

    def release(self) -> None:
        """Puts the handlers of before back, and lets a signal that came do what it would have done."""
        self.watch(())

    def _give_back(self, signals: Iterable[signal.Signals]) -> None:
        for number in set(signals):
            before = self._before.pop(number)
            if signal.getsignal(number) is self:  # somebody who came after us keeps the place
                signal.signal(number, before)

    def _block(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, self._before)

    def _unblock(self) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._before)


def installed() -> SignalFlag | None:
    """The flag that is the handler of one of the warning signals at present, if any."""
    flags = (signal.getsignal(number) for number in WARNINGS)
    return next((flag for flag in flags if isinstance(flag, SignalFlag)), None)


@contextlib.contextmanager
def remembered(signals: Iterable[signal.Signals] = WARNINGS) -> Any:
    """A `SignalFlag` for the length of a block."""
    flag = SignalFlag(signals)
    try:
        yield flag
    finally:
        flag.restore()
