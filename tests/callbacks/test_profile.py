"""A profile holds the steps that were asked for, leaves training as it is, and leaves nothing half written."""

import gzip
import json

import pytest
import torch

from lightspan.callbacks.watching.profile import Profile
from lightspan.core.errors import UserError


def fit(make_trainer, module, batches, *callbacks, steps=4, **options):
    make_trainer(max_steps=steps, callbacks=list(callbacks), **options).fit(module, batches(steps))


def test_the_trace_holds_the_steps_asked_for_and_the_table_their_operators(make_trainer, net, batches, tmp_path):
    fit(make_trainer, net(), batches, Profile(str(tmp_path / "profile"), 1, 3))
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {
        "trace-rank-0.json.gz", "operators-rank-0.txt"
    }  # fmt: skip
    with gzip.open(tmp_path / "profile/trace-rank-0.json.gz") as file:
        events = json.load(file)["traceEvents"]
    steps = [event for event in events if str(event.get("name", "")).startswith("Optimizer.step#")]
    assert len(steps) == 2
    assert "aten::addmm" in (tmp_path / "profile/operators-rank-0.txt").read_text()


def test_training_is_the_same_with_and_without_it(make_trainer, net, batches, tmp_path):
    ends = []
    for watching in ([], [Profile(str(tmp_path), 1, 2)]):
        module = net()
        torch.manual_seed(2)
        fit(make_trainer, module, batches, *watching)
        ends.append([p.detach().clone() for p in module.parameters()])
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("first", [2, 9])
def test_a_run_that_ends_early_keeps_what_it_recorded_or_says_that_it_recorded_none(
    make_trainer, net, batches, tmp_path, capsys, first
):
    fit(make_trainer, net(), batches, Profile(str(tmp_path), first, 12))
    assert (tmp_path / "trace-rank-0.json.gz").exists() == (first == 2)
    assert ("no profile: this run took 4 steps" in capsys.readouterr().out) == (first == 9)


@pytest.mark.parametrize(("first", "last"), [(3, 3), (-1, 2), (4, 1)])
def test_steps_out_of_order_are_refused(first, last):
    with pytest.raises(UserError, match="must be A:B with 0 <= A < B"):
        Profile("folder", first, last)
