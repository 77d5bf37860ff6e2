import subprocess
import sys
from pathlib import Path

import pytest

from lightspan.cli.main import main

ROOT = Path(__file__).resolve().parents[3]


def test_only_the_code_of_this_clone_or_of_one_that_is_named_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evidence").mkdir()
    (tmp_path / "evidence/reproduce.py").touch()
    (inside := tmp_path / "data").mkdir()
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    for here in (tmp_path, inside, ROOT):
        monkeypatch.chdir(here)
        assert main(["reproduce", "20_mmc"]) == 0
    assert main(["reproduce", "20_mmc", "--checkout", str(tmp_path)]) == 0
    own = [sys.executable, str(ROOT / "evidence/reproduce.py"), "20_mmc"]
    assert commands == [own, own, own, [sys.executable, str(tmp_path / "evidence/reproduce.py"), "20_mmc"]]


def test_a_folder_that_is_no_clone_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "20_mmc", "--checkout", str(tmp_path)]) == 2
    assert f"{tmp_path} is not a clone" in capsys.readouterr().err
