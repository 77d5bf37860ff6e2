"""The benchmark of state on the host, without a GPU: it says so, and its dry run has a row for every optimiser."""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "offload.py"
GPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the benchmark would run on it")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("offload_benchmark", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@GPU_ONLY
def test_without_a_gpu_it_says_so_in_one_sentence_and_exits_with_2(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("torch sees no GPU here")
    assert said.err.count("\n") == 1


def test_a_dry_run_has_a_row_or_a_reason_for_every_optimiser(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(parameters: Any) -> None:
        raise ImportError("no module")

    monkeypatch.setattr(benchmark, "torchao", lambda **options: absent)
    assert benchmark.main(["--dry-run", "--json", str(tmp_path / "offload.json")]) == 1
    result = json.loads((tmp_path / "offload.json").read_text())
    rows, refused = result["optimizers"], result["refused"]
    assert list(rows) == [name for name in benchmark.cases(benchmark.TINY) if not name.startswith("torchao")]
    assert set(refused) == {name for name in benchmark.cases(benchmark.TINY) if name.startswith("torchao")}
    assert all(why == "pip install torchao: ImportError: no module" for why in refused.values())
    assert all(math.isfinite(row["ms"]) and row["ms"] > 0 for row in rows.values())
    for name in ("LowRank", "LowRank int8", "FactoredMuon"):
        assert rows[name]["state_mib"] == rows[f"{name}, offload"]["state_mib"]
