"""Real processes for ranks, forked from a server that has loaded torch once, so that a test takes seconds."""

import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch.multiprocessing

PROJECT = Path(__file__).parent / "tiny_project"
TINY = [
    str(PROJECT / "tiny.yaml"),
    *("--allow-module", "tiny_lab", "data.class_path=tiny_lab.faults.ExactRows"),
    *("trainer.limit_val_batches=0", "trainer.max_steps=12"),
]
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    ["torch", "lightning.pytorch", "lightning.pytorch.cli", "transformers.models.llama.modeling_llama"]
)


@dataclass(frozen=True)
class Ended:
    """How the ranks ended: exit statuses (negative: a signal) and everything they said, in the order of ranks."""

    statuses: list[int]
    said: str


def fit(run: Path, *flags: str, ranks: int = 1) -> Ended:
    """`lightspan fit` of the tiny recipe on `ranks` processes."""
    arguments = ["fit", *TINY, "--run", str(run), f"trainer.devices={ranks}", *flags]
    return launch([*arguments, "trainer.strategy=ddp"] if ranks > 1 else arguments, ranks, run)


def launch(
    arguments: list[str],
    ranks: int,
    folder: Path,
    timeout_s: float = 60.0,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Ended:
    """One command line on `ranks` processes, as a launcher from outside starts them; when one is killed, all are."""
    folder.mkdir(parents=True, exist_ok=True)
    port, logs = free_port(), [folder / f"rank-{rank}.log" for rank in range(ranks)]
    processes = [
        _server.Process(target=_rank, args=(arguments, rank, ranks, port, str(log), dict(environment)))
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    until_s = time.monotonic() + timeout_s
    running = list(processes)
    while running and time.monotonic() < until_s and not any((process.exitcode or 0) < 0 for process in processes):
        multiprocessing.connection.wait([process.sentinel for process in running], until_s - time.monotonic())
        running = [process for process in processes if process.is_alive()]
    in_time = time.monotonic() < until_s
    for process in running:
        process.kill()
        process.join()
    said = "".join(log.read_text() for log in logs)
    assert in_time, said
    return Ended([process.exitcode or 0 for process in processes], said)


def start(function: Callable[..., None], ranks: int, *arguments: object) -> None:
    """`function(rank, *arguments)` on `ranks` processes. Raises what one of them raises, and ends the others then."""
    torch.multiprocessing.start_processes(function, arguments, nprocs=ranks, start_method="forkserver")


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _rank(arguments: list[str], rank: int, ranks: int, port: int, log: str, environment: dict[str, str]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.path.insert(0, str(PROJECT))
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"OMP_NUM_THREADS": "1"} | environment
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as under the command itself
    import torch

    from lightspan.cli import main

    torch.set_num_threads(1)
    status = main(arguments)
    sys.stderr.flush()
    sys.exit(status)


def callback(entry: str, class_path: str, **settings: object) -> list[str]:
    """Flags that add a callback to the recipe."""
    at = f"trainer.callbacks.{entry}"
    return [f"{at}.class_path={class_path}", *(f"{at}.init_args.{key}={value}" for key, value in settings.items())]
