"""What became of a run: told from its folder, whoever wrote it and however it ended."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightspan.cli.runs.status import SILENT_S, Status, status_of

NOW = 2e9


def holder(host: str = "elsewhere") -> str:
    return f"process 1 on {host}\n"


def make(tmp_path: Path, *, lock: str | None = None, beat_s: float | None = None, **files: str) -> Path:
    """A run folder with these files (`_` in a name stands for `.`), a heartbeat of that age, and the text of a lock."""
    run = tmp_path / "run"
    run.mkdir()
    for name, text in files.items():
        path = run / name.replace("_", ".")
        path.write_text(text)
    if lock is not None:
        (run / ".lightspan.lock").write_text(lock)
        os.utime(run / ".lightspan.lock", (NOW - 1000, NOW - 1000))
    if beat_s is not None:
        (run / "heartbeats").mkdir()
        beat = run / "heartbeats" / "rank-0.json"
        beat.write_text("{}")
        os.utime(beat, (NOW - beat_s, NOW - beat_s))
    return run


LOCKING = """
import sys, time
from pathlib import Path
from lightspan.cli.runs.folder import sole_use
with sole_use(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def locked_by(run: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", LOCKING, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_folder_that_is_not_there_or_holds_nothing_has_not_started(tmp_path: Path) -> None:
    assert status_of(tmp_path / "none") is Status.UNSTARTED
    assert status_of(make(tmp_path, lock=holder(), output_txt="refused")) is Status.UNSTARTED


def test_a_run_is_running_while_its_process_lives_and_stale_once_it_is_killed(tmp_path: Path) -> None:
    run = make(tmp_path, resolved_yaml="{}", failed_txt="an earlier start")
    process = locked_by(run)
    try:
        assert status_of(run) is Status.RUNNING
        (run / "failed.txt").unlink()
        beat = run / "heartbeats" / "rank-0.json"
        beat.parent.mkdir()
        beat.write_text("{}")
        assert status_of(run) is Status.RUNNING
        assert status_of(run, time.time() + SILENT_S + 60) is Status.STALE  # it hangs
        os.utime(beat, (1e9, 1e9))  # left by an earlier start: this one has not come to its first heartbeat
        assert status_of(run) is Status.RUNNING
        beat.touch()
    finally:
        process.kill()
        process.wait()
    assert status_of(run) is Status.STALE


def test_looking_at_a_run_never_keeps_it_from_starting(tmp_path: Path) -> None:
    run = make(tmp_path, lock=holder(), resolved_yaml="{}")
    status_of(run)
    process = locked_by(run)
    process.kill()
    process.wait()


@pytest.mark.parametrize(("beat_s", "found"), [(5, Status.RUNNING), (SILENT_S + 1, Status.STALE)])
def test_a_run_on_another_machine_is_known_by_its_heartbeats(tmp_path: Path, beat_s: float, found: Status) -> None:
    assert status_of(make(tmp_path, lock=holder(), beat_s=beat_s, resolved_yaml="{}"), NOW) is found


def test_a_free_lock_of_this_machine_outweighs_a_fresh_heartbeat(tmp_path: Path) -> None:
    run = make(tmp_path, lock=holder(socket.gethostname()), beat_s=5, resolved_yaml="{}")
    assert status_of(run, NOW) is Status.STALE


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"summary_json": '{"finished": true}'}, Status.DONE),
        ({"summary_json": '{"finished": false}'}, Status.PREEMPTED),
        ({"summary_json": '{"finished": true}', "failed_txt": "why"}, Status.FAILED),
        ({"summary_json": '{"finished": tr'}, Status.STALE),
        ({"summary_json": "[1]"}, Status.STALE),
        ({"summary_json": json.dumps({"steps": 3})}, Status.STALE),
        ({"result_json": "{}"}, Status.DONE),
        ({"test_json": "{}"}, Status.DONE),
        ({}, Status.STALE),
    ],
)
def test_a_run_without_process_is_what_its_files_say(tmp_path: Path, files: dict[str, str], found: Status) -> None:
    assert status_of(make(tmp_path, lock=holder(), resolved_yaml="{}", **files), NOW) is found


def test_of_a_script_and_of_a_fit_without_summary_nobody_knows_how_they_ended(tmp_path: Path) -> None:
    run = make(tmp_path, metrics_jsonl="")
    assert status_of(run) is Status.UNKNOWN
    (run / "resolved.yaml").touch()
    (run / ".lightspan.lock").touch()
    (run / "csv").mkdir()
    assert status_of(run) is Status.UNKNOWN


def test_it_loads_neither_torch_nor_yaml() -> None:
    code = "import sys, lightspan.cli.runs.status; sys.exit(any(name in sys.modules for name in ('torch', 'yaml')))"
    subprocess.run([sys.executable, "-c", code], check=True)
