"""Which trials are due, and what is written of those that ended."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from lightspan.cli.runs.fits import Task
from lightspan.cli.runs.status import Status, status_of
from lightspan.cli.studies.queue import final_status
from lightspan.cli.studies.sweeps import ranking
from lightspan.cli.studies.sweeps.files import Sweep
from lightspan.cli.studies.sweeps.points import Choices, Range
from lightspan.cli.studies.sweeps.trials import TrialQueue

SWEEP = Sweep("recipe.yaml", ("a.b=1",), {"k": Choices((1, 2, 3))}, metric="val/loss").planned()
RUNS = [trial.run for trial in SWEEP.trials]


def finish(run: Path, finished: bool = True) -> None:
    run.mkdir(parents=True)
    (run / "summary.json").write_text(json.dumps({"finished": finished}))


def names(tasks: Sequence[Task]) -> list[str]:
    return [task.name for task in tasks]


def test_runs_that_are_not_done_are_due_and_failed_ones_on_demand(tmp_path: Path) -> None:
    finish(tmp_path / RUNS[0])
    finish(tmp_path / RUNS[1], finished=False)  # preempted
    finish(tmp_path / RUNS[2])
    (tmp_path / RUNS[2] / "failed.txt").write_text("an error\n")
    assert names([*TrialQueue(SWEEP, tmp_path, retry_failed=False).tasks()]) == [RUNS[1]]
    assert names([*TrialQueue(SWEEP, tmp_path, retry_failed=True).tasks()]) == [RUNS[1], RUNS[2]]


def test_a_task_is_the_fit_of_its_trial(tmp_path: Path) -> None:
    task = next(TrialQueue(SWEEP, tmp_path, retry_failed=False).tasks())
    assert task.command[1:] == (
        "-m",
        "lightspan",
        "fit",
        "recipe.yaml",
        "a.b=1",
        "k=1",
        "--run",
        str(tmp_path / RUNS[0]),
    )
    assert task.log == tmp_path / RUNS[0] / "output.txt"


@pytest.mark.parametrize(
    ("status", "became", "recorded"),
    [
        (2, Status.FAILED, "ended with status 2: lightspan: a \\x1b mistake\n"),
        (1, Status.FAILED, "ended with status 1: lightspan: a \\x1b mistake\n"),
        (143, Status.UNSTARTED, None),  # preempted before its first step: it is started again
        (-9, Status.UNSTARTED, None),
    ],
)
def test_a_failure_that_a_run_could_not_record_is_recorded_for_it(
    status: int, became: Status, recorded: str | None, tmp_path: Path
) -> None:
    queue = TrialQueue(SWEEP, tmp_path, retry_failed=False)
    task = next(queue.tasks())
    task.log.parent.mkdir()
    task.log.write_text("before\nlightspan: a \x1b mistake\n")
    assert final_status(task, status) is became
    mark = task.log.parent / "failed.txt"
    assert mark.exists() == (recorded is not None)
    assert recorded is None or mark.read_text().endswith(recorded)


def test_a_failure_that_the_run_recorded_stays_as_it_is(tmp_path: Path) -> None:
    queue = TrialQueue(SWEEP, tmp_path, retry_failed=False)
    task = next(queue.tasks())
    task.log.parent.mkdir()
    (task.log.parent / "failed.txt").write_text("its own words\n")
    assert final_status(task, 1) is Status.FAILED
    assert (task.log.parent / "failed.txt").read_text() == "its own words\n"
    assert status_of(task.log.parent) is Status.FAILED


def test_tpe_goes_on_past_a_run_that_never_logged_the_metric(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    sweep = Sweep("recipe.yaml", (), {"k": Range(0.0, 1.0, False)}, "tpe", "val/loss", points=3)
    sweep = replace(sweep, trials=(*sweep.of_point(0, {"k": 0.25}), *sweep.of_point(1, {"k": 0.5})))
    for trial, name in zip(sweep.trials, ("train/loss", "val/loss"), strict=True):
        finish(tmp_path / trial.run)
        (tmp_path / trial.run / "metrics.jsonl").write_text(json.dumps({"step": 0, name: 1.0}) + "\n")
    assert len([*TrialQueue(sweep, tmp_path, retry_failed=False).tasks()]) == 1


def test_tpe_reads_the_metrics_of_a_trial_once_however_many_points_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    read: list[str] = []
    for name in ("read_logged", "last_values"):
        original = getattr(ranking, name)
        monkeypatch.setattr(
            ranking,
            name,
            lambda path, *rest, original=original: (read.append(path.parent.name), original(path, *rest))[1],
        )
    sweep = Sweep("recipe.yaml", (), {"k": Range(0.0, 1.0, False)}, "tpe", "val/loss", points=6, seeds=(0, 1))
    queue = TrialQueue(sweep, tmp_path, retry_failed=False)
    for task in queue.tasks():
        finish(tmp_path / task.name)
        (tmp_path / task.name / "metrics.jsonl").write_text('{"step": 0, "val/loss": 1.0}\n')
        assert queue.ended(task, Status.DONE) == "  val/loss 1"
    assert sorted(read) == sorted(trial.run for trial in queue.sweep.trials)


def test_a_trial_that_ran_again_is_read_again(tmp_path: Path) -> None:
    queue = TrialQueue(SWEEP, tmp_path, retry_failed=True)
    finish(tmp_path / RUNS[0])
    (tmp_path / RUNS[0] / "metrics.jsonl").write_text('{"step": 0, "val/loss": 1.0}\n')
    assert queue.reached(RUNS[0]) == "  val/loss 1"
    (tmp_path / RUNS[0] / "failed.txt").write_text("an error")
    assert next(queue.tasks()).name == RUNS[0]
    (tmp_path / RUNS[0] / "metrics.jsonl").write_text('{"step": 0, "val/loss": 2.0}\n')
    assert queue.reached(RUNS[0]) == "  val/loss 2"
