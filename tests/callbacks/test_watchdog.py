"""Ranks that stop for good: who is named, with which stack, and how the processes end."""

import json
import math
import time

import pytest
import rank_processes
from rank_processes import callback

from lightspan.callbacks.resilience.watchdog import HUNG, Watchdog, _heartbeat_path, _Peers
from lightspan.core.errors import UserError

pytestmark = pytest.mark.ranks


def watchdog(timeout_s: float) -> list[str]:
    return [f"trainer.callbacks.watchdog.init_args.{key}" for key in (f"timeout_s={timeout_s}", "every_s=0.2")]


def test_the_rank_that_hangs_is_named_with_its_stack_while_the_other_sits_in_a_collective(tmp_path):
    hang = callback("hang", "tiny_lab.faults.HangAt", step=3, rank=1)
    ended = rank_processes.fit(tmp_path, *watchdog(8), *hang, ranks=2)
    assert ended.statuses == [HUNG, HUNG], ended.said
    assert HUNG == 124
    assert ended.said.count("lightspan: rank 1 hangs at stuck_on_purpose (faults.py:") == 1, ended.said
    assert "s after the loss; the others wait for it; stacks in" in ended.said
    stacks = [(tmp_path / "stacks" / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert "stuck_on_purpose" in stacks[1]
    assert "backward" in stacks[0]
    assert "stuck_on_purpose" not in stacks[0]


def test_a_rank_that_holds_its_interpreter_shows_its_stack_all_the_same(tmp_path):
    hang = callback("hang", "tiny_lab.faults.HangAt", step=2, holds_interpreter="true")
    ended = rank_processes.fit(tmp_path, *watchdog(6), *hang)
    assert ended.statuses == [1], ended.said
    assert "stuck_on_purpose" in (tmp_path / "stacks" / "rank-0.txt").read_text()


def test_a_run_that_moves_is_left_alone_and_nothing_of_the_watch_is_left(tmp_path):
    ended = rank_processes.fit(tmp_path, *watchdog(600))
    assert ended.statuses == [0], ended.said
    assert not (tmp_path / "stacks").exists()
    assert not (tmp_path / "heartbeats").exists()


def tell(folder, rank, **changes) -> None:
    """A rank's heartbeat, as its thread would write it."""
    values = {"rank": rank, "beats": 5, "step": 1, "after": "the loss", "idle_s": 0.0, "at": "f (x.py:1)"}
    values |= {"waits": False, "turn": 1, "gave_up": False, "told": False} | changes
    path = _heartbeat_path(folder, rank)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values))


def test_one_rank_reads_all_and_the_others_read_that_one(tmp_path):
    ranks = [_Peers(tmp_path, rank, 4) for rank in range(4)]
    tell(tmp_path, 3, idle_s=99.0)
    assert [rank.stand_still(10) for rank in ranks] == [True, False, False, False]
    tell(tmp_path, 0, gave_up=True)
    assert [rank.stand_still(10) for rank in ranks] == [True] * 4
    assert [rank.choose_speaker(10) for rank in ranks] == [True, False, False, False]
    assert not ranks[2].were_told()
    tell(tmp_path, 0, gave_up=True, told=True, turn=2)
    ranks[2].read()
    assert ranks[2].were_told()


def test_rank_1_speaks_where_rank_0_is_the_silent_one(tmp_path, monkeypatch):
    ranks = [_Peers(tmp_path, rank, 3) for rank in range(3)]
    now_s = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s + 11)
    assert [rank.stand_still(10) for rank in ranks[1:]] == [True, True]
    assert [rank.choose_speaker(10) for rank in ranks[1:]] == [True, False]
    for rank in (1, 2):
        tell(tmp_path, rank, gave_up=True)
    ranks[1].read()
    assert ranks[1].account(10) == "rank 0 has been silent for 11 s"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timeout_s": 0}, "timeout_s=0 must be above 0 and at most 2592000 seconds"),
        ({"timeout_s": math.inf}, "timeout_s=inf must be above 0 and at most 2592000 seconds"),
        ({"timeout_s": 1e20}, "must be above 0 and at most 2592000 seconds"),
        ({"timeout_s": 5, "every_s": 5}, "every_s=5 must be above 0 and below timeout_s=5"),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Watchdog(**arguments)
