"""Data workers: they end with the process they work for, and their death is reported in one sentence."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from typing import ClassVar

import pytest
import torch
from waiting import HANG_S

from lightspan.core.errors import UserError
from lightspan.datamodules.loading.loader import EvaluationLoader, ExactLoader
from lightspan.datamodules.loading.workers import Fetcher

LEAVES = """
import torch
from lightspan.datamodules.loading.loader import EvaluationLoader, ExactLoader

class Numbers:
    def __len__(self): return 64
    def sample(self, index, seed): return torch.tensor(index)

batches = iter(ExactLoader(Numbers(), 2, num_workers=2))
print(len(next(batches)))
"""


class Deadly:
    """The worker that reads sample `number` dies of it."""

    def __init__(self, number: int) -> None:
        self.number, self.parent = number, os.getpid()

    def __len__(self) -> int:
        return 64

    def sample(self, index: int, seed: int) -> torch.Tensor:
        if index == self.number and os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor(index)


@pytest.mark.runs
def test_the_interpreter_leaves_although_an_iterator_is_still_held() -> None:
    """Workers that are not killed keep it for ever: they do not obey SIGTERM."""
    # On a single core torch warns of more workers than cores.
    left = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LEAVES], capture_output=True, text=True, timeout=HANG_S
    )
    assert (left.returncode, left.stdout, left.stderr) == (0, "2\n", "")


def test_a_worker_that_dies_is_an_error_of_one_sentence_that_names_the_likely_cause() -> None:
    loader = ExactLoader(Deadly(37), 4, num_workers=1)
    with pytest.raises(
        UserError,
        match=r"reads data died: .*(exit status -9|Killed)\. Most often, memory ran out: .* Lower num_workers",
    ):
        list(loader)


def test_so_is_one_that_dies_while_the_process_does_something_else() -> None:
    others = set(multiprocessing.active_children())
    batches = iter(ExactLoader(Deadly(-1), 4, num_workers=1))
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others

    def computes() -> None:
        worker.kill()
        time.sleep(HANG_S)

    with pytest.raises(UserError, match=r"is killed by signal: Killed\. Most often, memory ran out"):
        computes()


def test_an_error_of_the_data_is_still_itself() -> None:
    class Wrong(Deadly):
        def sample(self, index: int, seed: int) -> torch.Tensor:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        list(ExactLoader(Wrong(-1), 4, num_workers=1))


def test_what_follows_an_error_in_its_batch_is_not_tried() -> None:
    """Each may take as long to fail as the first, such as four attempts at a server that is gone."""

    class Unreachable:
        tried: ClassVar[list[int]] = []

        def __len__(self) -> int:
            return 64

        def sample(self, index: int, seed: int) -> torch.Tensor:
            self.tried.append(index)
            raise UserError(f"sample {index} cannot be fetched")

    with pytest.raises(UserError, match="sample 0 cannot be fetched"):
        next(iter(EvaluationLoader(Unreachable(), 8)))
    assert Unreachable.tried == [0]


def test_workers_stay_for_the_next_epoch_also_after_one_that_was_left_half_way() -> None:
    others = set(multiprocessing.active_children())
    straight, loader = ExactLoader(Deadly(-1), 4), ExactLoader(Deadly(-1), 4, num_workers=2)
    half = [batch for batch, _ in zip(loader, range(5), strict=False)]
    workers = set(multiprocessing.active_children()) - others
    position = loader.consumed
    loader.consumed = 0
    epochs = [batch for _ in range(2) for batch in loader]
    assert set(multiprocessing.active_children()) - others == workers
    expected = [batch for _ in range(2) for batch in straight]
    assert position in (20, 24)  # `zip` may have asked for one more
    assert all(map(torch.equal, half, expected[:5]))
    assert len(epochs) == 32
    assert all(map(torch.equal, epochs, expected))


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", [ExactLoader, EvaluationLoader])
def test_workers_leave_at_once_with_a_loader_that_was_left_half_way_in_a_cycle(
    kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a run that ends in the middle of an epoch: the Trainer holds the loader and its iterator in a cycle."""
    # How long torch waits for workers that do not leave by themselves, before it ends them by a signal.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", HANG_S)
    others = set(multiprocessing.active_children())
    cycle: list[object] = [kind(Deadly(-1), 4, num_workers=2)]
    cycle += [iter(cycle[0]), cycle]  # type: ignore[call-overload]
    next(cycle[1])  # type: ignore[call-overload]
    workers = set(multiprocessing.active_children()) - others
    assert len(workers) == 2
    del cycle
    while gc.collect() and workers & set(multiprocessing.active_children()):
        pass
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_a_negative_number_of_workers_is_refused() -> None:
    for wrong in (-1, 10**6):
        with pytest.raises(UserError, match=f"num_workers={wrong}"):
            Fetcher([0], num_workers=wrong, pin_memory=False)  # type: ignore[arg-type]
