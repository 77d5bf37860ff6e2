"""The example of docs/diagnosis.md: a run is made to diverge, is captured and replayed, and says what the page says."""

import re
import shlex
from pathlib import Path

import pytest

from lightspan.cli.main import main

PAGE = (Path(__file__).parents[1] / "docs" / "diagnosis.md").read_text()


@pytest.mark.runs
def test_the_run_of_the_page_diverges_and_its_replay_says_what_the_page_says(tmp_path, capsys):
    block = next(part for part in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) if "lightspan replay" in part)
    fit, replay = (shlex.split(line.replace("runs/diverged", str(tmp_path / "run")))[1:] for line in block.splitlines())
    assert main(fit) == 2
    assert "captured in" in capsys.readouterr().err
    assert main(replay) == 0
    said = capsys.readouterr().out
    shown = next(part for part in re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL) if "running_var" in part)
    assert shown in said
