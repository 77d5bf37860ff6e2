"""The benchmark of Muon's steps runs, and its file says how steps compare."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_a_quick_run_compares_every_row_with_both_of_torchs(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    spec = importlib.util.spec_from_file_location("muon_step_benchmark", FOLDER / "muon_step.py")
    assert spec is not None
    assert spec.loader is not None
    module, threads = importlib.util.module_from_spec(spec), torch.get_num_threads()
    spec.loader.exec_module(module)
    module.main(["--quick", "--json", str(tmp_path / "out.json")])
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert list(rows)[:2] == ["torch Muon", "torch Muon, products in float32"]
    assert len(rows) == 11
    for row in rows.values():
        assert row["x_torch"] == pytest.approx(row["ms"] / rows["torch Muon"]["ms"])
        assert row["x_torch_float32"] == pytest.approx(row["ms"] / rows["torch Muon, products in float32"]["ms"])


def test_torchs_iteration_in_float32_is_the_published_one(monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    from muon_step import in_float32

    from lightspan.optim.matrices.newton_schulz import COEFFICIENTS, JORDAN, orthogonalised

    for shape in ((12, 5), (5, 12)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        expected = orthogonalised(x[None].double(), None, COEFFICIENTS["jordan"])[0]
        torch.testing.assert_close(in_float32(x, JORDAN, 5, 1e-7).double(), expected, atol=1e-4, rtol=0)
