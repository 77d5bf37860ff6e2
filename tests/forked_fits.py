"""Runs of a sweep, forked from the sweep's own process, which has loaded torch, instead of started anew."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import rank_processes

from lightspan.cli.launch.parent import PARENT_VARIABLE
from lightspan.cli.runs import fits


class Forked:
    """As much of a `subprocess.Popen` as is needed."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.status: int | None = None

    def poll(self) -> int | None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def wait(self) -> None:
        while self.poll() is None:
            time.sleep(0.01)

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


def start(command: Sequence[str], log: Path, variables: dict[str, str] | None = None) -> Forked:
    """Stands in for `lightspan.cli.runs.fits.start`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    parent = os.getpid()
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        status = 1
        try:
            os.setsid()
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.pop("LIGHTSPAN_RUN", None)
            os.environ |= {PARENT_VARIABLE: str(parent), **(variables or {}), "OMP_NUM_THREADS": "1"}
            from lightspan.cli.main import main

            status = main(list(command[3:]))
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return Forked(pid)


def install() -> None:
    fits.start = start  # type: ignore[assignment]


def lightspan(arguments: Sequence[str], folder: Path, cwd: Path) -> rank_processes.Ended:
    """One command line in a process of its own, whose fits are forked from it; `folder` takes what it says."""
    return rank_processes.launch(list(arguments), 1, folder, cwd=cwd, prepare=install)
