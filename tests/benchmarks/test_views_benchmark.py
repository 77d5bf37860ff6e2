"""The benchmark of views runs, and every arm makes as many views of the size asked for."""

import json
from pathlib import Path
from types import ModuleType

import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "views.py"


def test_a_quick_run_writes_every_arm_against_torchvision(benchmark: ModuleType, tmp_path: Path) -> None:
    benchmark.main(["--quick", "--rounds", "1", "--json", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    arms = {row["arm"]: row for row in result["rows"]}
    assert {"lightspan, one image at a time", "lightspan, a batch at a time", "torchvision on floats"} < arms.keys()
    assert arms[result["baseline"]]["x_baseline"] == 1
    assert all(row["views_per_s"] > 0 for row in arms.values())


def test_all_arms_make_the_same_work(benchmark: ModuleType) -> None:
    case = benchmark.QUICK
    made = benchmark.lightspan_arms(case) | benchmark.torchvision_arms(case) | benchmark.kornia_arms(case)
    for name, arm in made.items():
        views = arm()
        flat = [view for part in views for view in part]
        assert len(flat) == 2 * case.images, name
        assert {view.shape for view in flat} == {(3, case.size, case.size)}, name
        assert {view.dtype for view in flat} == {torch.float32}, name
