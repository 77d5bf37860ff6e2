"""Fetches samples from a dataset into batches, in this process or in workers, without reordering them."""

import multiprocessing.connection
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol, runtime_checkable
from weakref import WeakSet, finalize

import numpy as np
import torch
from torch.utils.data import DataLoader

from lightspan.core.batches import batch_type_of, require_declared
from lightspan.core.collate import collated
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in

Key = tuple[int, int]  # (index, seed) of one sample
DYING_S = 1.0  # a process may take this long to end after it broke its connection
WORKERS = "[0, 1024]"  # processes of one rank, each of which takes memory
MAX_DAMAGED = 100  # draws for one place in a batch until the data count as unreadable


class Dataset(Protocol):
    """Samples by number. `sample` must be a pure function of its arguments: this makes runs repeatable.

    `seed`, in [0, 2**63), is all the randomness a sample may use (augmentation, masking). A dataset that declares the
    type of its batches as `batch_type` (`lightspan.core.batches`) has them collated and checked by it.
    """

    def __len__(self) -> int: ...

    def sample(self, index: int, seed: int) -> Mapping[str, Any]: ...


@runtime_checkable
class BatchDataset(Dataset, Protocol):
    """A dataset that makes a whole batch faster than one sample after another. It raises no `Damaged`.

    `batch` has row by row what `sample` gives for each pair of an index and a seed, bit by bit.
    """

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> dict[str, Any]: ...


class Damaged(Exception):
    """Raised by `Dataset.sample` for a sample that cannot be read and that the user allows to be replaced."""


class Replacement(NamedTuple):
    """The index of a damaged sample, that of the one that replaced it, and what is wrong with the first."""

    damaged: int
    by: int
    reason: str


class _Fetched(NamedTuple):
    """A sample or batch returned by a worker. DataLoader would wrap a user's error in a traceback."""

    data: Any
    replaced: tuple[Replacement, ...] = ()
    error: str | None = None
    whole: bool = False  # whether data are already those of a batch


class _Samples:
    """What a DataLoader worker indexes: the order is decided in the main process, so workers hold no state."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: Key) -> _Fetched:
        index, seed = key
        reason = ""
        for attempt in range(MAX_DAMAGED):
            # A damaged sample is replaced by another, drawn from its seed alone: the same on any number of ranks.
            chosen = index if attempt == 0 else _drawn(seed, attempt, len(self.dataset))
            try:
                sample = self.dataset.sample(chosen, seed)
            except Damaged as error:
                reason = reason or str(error)
            except UserError as error:
                return _Fetched(None, error=str(error))
            else:
                return _Fetched(sample, (Replacement(index, chosen, reason),) if attempt else ())
        return _Fetched(None, error=f"{MAX_DAMAGED} samples drawn one after another are damaged, the first: {reason}")

    def __getitems__(self, keys: list[Key]) -> list[_Fetched]:
        """What a fetcher of torch asks for in place of one sample after another."""
        if not isinstance(self.dataset, BatchDataset):
            fetched: list[_Fetched] = []
            for key in keys:  # an error stops the run, and may have taken minutes: the others are not tried
                fetched.append(fetched[-1] if fetched and fetched[-1].error is not None else self[key])
            return fetched
        try:
            return [_Fetched(self.dataset.batch(*zip(*keys, strict=True)), whole=True)]
        except UserError as error:
            return [_Fetched(None, error=str(error))]


def _drawn(seed: int, attempt: int, length: int) -> int:
    return int(np.random.SeedSequence([seed, attempt]).generate_state(1, np.uint64)[0] % length)


class _Keys:
    """The keys of the coming batches, as DataLoader wants them."""

    def __init__(self) -> None:
        self.batches: Iterator[list[Key]] = iter(())

    def __iter__(self) -> Iterator[list[Key]]:
        return self

    def __next__(self) -> list[Key]:
        return next(self.batches)


def _collate(batch_type: type | None, owner: str, samples: list[_Fetched]) -> _Fetched:
    """A batch of samples: the one place where batches are made, and held to their type."""
    failed = next((sample for sample in samples if sample.error is not None), None)
    if failed is not None:
        return failed
    try:
        batch = samples[0].data if samples[0].whole else collated([sample.data for sample in samples], batch_type)
        if batch_type is not None:
            require_declared(batch, batch_type, owner)
    except UserError as error:
        return _Fetched(None, error=str(error))
    return _Fetched(batch, tuple(replacement for sample in samples for replacement in sample.replaced))


_workers: WeakSet[BaseProcess] = WeakSet()
_ends_workers_in = 0  # pid


def _end_at_exit(workers: Sequence[BaseProcess]) -> None:
    """multiprocessing ends remaining processes by SIGTERM and waits for them, but these workers ignore SIGTERM. Its own
    finalisers run in each process: ranks that it started itself never reach `atexit`.
    """
    global _ends_workers_in
    if _ends_workers_in != os.getpid():
        _workers.clear()  # those of a fork belong to its parent
        multiprocessing.util.Finalize(None, _end_workers, exitpriority=100)
        _ends_workers_in = os.getpid()
    _workers.update(workers)


def _end_workers() -> None:
    if _workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # nothing should react to these deaths
    for worker in _workers:
        worker.kill()


class _Stream:
    """A DataLoader's iterator, whose workers leave when this is collected.

    The iterator alone does not see to it. Where it is left in the middle of an epoch it is often part of a cycle, such
    as that of a Trainer and its loops. The garbage collector then closes its queues before it calls its `__del__`, so
    that the message to leave reaches no worker, and torch waits 10 s for each of them.
    """

    def __init__(self, batches: Iterator[_Fetched]) -> None:
        self.batches = batches
        self.workers: Sequence[BaseProcess] = getattr(batches, "_workers", ())  # none where this process fetches
        if self.workers:
            _end_at_exit(self.workers)
            finalize(self, _dismiss, batches, os.getpid()).atexit = False  # killing them then is faster


def _dismiss(batches: Any, owner: int) -> None:
    if os.getpid() == owner:  # a fork collects copies
        batches._shutdown_workers()


def _outlive_warnings(worker: int) -> None:
    """A scheduler warns every process of a job; a worker that died of it would spoil the last step."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _dead(how: str) -> UserError:
    return UserError(
        f"a process that reads data died: {how}. Most often, memory ran out: each of data.init_args.num_workers "
        "processes has its own batches. Lower num_workers or batch_size, or give the job more memory (in a "
        "container, after a bus error: more shared memory)"
    )


