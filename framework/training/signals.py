"""Signals that only set a flag, from the first line of a process on, and a limit to how long it goes unread.

Loads neither torch nor Lightning.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from lightspan.core.errors import printable

WARNINGS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What schedulers send before they end a job."""
BUDGET_S = 60.0
"""Seconds that a signalled process has before it ends itself, wherever its main thread is."""
INTERRUPT_S = 10.0
"""Seconds between a Ctrl-C that must act at once and the end of a process whose main thread does not react."""
_LOOK_S = 1.0
_CLOSE = 0


class SignalFlag:
    """Remembers the first of some signals; installed as their handler until `restore` or `release`.

    Python runs a handler only when the main thread is back in Python. A thread therefore sees each signal too, at once,
    even while the main thread waits inside a library for a rank or a file that never comes: `budget_s` after a warning
    it calls `late`, which ends the process, unless `met` was called or the flag ended first.

    SIGINT, if it is watched, is a KeyboardInterrupt as usual; with `patient` the first one is remembered like a
    warning, and the next one raises. One to which the main thread does not react within `INTERRUPT_S` ends the process.

    Processes forked meanwhile, such as data workers, have these signals blocked: a scheduler signals every
    process of a job, a terminal every process of a command, and a worker that died of it would spoil the step, and with
    it the checkpoint.

    Args:
        signals: which signals; nothing is installed outside the main thread, where Python allows no handlers.
    """

    def __init__(self, signals: Iterable[signal.Signals]) -> None:
        self.received: signal.Signals | None = None
        self.since_s: float | None = None
        self.budget_s = BUDGET_S
        self.patient = False
        self.insisted = False  # whether a Ctrl-C raised
        self.late: Callable[[signal.Signals], None] = self._end
        self._before: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._other_pipe = -1
        self._thread: threading.Thread | None = None
        self._met = False
        self.watch(signals)
        os.register_at_fork(before=self._block, after_in_parent=self._unblock, after_in_child=self._forget_pipe)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and (not self.patient or self.received is not None):
            self.insisted = True
            raise KeyboardInterrupt
        if self.received is None:
            self.received = signal.Signals(number)
            self.since_s = time.monotonic() if self.since_s is None else self.since_s

    def age_s(self) -> float:
        """Seconds since the signal came; only valid after one came."""
        assert self.since_s is not None
        return time.monotonic() - self.since_s

    def watch(self, signals: Iterable[signal.Signals]) -> None:
        """Watches exactly these from now on. One that came and is not among them now has its usual effect.

        A SIGINT that others handle or ignore, as in background commands of a shell, is left alone.
        """
        wanted = set(signals)
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGINT) not in (signal.default_int_handler, self):
            wanted.discard(signal.SIGINT)
        for number in wanted - self._before.keys():
            self._before[number] = signal.signal(number, self)
        self._give_back(self._before.keys() - wanted)
        self._listen_while(bool(self._before))
        if self.received is not None and self.received not in wanted:
            unwanted, self.received = self.received, None
            signal.raise_signal(unwanted)

    def tell(self, number: signal.Signals, age_s: float) -> None:
        """Another rank received a signal so many seconds ago: the rest of its budget applies here too."""
        if self.received is None:
            self.received, self.since_s = number, time.monotonic() - age_s
            if self._pipe is not None:
                os.write(self._pipe[1], bytes([number]))

    def met(self) -> None:
        """What the signal asked for is done: the process may take any time to end."""
        self._met = True

    def restore(self) -> None:
        """Restores the previous handlers and forgets what came."""
        self.received = None
        self.watch(())

    def ignore(self) -> None:
        """Forgets what came, and ignores its signals for the rest of the process."""
        for number in self._before:
            if signal.getsignal(number) is self:
                signal.signal(number, signal.SIG_IGN)
        self._before.clear()
        self.restore()

    def release(self) -> None:
        """Restores the previous handlers, and lets a signal that came have its usual effect."""
        self.watch(())

    def _listen_while(self, watching: bool) -> None:
        if watching == (self._pipe is not None):
            return
        if not watching:
            assert self._pipe is not None
            assert self._thread is not None
            signal.set_wakeup_fd(self._other_pipe)
            os.write(self._pipe[1], bytes([_CLOSE]))
            self._thread.join()
            for end in self._pipe:
                os.close(end)
            self._pipe = self._thread = None
            return
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._other_pipe = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, args=(self._pipe[0],), daemon=True, name="signals")
        self._thread.start()

    def _listen(self, pipe: int) -> None:
        """Reads the signals that Python's C code writes to a pipe as soon as they come."""
        first, since_s, interrupted_s = signal.SIGINT, None, None
        while True:
            left_s = _LOOK_S
            if interrupted_s is not None:
                left_s = min(left_s, interrupted_s + INTERRUPT_S - time.monotonic())
            if since_s is not None and not self._met:
                left_s = min(left_s, since_s + self.budget_s - time.monotonic())
            if left_s <= 0:
                (self.late if since_s is not None else self._end)(first)
                return
            idle = since_s is None and interrupted_s is None
            if not select.select([pipe], [], [], None if idle else left_s)[0]:
                continue
            number = os.read(pipe, 1)[0]
            if number == _CLOSE:
                return
            if number not in self._before:
                continue
            if number == signal.SIGINT and (not self.patient or since_s is not None):
                interrupted_s = time.monotonic() if interrupted_s is None else interrupted_s
            elif since_s is None:
                first = signal.Signals(number)
                since_s = self.since_s = time.monotonic() if self.since_s is None else self.since_s

    def _end(self, number: signal.Signals) -> None:
        print(
            printable(f"lightspan: {number.name}: still {main_thread()}; exiting at once"), file=sys.stderr, flush=True
        )
        os._exit(128 + number)

    def _forget_pipe(self) -> None:
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)

    def _give_back(self, signals: Iterable[signal.Signals]) -> None:
        for number in set(signals):
            before = self._before.pop(number)
            if signal.getsignal(number) is self:  # a handler installed after ours is kept
                signal.signal(number, before)

    def _block(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, self._before)

    def _unblock(self) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._before)


def installed() -> SignalFlag | None:
    """The flag that currently handles one of the warning signals, if any."""
    flags = (signal.getsignal(number) for number in WARNINGS)
    return next((flag for flag in flags if isinstance(flag, SignalFlag)), None)


def main_thread() -> str:
    """Where the main thread of this process is, in words."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "in an unknown place"
    return f"in {frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


@contextlib.contextmanager
def remembered(signals: Iterable[signal.Signals] = WARNINGS) -> Any:
    """A `SignalFlag` for the duration of a block."""
    flag = SignalFlag(signals)
    try:
        yield flag
    finally:
        flag.restore()
