"""`lightspan fit` in separate processes, for verbs that start many: none is left running, whatever happens."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightspan.cli.launch.parent import PARENT_VARIABLE

LAST_LINES = 15
GRACE_S = 90.0
"""Seconds that runs have to write a checkpoint when all are ended: those of a `Preemption`, and 30 to exit."""
_LOOK_S = 0.05


@dataclass(frozen=True)
class Task:
    """A command to start, and the file that its output is appended to."""

    name: str
    command: tuple[str, ...]
    log: Path


def fit_command(words: Sequence[str], run_dir: Path) -> tuple[str, ...]:
    """The command line that trains in a run folder; `words` are the recipe and what follows it."""
    return (sys.executable, "-m", "lightspan", "fit", *words, "--run", str(run_dir))


def start(
    command: Sequence[str], log: Path | None, variables: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Starts a command in its own session; its output is appended to `log`, or goes where this process' does. If it is
    lightspan, it stops in order when this process is killed.
    """
    alone = {key: value for key, value in os.environ.items() if key != "LIGHTSPAN_RUN"}
    alone |= {PARENT_VARIABLE: str(os.getpid()), **(variables or {})}
    if log is None:
        return subprocess.Popen(command, env=alone, start_new_session=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(command, env=alone, stdout=file, stderr=file, start_new_session=True)


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kills a process that `start` started, with its data workers, which are in its session, and waits for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def end_in_order(processes: Collection["subprocess.Popen[bytes]"], grace_s: float = GRACE_S) -> None:
    """Asks processes of `start` to stop, which a run does with a checkpoint, and kills those that have not by then."""
    try:
        for process in processes:
            if process.poll() is None:
                process.terminate()  # not its data workers: the last batch has to come from them
        until_s = time.monotonic() + grace_s
        while any(process.poll() is None for process in processes) and time.monotonic() < until_s:
            time.sleep(_LOOK_S)
    finally:  # also if somebody insists
        for process in processes:
            end(process)


def ranks_of(command: Sequence[str], ranks: int, log: Path) -> list[int | None]:
    """Starts the ranks as a launcher would; when one dies the rest is killed. Exit statuses, None for those killed."""
    with started_ranks(command, ranks, log) as processes:
        while not any(process.poll() for process in processes) and any(process.poll() is None for process in processes):
            time.sleep(0.1)
        return [process.poll() for process in processes]


@contextlib.contextmanager
def started_ranks(
    command: Sequence[str], ranks: int, log: Path | None, variables: Mapping[str, str] | None = None
) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """The processes of one start, which meet at a port of their own; whatever happens inside, all have ended after it.

    Args:
        log: as in `start`.
        variables: of the environment, besides those that tell a rank which one it is.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **(variables or {})}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            processes.append(start(command, log, group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
        yield processes
    finally:
        for process in processes:
            end(process)


def run_side_by_side(
    tasks: Iterator[Task],
    workers: int,
    ended: Callable[[Task, int], None],
    look: Callable[[Collection[Task]], None] = lambda running: None,
) -> None:
    """Runs `workers` tasks at a time and leaves none running, whatever happens.

    Args:
        tasks: is asked for the next one when a worker is free, so it may choose by the results of those before.
        ended: called with each task that ended and its exit status (negative: the signal that killed it).
        look: called again and again with the tasks that are running.
    """
    running: dict[Task, tuple[int, subprocess.Popen[bytes]]] = {}
    free = list(range(workers))
    try:
        while True:
            while free and (task := next(tasks, None)) is not None:
                running[task] = (free[0], start(task.command, task.log, _share(free[0], workers)))
                free.pop(0)
            if not running:
                return
            for task, (worker, process) in list(running.items()):
                if (status := process.poll()) is not None:
                    end(process)
                    del running[task]
                    free.append(worker)
                    ended(task, status)
            look(running.keys())
            time.sleep(_LOOK_S)
    finally:
        end_in_order([process for _, process in running.values()])


def _share(worker: int, workers: int) -> dict[str, str]:
    """The variables that give a worker its part of the processor's cores and of the GPUs; what the user has set stays,
    except that GPUs are divided.
    """
    found = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, _cores() // workers))}
    devices = gpus()
    if workers > 1 and devices:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(devices[worker::workers] or [devices[worker % len(devices)]])
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[str]:
    """The names under which CUDA knows this machine's GPUs, without asking CUDA: that would take memory on each."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    folder = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number in range(len(list(folder.iterdir())))] if folder.is_dir() else []


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
