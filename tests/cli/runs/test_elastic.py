"""The launcher that goes on without lost ranks: which are lost, how many go on, on which GPUs, and when it gives up."""

import json
from collections.abc import Mapping, Sequence

import pytest
import torch
from rank_processes import PROJECT, TINY

from lightspan.cli.runs.elastic import keep_running, lost_ranks, main
from lightspan.core.files.runs import TRACE


class Starts:
    """Plays the statuses of one start after the other, and keeps what it was asked for."""

    def __init__(self, *statuses: Sequence[int | None]) -> None:
        self.statuses, self.asked = list(statuses), list[tuple[int, Mapping[str, str]]]()

    def __call__(self, ranks: int, variables: Mapping[str, str]) -> Sequence[int | None]:
        self.asked.append((ranks, variables))
        return self.statuses.pop(0)


@pytest.mark.parametrize(
    ("statuses", "lost"),
    [
        ([None, -9, None], (1,)),
        ([1, -9, 1], (1,)),  # the others failed because of it
        ([-9, -7, None], (0, 1)),
        ([None, None, 1], (2,)),
        ([1, None, 1], ()),  # nobody knows which was the first
        ([124, None, None], ()),  # the watchdog ends all ranks, not only the one that hangs
        ([0, 0, 0], ()),
    ],
)
def test_who_is_lost_is_who_was_killed_or_failed_alone(statuses, lost):
    assert lost_ranks(statuses) == lost


def test_a_run_goes_on_on_as_many_ranks_as_its_batch_can_be_shared_by_and_others_wait():
    starts, said = Starts([None] * 7 + [-9], [-9, None, None, None], [0] * 4), []
    ended = keep_running(starts, [8, 4, 2, 1], lose=2, say=said.append)
    assert ended.status == 0
    assert [ranks for ranks, _ in starts.asked] == [8, 4, 4]  # of seven and of six that are left
    assert said == [
        "rank 7 of 8 is lost; the run continues from its last checkpoint on 4",
        "rank 0 of 4 is lost; the run continues from its last checkpoint on 4",
    ]


@pytest.mark.parametrize(
    ("given", "seen"), [("4,5,6,7", ["4,6,7", "6,7"]), ("", [None, None]), ("GPU-a,GPU-b,GPU-c,GPU-d", None)]
)
def test_the_gpu_of_a_lost_rank_is_shown_to_none_of_the_next(monkeypatch, given, seen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    starts = Starts([None, -9, None, None], [1, None, None], [0, 0])
    keep_running(starts, [4, 3, 2, 1], lose=2)
    shown = [variables.get("CUDA_VISIBLE_DEVICES") for _, variables in starts.asked]
    assert shown == [None, *(seen or ["GPU-a,GPU-c,GPU-d", "GPU-c,GPU-d"])]


@pytest.mark.parametrize(
    ("statuses", "lose", "status", "reason"),
    [
        ([[None, -9]], 0, 137, "more than 0 of its ranks are lost"),
        ([[None, -9, None], [-9, None]], 1, 137, "more than 1 of its ranks are lost"),
        ([[2, None, None]], 2, 2, ""),  # a mistake of the user: the next start would meet it again
        ([[1, 1, 1]] * 4, 2, 1, "it has failed 4 times on all of its ranks"),
        ([[124, 124, 124], [0, 0, 0]], 2, 0, ""),
    ],
)
def test_when_it_gives_up(statuses, lose, status, reason):
    starts = Starts(*statuses)
    ended = keep_running(starts, list(range(len(statuses[0]), 0, -1)), lose)
    assert (ended.status, ended.reason) == (status, reason)
    assert not starts.statuses


def test_a_batch_that_no_smaller_number_of_ranks_can_share_ends_the_run():
    ended = keep_running(Starts([None, -9, None]), [3], lose=2)
    assert "cannot be shared among the 2 ranks that are left" in ended.reason


@pytest.mark.runs
def test_the_command_itself_loses_a_rank_and_goes_on_alone(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = tmp_path / "run"
    kill = ["class_path=tiny_lab.faults.SignalAt", "init_args.step=6", "init_args.name=SIGKILL", "init_args.rank=1"]
    flags = [f"trainer.callbacks.kill.{part}" for part in kill]
    trace = ["class_path=lightspan.callbacks.resilience.proof.Trace", f"init_args.folder={run / TRACE}"]
    flags += [f"trainer.callbacks.trace.{part}" for part in trace]
    often = "trainer.callbacks.checkpoint.init_args.every_n_train_steps=4"
    fit = ["fit", *TINY, "--run", str(run), "--elastic", "trainer.strategy=ddp", "trainer.devices=7", often, *flags]
    assert main(["--ranks=2,1", "--lose=1", "--", *fit]) == 0
    assert "rank 1 of 2 is lost; the run continues from its last checkpoint on 1" in capfd.readouterr().err
    batches = [json.loads(line)["batch"] for line in (run / TRACE / "rank-0.jsonl").read_text().splitlines()]
    assert batches[-8:] == list(range(4, 12))
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 12
