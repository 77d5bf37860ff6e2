"""Processes side by side: their order, their share of the machine, and that none is left behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import HANG_S, wait_until

from lightspan.cli.launch.parent import PARENT_VARIABLE
from lightspan.cli.runs import fits
from lightspan.cli.runs.fits import Task, end_in_order, run_side_by_side, start


def task(log: Path, code: str) -> Task:
    """Python that prints `hello` and then runs some code."""
    return Task(
        log.name, (sys.executable, "-S", "-c", f"import os, signal, sys, time; print('hello', flush=True); {code}"), log
    )


def test_runs_end_side_by_side_with_their_status_and_log(tmp_path: Path) -> None:
    statuses: dict[str, int] = {}
    tasks = [task(tmp_path / "a" / "log.a", "sys.exit(0)"), task(tmp_path / "b" / "log.b", "sys.exit(3)")]
    tasks.append(task(tmp_path / "log.c", "os.kill(os.getpid(), signal.SIGKILL)"))
    run_side_by_side(iter(tasks), 3, lambda task, status: statuses.update({task.name: status}))
    assert statuses == {"log.a": 0, "log.b": 3, "log.c": -9}
    assert (tmp_path / "a" / "log.a").read_text() == "hello\n"


def test_the_next_run_is_chosen_when_a_worker_is_free_and_knows_what_ended(tmp_path: Path) -> None:
    said: list[str] = []

    def chosen() -> Iterator[Task]:
        for number in range(3):
            said.append(f"start {number}")
            yield task(tmp_path / str(number), "sys.exit(0)")

    run_side_by_side(chosen(), 1, lambda task, status: said.append(f"end {task.name}"))
    assert said == ["start 0", "end 0", "start 1", "end 1", "start 2", "end 2"]


def test_those_that_run_are_looked_at(tmp_path: Path) -> None:
    seen: list[list[str]] = []
    sleepers = [task(tmp_path / name, "time.sleep(0.5)") for name in "ab"]
    run_side_by_side(iter(sleepers), 2, lambda *_: None, lambda running: seen.append([one.name for one in running]))
    assert ["a", "b"] in seen


def test_an_interruption_leaves_no_run_behind(tmp_path: Path) -> None:
    def interrupt(task: Task, status: int) -> None:
        raise KeyboardInterrupt

    sleeps = task(tmp_path / "b", f"time.sleep({HANG_S}); print('slept')")
    with pytest.raises(KeyboardInterrupt):
        run_side_by_side(iter([task(tmp_path / "a", ""), sleeps]), 2, interrupt)
    assert "slept" not in (tmp_path / "b").read_text()


@pytest.mark.parametrize(("obeys", "left"), [(True, "left in order"), (False, "hello")])
def test_runs_may_leave_in_order_and_are_killed_when_they_do_not(obeys: bool, left: str, tmp_path: Path) -> None:
    leave = "lambda *_: (print('left in order', flush=True), sys.exit(143))" if obeys else "signal.SIG_IGN"
    stubborn = task(
        tmp_path / "log", f"signal.signal(signal.SIGTERM, {leave}); print('ready', flush=True); time.sleep({HANG_S})"
    )
    process = start(stubborn.command, stubborn.log)
    wait_until(lambda: "ready" in stubborn.log.read_text(), "the run")
    end_in_order([process], grace_s=HANG_S if obeys else 0.2)
    assert process.returncode == (143 if obeys else -signal.SIGKILL)
    assert left in stubborn.log.read_text()


def test_workers_share_the_cores_and_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(fits, "_cores", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    assert fits._share(0, 1) == {"OMP_NUM_THREADS": "8"}
    shares = [fits._share(worker, 2) for worker in range(2)]
    assert shares == [{"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": devices} for devices in ("2,5", "3,7")]
    assert [fits._share(worker, 16) for worker in (0, 5)] == [
        {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "2"},
        {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "3"},
    ]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert fits._share(0, 2) == {}


def test_a_command_whose_parent_has_gone_stops_before_it_begins(tmp_path: Path) -> None:
    code = "from lightspan.cli.launch.parent import end_with_launcher; end_with_launcher(); print('began')"
    for parent, began in ((os.getpid(), True), (1, False)):
        environment = {**os.environ, PARENT_VARIABLE: str(parent)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert (done.stdout == "began\n") is began
        assert done.returncode == (0 if began else -signal.SIGTERM)
