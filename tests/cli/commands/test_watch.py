"""`lightspan watch` prints its address, serves until Ctrl-C, and ends in order."""

import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from run_folder_fixtures import MakeRun
from waiting import HANG_S

from lightspan.cli.main import main


def test_it_serves_the_page_until_ctrl_c_and_ends_with_status_0(make_run: MakeRun) -> None:
    run = make_run("a")
    command = [sys.executable, "-m", "lightspan", "watch", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{20,}/", address)
        with urllib.request.urlopen(address, timeout=HANG_S) as answer:
            assert b"<b>val/loss_nats</b>" in answer.read()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=HANG_S)
    finally:
        process.kill()
    assert (process.returncode, err) == (0, "")
    assert out.endswith("stopped watching\n")
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", "summary.json"]


@pytest.mark.parametrize(("name", "message"), [("nowhere", "does not exist"), ("file", "is not a folder")])
def test_what_is_no_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    (tmp_path / "file").touch()
    assert main(["watch", str(tmp_path / name)]) == 2
    assert f"{name} {message}; name the folder of a run" in capsys.readouterr().err
