"""The queue of embeddings: order, fullness, odd sizes, and ranks."""

from pathlib import Path

import pytest
import rank_processes
import torch
import torch.distributed as dist

from lightspan.core.distributed import end_process_group
from lightspan.core.errors import UserError
from lightspan.nn.teachers.feature_queue import FeatureQueue


def test_the_last_rows_stay_the_newest_last() -> None:
    queue = FeatureQueue(4, 1)
    for start, full in ((0.0, False), (3.0, True), (6.0, True)):
        queue.push(torch.arange(start, start + 3)[:, None])
        assert queue.full == full
    assert queue.rows_LD[:, 0].tolist() == [5, 6, 7, 8]
    queue.push(torch.arange(9.0, 19)[:, None])  # more than it holds
    assert queue.rows_LD[:, 0].tolist() == [15, 16, 17, 18]
    queue.push(torch.zeros(0, 1))
    assert queue.rows_LD[:, 0].tolist() == [15, 16, 17, 18]


def test_rows_have_no_gradient_keep_float32_and_are_part_of_the_state() -> None:
    queue, other = FeatureQueue(2, 3), FeatureQueue(2, 3)
    queue.push(torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True))
    assert queue.rows_LD.dtype == torch.float32
    assert not queue.rows_LD.requires_grad
    other.load_state_dict(queue.state_dict())
    assert other.full
    assert torch.equal(other.rows_LD, queue.rows_LD)
    with pytest.raises(UserError, match="length=0 must"):
        FeatureQueue(0, 3)


def test_micro_batches_of_a_step_enter_together_after_it_and_those_of_a_skipped_one_never() -> None:
    queue = FeatureQueue(4, 1)
    queue.follow()
    for step, row in ((0, 1.0), (1, 2.0), (1, 3.0)):  # the first step was not taken
        queue.see(torch.full((1, 1), row, requires_grad=True), step)
        assert not queue.rows_LD.any()
    for _ in range(2):  # the second call has nothing left to take in
        queue.follow()
        assert queue.rows_LD[:, 0].tolist() == [0, 0, 2, 3]


def one_rank(index: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2)
    queue = FeatureQueue(4, 1)
    queue.push(torch.arange(5.0)[:, None][(slice(0, 2), slice(2, 5))[index]])
    torch.save(queue.state_dict(), Path(folder, f"{index}.pt"))
    end_process_group()


@pytest.mark.ranks
def test_ranks_hold_the_rows_of_all(tmp_path: Path) -> None:
    rank_processes.start(one_rank, 2, str(tmp_path))
    for index in range(2):
        state = torch.load(tmp_path / f"{index}.pt", weights_only=True)
        assert state["rows_LD"][:, 0].tolist() == [1, 2, 3, 4]
        assert int(state["filled"]) == 5
