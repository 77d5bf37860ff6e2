"""The benchmark of projections runs, and its file says what it printed."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "projections.py"


def test_a_quick_run_times_every_projection_against_the_floor(tmp_path: Path, capsys: Any) -> None:
    spec = importlib.util.spec_from_file_location("projections_benchmark", FILE)
    assert spec is not None
    assert spec.loader is not None
    module, threads = importlib.util.module_from_spec(spec), torch.get_num_threads()
    spec.loader.exec_module(module)
    module.main(["--quick", "--rounds", "2", "--json", str(tmp_path / "out.json")])
    torch.set_num_threads(threads)
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["projection"] for row in result["rows"]] == ["Fastfood", "Sparse", "Dense"]
    for row in result["rows"]:
        assert row["floor_ms"] == pytest.approx(12 * row["pass_ms"])
        assert row["push_x_floor"] == pytest.approx(row["push_ms"] / row["floor_ms"])
        assert row["weights"] == 3000
    assert f"at most {result['worst_fastfood_push_x_floor']:.2f} times the floor" in capsys.readouterr().out
