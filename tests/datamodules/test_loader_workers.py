"""Data workers: they end with the process they work for, and their death is told in one sentence."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from lightspan.datamodules.loader import ExactLoader
from lightspan.errors import UserError

LEAVES = """
import torch
from lightspan.datamodules.loader import ExactLoader

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


def test_the_interpreter_leaves_although_an_iterator_is_still_held() -> None:
    """Workers that are not killed keep it for ever: they do not obey SIGTERM."""
    left = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True, timeout=60)
    assert (left.returncode, left.stdout, left.stderr) == (0, "2\n", "")


def test_a_worker_that_dies_is_an_error_of_one_sentence_that_names_the_likely_cause() -> None:
    loader = ExactLoader(Deadly(37), 4, num_workers=1)
    with pytest.raises(UserError, match=r"reads data died: .*Most often memory ran out: .* Lower num_workers"):
        list(loader)


def test_so_is_one_that_dies_while_the_process_does_something_else() -> None:
    loader = ExactLoader(Deadly(-1), 4, num_workers=1)
    batches = iter(loader)
    next(batches)
    worker = multiprocessing.active_children()[0]
    assert worker.pid is not None
    with pytest.raises(UserError, match=r"is killed by signal: Killed.*Most often memory ran out"):
        os.kill(worker.pid, signal.SIGKILL)
        time.sleep(30)


def test_an_error_of_the_data_is_still_itself() -> None:
    class Wrong(Deadly):
        def sample(self, index: int, seed: int) -> torch.Tensor:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        list(ExactLoader(Wrong(-1), 4, num_workers=1))
