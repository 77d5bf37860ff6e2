"""The search for rates in units of AdamW's: where it ends, what counts, and what is measured of a step."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from lightspan.core.errors import UserError
from lightspan.datamodules.text.windows import ByteText

FILE = Path(__file__).parents[2] / "benchmarks" / "rates.py"


def bowl(best: float, ran: list[tuple[float, int]]) -> Any:
    """Losses around a best rate, a little higher on the second seed."""

    def measured(results: Path, task: Any, candidate: Any, point: Any, seed: int, stage: str) -> dict[str, float]:
        ran.append((point[0], seed))
        return {"online_loss": abs(math.log2(point[0] / best)) + seed / 1000}

    return measured


def test_a_search_is_refined_by_roots_of_two_on_both_seeds_until_no_neighbour_is_better(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[float, int]] = []
    monkeypatch.setattr(benchmark.quality, "measured", bowl(0.0113, ran))
    task = benchmark.MODELS["w32d2"]
    found = benchmark.best_rate(Path(), task, benchmark.arms()["muon"], 1e-3, 1e-3)
    assert found == pytest.approx(0.0113, rel=0.01)
    first = [lr for lr, seed in ran if seed == 100]
    assert {1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2} <= set(first)
    for lr in (found / math.sqrt(2), found, found * math.sqrt(2)):
        assert {seed for rate, seed in ran if math.isclose(rate, lr, rel_tol=1e-3)} == {100, 101}


def test_the_others_begin_and_are_run_at_adamws_best_rate(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose own best is two factors of 2 away here, so that no refinement passes there."""
    ran: dict[str, list[tuple[float, float, int]]] = {"adamw": [], "muon": []}

    def measured(results: Path, task: Any, candidate: Any, point: Any, seed: int, stage: str) -> dict[str, float]:
        ran[candidate.name].append((*point[:2], seed))
        best = 4e-3 if candidate.name == "adamw" else 1.6e-2
        return {"online_loss": abs(math.log2(point[0] / best))}

    monkeypatch.setattr(benchmark.quality, "measured", measured)
    benchmark.sweep(Path(), [benchmark.MODELS["w32d2"]], ["muon"])
    assert all(lr == other for lr, other, _ in ran["adamw"])
    assert {other for _, other, _ in ran["muon"]} == {4e-3}
    assert {seed for lr, _, seed in ran["muon"] if lr == 4e-3} == {100, 101}


def test_a_diverged_run_is_the_worst_of_all(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(results: Path, task: Any, candidate: Any, point: Any, *_: Any) -> dict[str, float | None]:
        return {"online_loss": None if point[0] > 1e-3 else 1e-3 / point[0]}

    monkeypatch.setattr(benchmark.quality, "measured", measured)
    task = benchmark.MODELS["w32d2"]
    assert benchmark.best_rate(Path(), task, benchmark.arms()["adamw"], 1e-3, None) == 1e-3


def test_a_rate_counts_where_both_seeds_ran(benchmark: ModuleType) -> None:
    values = [(1e-3, 100, 2.0), (1e-3, 101, 3.0), (2e-3, 100, 1.0), (4e-3, 100, 2.0), (4e-3, 101, None)]
    rows = [
        {"task": "w32d2", "optimizer": "adamw", "lr": lr, "seed": seed, "online_loss": loss}
        for lr, seed, loss in values
    ]
    assert benchmark.means(rows, "w32d2", "adamw") == {1e-3: 2.5, 4e-3: math.inf}
    assert benchmark.adamw_rate(rows, benchmark.MODELS["w32d2"]) == 1e-3
    with pytest.raises(UserError, match="w64d2"):
        benchmark.adamw_rate(rows, benchmark.MODELS["w64d2"])


def test_what_is_measured_of_a_step_knows_neither_rate_nor_decay(benchmark: ModuleType) -> None:
    """A sign step of Adam: all numbers 1 or -1, here a matrix of rank 1."""
    weight = nn.Parameter(torch.randn(8, 4))
    watched = benchmark.Watched(torch.optim.AdamW, (1,))
    optimizer = watched([{"params": [weight], "name": "matrices"}], lr=0.1, weight_decay=0.5, eps=0.0)
    for _ in range(2):
        weight.grad = torch.ones(8, 4)
        optimizer.step()
    (row,) = watched.found
    assert row["rms"] == pytest.approx(1, rel=1e-4)
    assert row["spectral"] == pytest.approx(1, rel=1e-4)
    assert benchmark.summary(watched.found)["rms"] == [pytest.approx(1, rel=1e-4)]


def test_steps_of_every_arm_are_measured_on_a_small_model(benchmark: ModuleType, tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.py").write_text(f"value_{number} = {number}\n" * 20)
    task = replace(benchmark.MODELS["w32d2"], depth=1, steps=2, batch_size=2, corpus=partial(ByteText, [str(tmp_path)]))
    for name, plain in benchmark.arms().items():
        watched = benchmark.Watched(plain.constructor, (2,))
        candidate = replace(plain, constructor=watched)
        row = benchmark.quality.train(task, candidate, (1e-3, 1e-3, benchmark.MOMENTUM[name]), 0, "sweep")
        assert math.isfinite(row["online_loss"]), name
        assert len(watched.found) == 7, name
        assert all(0 < each["spectral"] < 10 for each in watched.found), name


def test_byte_pairs_are_learned_from_training_files_alone(benchmark: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--text"):
        benchmark.PairedBytes(tmp_path, 300, context=8, batch_size=2).setup()
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text("held out " * 20 if number % 20 == 0 else "seen words " * 50)
    data = benchmark.PairedBytes(tmp_path, 270, context=8, batch_size=2)
    data.setup()
    assert data.train.windows.shape[1] == 9
    assert data.train.windows.max() > 255  # pairs
    assert set(data.val.windows.flatten()) & set(range(256))  # bytes, since its words were never seen
