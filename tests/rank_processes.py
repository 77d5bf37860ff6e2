"""Real processes for ranks, forked from a server that has loaded torch, Lightning and lightspan once.

A fork takes milliseconds and starts clean, so nothing is kept between two tests and nothing has to be set back.
"""

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import multiprocessing.forkserver
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from unittest import mock

import torch
import torch.multiprocessing
from filelock import FileLock
from waiting import HANG_S

PROJECT = Path(__file__).parent / "tiny_project"
TINY = [
    str(PROJECT / "tiny.yaml"),
    *("--allow-module", "tiny_lab", "data.class_path=tiny_lab.faults.ExactRows"),
    *("trainer.limit_val_batches=0", "trainer.max_steps=12"),
]


@dataclass(frozen=True)
class Ended:
    """How the ranks ended: exit statuses (negative: a signal) and everything they said, in the order of ranks; and the
    statuses as they were before the others were killed, None for those.
    """

    statuses: list[int]
    said: str
    by_themselves: list[int | None]


@functools.cache
def _server() -> multiprocessing.context.ForkServerContext:
    """One a test process, started when it is first wanted."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    folders = os.pathsep.join((str(PROJECT.parent), str(PROJECT.parents[1])))
    with mock.patch.dict(os.environ, PYTHONPATH=folders):  # before Python 3.13 it is not told this process's sys.path
        multiprocessing.forkserver.ensure_running()
    return context


def fit(run: Path, *flags: str, ranks: int = 1) -> Ended:
    """`lightspan fit` of the tiny recipe on `ranks` processes."""
    arguments = ["fit", *TINY, "--run", str(run), f"trainer.devices={ranks}", *flags]
    return launch([*arguments, "trainer.strategy=ddp"] if ranks > 1 else arguments, ranks, run)


def launch(
    arguments: list[str],
    ranks: int,
    folder: Path,
    timeout_s: float = HANG_S,
    environment: Mapping[str, str] = MappingProxyType({}),
    cwd: Path | None = None,
    prepare: Callable[[], None] | None = None,
) -> Ended:
    """One command line on `ranks` processes, as a launcher from outside starts them; when one is killed, all are.

    `folder` takes what they say; `cwd` is where they start, this process' folder if None; `prepare` is called in each
    of them first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    server, port, logs = _server(), free_port(), [folder / f"rank-{rank}.log" for rank in range(ranks)]
    given = dict(os.environ) | dict(environment)
    processes = [
        server.Process(target=_rank, args=(arguments, rank, ranks, port, str(log), given, cwd, prepare))
        for rank, log in enumerate(logs)
    ]
    with _turn() if ranks > 1 else contextlib.nullcontext():
        for process in processes:
            process.start()
        until_s = time.monotonic() + timeout_s
        running = list(processes)
        while running and time.monotonic() < until_s and not any((process.exitcode or 0) < 0 for process in processes):
            multiprocessing.connection.wait([process.sentinel for process in running], until_s - time.monotonic())
            running = [process for process in processes if process.is_alive()]
        in_time = time.monotonic() < until_s
        by_themselves = [process.exitcode for process in processes]
        for process in running:
            process.kill()
            process.join()
    said = "".join(log.read_text() for log in logs)
    if not in_time:
        raise TimeoutError(said)
    return Ended([process.exitcode or 0 for process in processes], said, by_themselves)


def start(function: Callable[..., None], ranks: int, *arguments: object) -> None:
    """`function(rank, *arguments)` on `ranks` processes. Raises what one of them raises, and ends the others then."""
    _server()
    given = (function, dict(os.environ), arguments)
    with _turn():
        torch.multiprocessing.start_processes(_called, given, nprocs=ranks, start_method="forkserver")


def join(rank: int, port: int, ranks: int = 2) -> None:
    """Inside a function of `start`: tells Lightning which rank this is, and where the group meets."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)


def _turn() -> FileLock:
    """Groups of ranks of the workers of pytest-xdist run one after the other: each has the cores that its time limits
    were set for.
    """
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", f"process {os.getpid()}")
    return FileLock(Path(tempfile.gettempdir(), f"lightspan ranks of {run}.lock"))


def processor_s() -> float:
    """Of all ranks and commands that have ended so far in the server's care."""
    server: int | None = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    if server is None or not Path("/proc/self/stat").exists():
        return 0.0
    after_name = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, after_name[13:15])) / os.sysconf("SC_CLK_TCK")  # fields 16 and 17 of `man proc_pid_stat`


def _called(rank: int, function: Callable[..., None], environment: dict[str, str], arguments: tuple) -> None:
    _take(environment)
    torch.set_num_threads(1)
    function(rank, *arguments)


def _take(environment: dict[str, str]) -> None:
    """The server's environment is as old as the server."""
    os.environ.clear()
    os.environ |= environment | {"OMP_NUM_THREADS": "1"}
    tempfile.tempdir = None  # what TMPDIR says may have been read before


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _rank(
    arguments: list[str],
    rank: int,
    ranks: int,
    port: int,
    log: str,
    environment: dict[str, str],
    cwd: Path | None,
    prepare: Callable[[], None] | None,
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.path.insert(0, str(PROJECT))
    _take(environment)
    if cwd is not None:
        os.chdir(cwd)
    if ranks > 1:
        join(rank, port, ranks)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as under the command itself
    from lightspan.cli.main import main

    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    status = main(arguments)
    sys.stderr.flush()
    sys.exit(status)


def callback(entry: str, class_path: str, **settings: object) -> list[str]:
    """Flags that add a callback to the recipe."""
    at = f"trainer.callbacks.{entry}"
    return [f"{at}.class_path={class_path}", *(f"{at}.init_args.{key}={value}" for key, value in settings.items())]
