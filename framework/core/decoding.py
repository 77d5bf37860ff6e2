"""Files of others by decoders in C++ or Rust, each in a process of its own: where a file makes one fail, that process
ends and no other. Without torch.

A module that decodes makes a `DecoderProcess` of its own name and calls `serve` when it runs as a program. The program
answers one request a line, a JSON object, by a line of JSON, after which the bytes of the arrays follow.
"""

import atexit
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.files.foreign import LIMITS, SECONDS, TooMuchError, bounded_memory, bounded_time, ran_too_long
from lightspan.core.resident import rss_bytes

Answer = tuple[Mapping[str, Any], Mapping[str, np.ndarray]]
"""What JSON can say, and arrays by name."""

_KEPT = 2**28  # bytes that a process may keep of the files before, until another goes on in its place
_DYING_S = 1.0  # a process may take this long to end by itself
_KINDS = {kind.__name__: kind for kind in (UserError, TooMuchError)}  # that arrive as they were raised
_Asker = tuple[int, str]  # a process and the module that it asks; a fork does not share its parent's
_running: dict[_Asker, subprocess.Popen[bytes]] = {}
_locks: dict[_Asker, threading.Lock] = {}


@dataclass(frozen=True)
class DecoderProcess:
    """Asks a module that runs as a program. It starts with the first request, ends with the process that asks, and
    gives way to a fresh one when it keeps much memory of what it decoded. Threads take turns.

    Args:
        module: its name. It imports nothing from the current folder.
    """

    module: str

    def ask(self, **request: Any) -> Answer:
        """The answer of the module's function to a request that JSON can say.

        Raises: ValueError for whatever it raises, and for a file that makes a fresh process fail; TooMuchError beyond
            the limits of time and memory; UserError as it is, and if the program does not start.
        """
        with _locks.setdefault(self._asker, threading.Lock()):
            if self._asker in _running:
                # An earlier file may have harmed it, or someone ended it.
                with contextlib.suppress(_Failed):
                    return self._answered(request)
            self._start()
            try:
                return self._answered(request)
            except _Failed as failed:
                raise ValueError(f"it makes its decoder fail ({failed}), and so is damaged") from failed

    @property
    def _asker(self) -> _Asker:
        return os.getpid(), self.module

    def _start(self) -> None:
        atexit.unregister(_end_all)
        atexit.register(_end_all)
        command = [sys.executable, "-P", "-m", self.module]  # -P: no module of the current folder
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        try:
            _running[self._asker] = subprocess.Popen(command, **pipes)
            self._received(b"")
        except (OSError, _Failed) as error:
            raise UserError(
                f"these files are read by a process of their own, which does not start ({error}); try its command, "
                f"which must wait for input: {' '.join(command)}"
            ) from error

    def _answered(self, request: Mapping[str, Any]) -> Answer:
        limits = {name: value for name, value in os.environ.items() if name.startswith(LIMITS)}
        return self._received(json.dumps({"request": request, "limits": limits}).encode() + b"\n")

    def _received(self, sent: bytes) -> Answer:
        """What the process says next. Raises: _Failed where it ends instead."""
        process = _running[self._asker]
        assert process.stdin is not None
        assert isinstance(process.stdout, io.BufferedReader)
        try:
            process.stdin.write(sent)
            process.stdin.flush()
            said = json.loads(process.stdout.readline())
            arrays = {name: np.empty(shape, dtype) for name, (dtype, shape) in said["arrays"].items()}
            for array in arrays.values():
                if process.stdout.readinto(_bytes_of(array)) < array.nbytes:
                    raise EOFError
        except (OSError, EOFError, json.JSONDecodeError, UnicodeDecodeError) as error:  # no line is no JSON
            raise self._failed() from error
        except BaseException:  # half an answer would be taken for the next one's
            self._end(kill=True)
            raise
        if said["last"]:
            self._end()
        if "error" in said:
            raise _KINDS.get(said["kind"], ValueError)(said["error"])
        return said["answer"], arrays

    def _failed(self) -> "_Failed | TooMuchError":
        status = self._end()
        if status == -signal.SIGVTALRM:
            return ran_too_long(SECONDS.most)
        return _Failed(signal.Signals(-status).name if status < 0 else f"status {status}")

    def _end(self, kill: bool = False) -> int:
        return _ended(_running.pop(self._asker), kill)


class _Failed(Exception):
    """A process ended instead of answering; the text says how."""


def _ended(process: subprocess.Popen[bytes], kill: bool) -> int:
    """Ends this process, whose exit status it gives."""
    if not kill:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_DYING_S)
    process.kill()
    with contextlib.suppress(OSError), process:  # what it did not read
        pass
    return process.wait()


def _end_all() -> None:
    for asker in [asker for asker in _running if asker[0] == os.getpid()]:
        _ended(_running.pop(asker), kill=True)


def serve(opened: Callable[[], Callable[..., Answer]]) -> None:
    """Answers requests on standard input until its end, each within the limits of memory and time.

    Args:
        opened: loads what decodes, and gives the function that takes the settings of a request. UserErrors of both
            reach the user as they are; anything else that the function raises is wrong with the file.
    """
    # A user who interrupts a run ends it as it likes to end, and this with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # where decoders may print
    try:
        function = opened()
    except UserError as error:
        _say(answers, _error(error), {}, True)
        return
    _say(answers, {"answer": {}}, {}, False)
    first = rss_bytes()
    for line in sys.stdin.buffer:
        if _serve_one(function, json.loads(line), answers, first):
            return


def _serve_one(function: Callable[..., Answer], asked: Mapping[str, Any], answers: BinaryIO, first: int) -> bool:
    """Whether this process keeps too much of what it decoded, beyond the bytes that it had at first."""
    for name in [name for name in os.environ if name.startswith(LIMITS)]:
        del os.environ[name]
    os.environ.update(asked["limits"])
    said: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray] = {}
    try:
        with bounded_memory(), bounded_time():
            answer, arrays = function(**asked["request"])
        said = {"answer": answer}
    except BaseException as error:  # panics of Rust are no Exceptions
        said = _error(error)
    last = rss_bytes() - first - sum(array.nbytes for array in arrays.values()) > _KEPT
    _say(answers, said, arrays, last)
    return last


def _say(answers: BinaryIO, said: Mapping[str, Any], arrays: Mapping[str, np.ndarray], last: bool) -> None:
    forms = {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
    answers.write(json.dumps({**said, "arrays": forms, "last": last}).encode() + b"\n")
    for array in arrays.values():
        answers.write(_bytes_of(np.ascontiguousarray(array)))
    answers.flush()


def _bytes_of(array: np.ndarray) -> memoryview:
    """Of an array whose numbers follow one another, which changes with them."""
    return array.reshape(-1).view(np.uint8).data


def _error(error: BaseException) -> dict[str, Any]:
    kind, said = type(error).__name__, str(error)
    if kind not in _KINDS:
        said = (said.strip().splitlines() or [kind])[-1].strip()
        said = re.sub(r"\(0x[0-9a-f]+\)", "", said)  # addresses differ from run to run
    return {"error": said, "kind": kind}
