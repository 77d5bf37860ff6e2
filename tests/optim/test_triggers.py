"""When frames are chosen anew: by the clock, spread over matrices or all at once."""

import pytest

from lightspan.core.errors import UserError
from lightspan.optim.low_rank.bases import Every


def test_by_the_clock_every_matrix_is_due_once_in_the_gap_and_not_all_at_once():
    trigger, phases = Every(5), [i / 10 for i in range(10)]
    due = [trigger.due(range(10), [step] * 10, phases) for step in range(1, 21)]
    assert all(len(d) == 2 for d in due[4:])
    assert sorted(i for d in due[4:9] for i in d) == list(range(10))


def test_without_turns_all_frames_change_in_the_same_step():
    trigger, phases = Every(5, staggered=False), [i / 10 for i in range(10)]
    asked = {step: trigger.due(range(10), [step] * 10, phases) for step in range(1, 11)}
    assert asked == {step: list(range(10)) if step % 5 == 0 else [] for step in range(1, 11)}


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match="refresh=0 must be at least 1 step"):
        Every(0)
