"""Every study says the same of a run that has ended, and records a failure that the run could not record itself."""

import json
from pathlib import Path

import pytest

from lightspan.cli.runs.fits import Task
from lightspan.cli.runs.status import Status
from lightspan.cli.studies import queue


def test_each_run_that_ends_has_a_line_and_its_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    statuses = {"good": 0, "wrong": 1, "killed": -9, "stopped": 143}

    def run_side_by_side(tasks, workers, ended, look):
        assert workers == 2
        for task in tasks:
            task.log.parent.mkdir()
            task.log.write_text("its last words\n")
            if task.name in ("good", "stopped"):
                (task.log.parent / "summary.json").write_text(json.dumps({"finished": task.name == "good"}))
            look([task])
            ended(task, statuses[task.name])

    monkeypatch.setattr(queue, "run_side_by_side", run_side_by_side)
    tasks = (Task(name, (), tmp_path / name / "output.txt") for name in statuses)
    found = queue.run_queue(tasks, 2, 4, ended=lambda task, became: "  score 1" if became is Status.DONE else "")
    assert found == statuses
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == "done  good  score 1 (0 s)"
    assert lines[1:3] == [f"failed  wrong; {tmp_path}/wrong/output.txt ends with:", "its last words"]
    assert lines[4].startswith("unstarted  killed, killed by signal 9; ")
    assert lines[-1] == "preempted  stopped (0 s)"
    assert [path.parent.name for path in tmp_path.glob("*/failed.txt")] == ["wrong"]