def _refuse_dead(workers: Sequence[BaseProcess], error: Exception) -> None:
    """Raises: UserError if a worker died, which shows as various broken connections where this process waits for it."""
    dying = multiprocessing.connection.wait([worker.sentinel for worker in workers], DYING_S)
    for worker in workers:
        if worker.sentinel in dying:
            worker.join()  # SIGCHLD has arrived by then, and cannot strike later
            raise _dead(f"pid {worker.pid}, exit status {worker.exitcode}") from error


def _explain_deaths() -> None:
    """torch notices the death of a worker by SIGCHLD, and raises wherever the main thread is at that moment."""
    torchs = signal.getsignal(signal.SIGCHLD)
    outside = threading.current_thread() is not threading.main_thread()
    if outside or not callable(torchs) or getattr(torchs, "explains", False):
        return

    def handle(number: int, frame: Any) -> None:
        try:
            torchs(number, frame)
        except RuntimeError as error:
            raise _dead(str(error).strip(" .")) from error

    handle.explains = True  # type: ignore[attr-defined]
    signal.signal(signal.SIGCHLD, handle)


class Fetcher:
    """Fetches the samples of batches, in the order in which they are requested.

    Args:
        dataset: the samples.
        num_workers: processes that fetch; 0 fetches in this process.
        pin_memory: fetch into page-locked memory.
        keeps_workers: whether workers stay for the next `fetch`, instead of being forked again. They keep their memory
            meanwhile, and only one `fetch` can run at a time.
    Raises: UserError for a negative number of processes.
    """

    def __init__(self, dataset: Dataset, num_workers: int, pin_memory: bool, keeps_workers: bool = False) -> None:
        require_in(WORKERS, num_workers=num_workers)
        self._keys = _Keys()
        self._kept: _Stream | None = None
        self._loader: DataLoader[Any] = DataLoader(
            _Samples(dataset),  # type: ignore[arg-type]
            batch_sampler=self._keys,
            num_workers=num_workers,
            collate_fn=partial(_collate, batch_type_of(dataset), type(dataset).__name__),
            pin_memory=pin_memory,
            generator=torch.Generator(),  # DataLoader would draw from the global generator otherwise
            worker_init_fn=_outlive_warnings,
            persistent_workers=keeps_workers and num_workers > 0,
        )

    def fetch(self, batches: Iterator[list[Key]]) -> Iterator[tuple[Any, tuple[Replacement, ...]]]:
        """(batch, which of its samples replace damaged ones), for each list of keys.

        Raises: UserError that the data raise, and for a worker that dies.
        """
        self._keys.batches = batches
        stream = self._open()
        if stream.workers:
            _explain_deaths()
        try:
            while True:
                try:
                    fetched = next(stream.batches, None)
                except Exception as error:
                    _refuse_dead(stream.workers, error)
                    raise
                if fetched is None:
                    return
                if fetched.error is not None:
                    raise UserError(fetched.error)
                yield fetched.data, fetched.replaced
        finally:
            self._keys.batches = iter(())  # these hold the loader, which holds this

    def _open(self) -> _Stream:
        batches = iter(self._loader)
        if self._kept is not None and self._kept.batches is batches:
            return self._kept
        stream = _Stream(batches)
        if self._loader.persistent_workers:
            self._kept = stream
        return stream
