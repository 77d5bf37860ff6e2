"""`lightspan pull --from s3://...`: a bucket gives what a folder gives, and what stumbles is asked for again."""

from pathlib import Path
from typing import Any

import pytest
from store_fixtures import Gate, put

from lightspan.cli.main import main
from lightspan.core.files import attempts
from lightspan.core.files.runs import MODEL


def upload(zoo: Path) -> str:
    for path in zoo.rglob("*"):
        if path.is_file():
            put(f"zoo/{path.relative_to(zoo)}", path.read_bytes())
    return "s3://lab/zoo"


def test_a_bucket_gives_what_a_folder_gives(zoo: Path, tmp_path: Path, gate: Gate, capsys: Any) -> None:
    assert main(["pull", "--from", str(zoo)]) == 0
    listed = capsys.readouterr().out
    place = upload(zoo)
    for address in (place, f"{place}/"):
        assert main(["pull", "--from", address]) == 0
        assert capsys.readouterr().out == listed
    assert main(["pull", "toy-digits", "--from", place, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / MODEL).read_bytes() == (zoo / "toy-digits" / MODEL).read_bytes()


def test_a_store_that_stumbles_is_asked_again_and_other_bytes_are_refused(
    zoo: Path, tmp_path: Path, gate: Gate, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "PAUSES_S", (0.0, 0.0, 0.0))
    place, out = upload(zoo), str(tmp_path / "out")
    weights = f"/lab/zoo/toy-digits/{MODEL}"
    gate.stumbles[weights] = [503, None, "cut"]  # for the size, for the size, for the content
    assert main(["pull", "toy-digits", "--from", place, "--out", out]) == 0
    assert capsys.readouterr().err.count("trying again") == 2
    content = (zoo / "toy-digits" / MODEL).read_bytes()
    put(f"zoo/toy-digits/{MODEL}", content[:-1] + bytes([content[-1] ^ 1]))
    assert main(["pull", "toy-digits", "--from", place, "--out", f"{out}-2"]) == 2
    assert "damaged or exchanged" in capsys.readouterr().err
    assert not Path(f"{out}-2").exists()
    put("zoo/index.json", b"{}")
    assert main(["pull", "--from", place]) == 2
    assert f"{place}/index.json is no index of weights" in capsys.readouterr().err
    assert main(["pull", "--from", "s3://lab/nothing"]) == 2
    assert "the store has no such object" in capsys.readouterr().err
