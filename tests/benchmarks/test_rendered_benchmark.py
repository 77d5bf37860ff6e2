"""The benchmark of rendered data runs, covers every data module of the package, and draws a picture of each."""

import json
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "rendered.py"


def test_a_quick_run_measures_and_draws_every_kind(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 256 pictures for the moments of each would take longer than all the rest.
    monkeypatch.setattr("lightspan.datamodules.rendered.data.MEASURED", 8)
    out, sheets = tmp_path / "out.json", tmp_path / "sheets"
    benchmark.main(["--quick", "--rounds", "1", "--json", str(out), "--sheets", str(sheets)])
    rows = json.loads(out.read_text())["rows"]
    assert {row["data"] for row in rows} == benchmark.CASES.keys()
    assert all(row["pictures_per_s"] >= row["samples_per_s"] > 0 for row in rows)
    named = {name.split(",")[0] for name in benchmark.CASES}
    assert {path.stem for path in sheets.iterdir()} == named
    assert named == {kind.__name__ for kind in benchmark.RenderedSets.__subclasses__()}
