"""`lightspan fit` in separate processes, for verbs that start many: none is left running, whatever happens."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightspan.config.flags import allow_options

LAST_LINES = 15


def fit_command(recipe: Path, run_dir: Path, allow_modules: Sequence[str]) -> list[str]:
    """The command line that trains a recipe file in a run folder."""
    command = [sys.executable, "-m", "lightspan", "fit", str(recipe), "--run", str(run_dir)]
    return command + allow_options(allow_modules)


def start(command: Sequence[str], log: Path, variables: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Starts a command in its own session; its output is appended to `log`."""
    alone = {key: value for key, value in os.environ.items() if key != "LIGHTSPAN_RUN"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            command, env=alone | (variables or {}), stdout=file, stderr=file, start_new_session=True
        )


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kills a process that `start` started, with its data workers, which are in its session, and waits for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def ranks_of(command: list[str], ranks: int, log: Path) -> list[int | None]:
    """Starts the ranks as a launcher would; when one dies the rest is killed. Exit statuses, None for those killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
            launched = place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            processes.append(start(command, log, launched if ranks > 1 else None))
        while not any(process.poll() for process in processes) and any(process.poll() is None for process in processes):
            time.sleep(0.1)
        return [process.poll() for process in processes]
    finally:
        for process in processes:
            end(process)


def run_side_by_side(
    commands: Sequence[tuple[Sequence[str], Path]],
    workers: int,
    ended: Callable[[int, int], None],
    variables: dict[str, str] | None = None,
) -> None:
    """Runs (command, log) pairs, `workers` at a time in their order; calls ended(position, exit status) for each."""
    waiting = list(enumerate(commands))
    running: dict[int, subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                position, (command, log) = waiting.pop(0)
                running[position] = start(command, log, variables)
            for position, process in list(running.items()):
                if (status := process.poll()) is not None:
                    end(running.pop(position))
                    ended(position, status)
            time.sleep(0.05)
    finally:
        for process in running.values():
            end(process)


def last_lines(log: Path) -> str:
    """The end of a run's output."""
    return "\n".join(log.read_text(errors="replace").strip().splitlines()[-LAST_LINES:])


@contextlib.contextmanager
def exits_on_sigterm() -> Iterator[None]:
    """SIGTERM unwinds the stack inside, as Ctrl-C does; by default it would leave started processes running."""

    def stop(number: int, _: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
