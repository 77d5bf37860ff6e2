"""The comparison of optimisers on a small language model: what is run, what is never run again, what the table says."""

import importlib.util
import json
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from lightspan.errors import UserError

FILE = Path(__file__).parents[2] / "benchmarks" / "lm_quality.py"
spec = importlib.util.spec_from_file_location("lm_quality", FILE)
assert spec is not None
assert spec.loader is not None
quality = importlib.util.module_from_spec(spec)
spec.loader.exec_module(quality)


@pytest.fixture
def tiny(tmp_path: Path) -> Any:
    """A model of one narrow block on a text of its own, three steps a run."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.py").write_text(f"value_{number} = {number}\n" * 20)
    size = {"width": 32, "depth": 1, "heads": 2, "mlp_width": 64, "context": 16, "batch_size": 2, "rank": 8}
    return quality.Setup(**size, sweep_steps=3, final_steps=3, val_windows=4, paths=(str(folder),))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The runs that are really trained, in order."""
    calls, train = [], quality.train

    def counted(setup: Any, *run: Any) -> Any:
        calls.append(run)
        return train(setup, *run)

    monkeypatch.setattr(quality, "train", counted)
    return calls


def row(name: str, seed: int, stage: str, **values: Any) -> dict[str, Any]:
    known = {"optimizer": name, "lr": 2e-3, "other_lr": 1.2e-2, "seed": seed, "stage": stage, "online_loss": 2.0}
    return known | {"steps": 10, "val_loss": None, "state_bytes": 0, "curve": []} | values


def final(name: str, seed: int, loss: float, state: int, step_ms: float, curve: list[Any]) -> dict[str, Any]:
    times = {"wall_s": curve[-1][1], "cpu_s": curve[-1][2], "step_wall_ms": step_ms, "step_cpu_ms": step_ms / 2}
    return row(name, seed, "final", val_loss=loss, state_bytes=state, curve=curve, **times)


def test_a_finished_run_is_never_run_again(tiny: Any, trained: list[Any], tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    arguments = ["final", "--only", "adamw", "--results", str(results)]
    assert quality.main(arguments, tiny) == 0
    first, written = list(trained), results.read_text()
    assert len(first) == len(set(first)) >= 12
    assert [run[2] for run in first if run[3] == "final"] == [0, 1, 2]
    assert quality.main(arguments, tiny) == 0
    assert trained == first
    assert results.read_text() == written
    kept = json.loads(written)
    results.write_text(json.dumps([r for r in kept if r["seed"] != 1]))
    assert quality.main(arguments, tiny) == 0
    assert trained[len(first) :] == [run for run in first if run[2] == 1]
    again = json.loads(results.read_text())
    assert [r["val_loss"] for r in again] == [r["val_loss"] for r in kept]  # one seed gives one run, bit for bit


def test_two_writers_lose_no_row(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    keys = [(name, seed) for seed in range(8) for name in ("adamw", "muon")]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: quality.append(results, row(key[0], key[1], "sweep")), keys))
    assert [(r["optimizer"], r["seed"]) for r in json.loads(results.read_text())] == sorted(keys)


@pytest.mark.parametrize("name", list(quality.START))
def test_a_run_steps_every_parameter_and_counts_all_state(tiny: Any, name: str) -> None:
    model = quality.llama(256, tiny.width, tiny.depth, tiny.heads, tiny.mlp_width, tiny.context)
    together = quality.optimizers(name, model, (1e-3, 2e-3), tiny.rank)
    covered = [p for optimizer in together for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in covered} == {id(p) for p in model.parameters()}
    assert len(covered) == len(set(covered))
    for optimizer in together:
        for group in optimizer.param_groups:
            matrices = group["name"] == "matrices"
            assert (group["lr"], group["weight_decay"]) == ((1e-3, 0.1) if matrices else (2e-3, 0.0))
    result = quality.train(tiny, name, (1e-3, 2e-3), 0, "final")
    assert result["state_bytes"] > 0
    assert [point[0] for point in result["curve"]] == sorted({round(3 * k / 10) for k in range(1, 11)} - {0})
    assert result["val_loss"] == result["curve"][-1][-1]
    assert abs(result["online_loss"] - math.log(256)) < 1


def test_the_full_model_has_over_two_million_parameters() -> None:
    setup = quality.Setup()
    with torch.device("meta"):
        model = quality.llama(256, setup.width, setup.depth, setup.heads, setup.mlp_width, setup.context)
    assert 2.0e6 <= sum(p.numel() for p in model.parameters()) <= 4.0e6
    assert setup.rank == setup.width // 4


@pytest.mark.parametrize("loss", [lambda x: x * math.nan, lambda x: (x * 0).sqrt()], ids=["loss", "gradient"])
def test_a_diverged_run_ends_and_is_kept_as_null(
    tiny: Any, loss: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "batch_loss", lambda model, tokens: loss(model.lm_head.weight.square().sum()))
    results = tmp_path / "results.json"
    assert quality.measured(results, tiny, "adamw", (1e-3, 1e-3), 0, "final")["val_loss"] is None
    (kept,) = json.loads(results.read_text())
    assert kept["online_loss"] is None
    assert kept["curve"] == []


def test_rows_of_another_budget_are_refused(tiny: Any, tmp_path: Path) -> None:
    quality.append(tmp_path / "results.json", row("adamw", 100, "sweep"))
    with pytest.raises(UserError, match=r"steps=10, and a sweep run now takes 3; delete the file"):
        quality.measured(tmp_path / "results.json", tiny, "adamw", (2e-3, 1.2e-2), 100, "sweep")


def test_a_missing_preset_is_skipped_and_a_failing_optimiser_stops_no_other(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def constructor(name: str) -> Any:
        if name == "trion":
            raise ImportError("no presets here")

    def sweep(results: Path, setup: Any, name: str) -> None:
        if name == "galore":
            raise RuntimeError("a bug")
        print(f"{name} swept")

    monkeypatch.setattr(quality, "constructor", constructor)
    monkeypatch.setattr(quality, "sweep", sweep)
    arguments = ["sweep", "--results", str(tmp_path / "results.json"), "--only"]
    assert quality.main([*arguments, "trion", "adamw"], tiny) == 0
    assert quality.main([*arguments, "galore", "adamw"], tiny) == 1
    said = capsys.readouterr()
    assert "trion skipped: no presets here" in said.out
    assert said.out.count("adamw swept") == 2
    assert "a bug" in said.err


def test_the_search_walks_both_rates_and_looks_at_the_first_again() -> None:
    known: dict[tuple[float, float], float] = {}

    def loss(rates: tuple[float, float]) -> float:
        lr, other = (math.log2(rate) for rate in rates)
        return known.setdefault(rates, (other - 3) ** 2 + (lr + other / 4) ** 2)

    # On the first line lr = 1 is best, then other = 2**3, an end; beside it lr moves to 2**-1, again an end.
    assert quality.search(loss, (1.0, 1.0)) == (0.5, 8.0)
    assert {lr for lr, other in known if other == 1} == {2.0**k for k in range(-2, 3)}
    assert {other for lr, other in known if lr == 1} == {2.0**k for k in range(-2, 5)}
    assert len(known) == 5 + 6 + 2 + 1


@pytest.mark.parametrize("name", list(quality.START))
def test_the_recorded_search_is_the_one_that_would_be_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every point that the search asks for is in the results, which nothing has been added to."""
    monkeypatch.setattr(quality, "train", None)
    assert quality.sweep(quality.RESULTS, quality.Setup(), name) == quality.best_rates(
        quality.read(quality.RESULTS), name
    )


def test_the_table_compares_seed_by_seed_with_adamw() -> None:
    rows = [
        row("adamw", 100, "sweep"),
        row("adamw", 100, "sweep", lr=4e-3, online_loss=2.5),
        row("fira", 100, "sweep"),
        row("apollo", 100, "sweep"),
        final("adamw", 0, 1.7, 4 * 2**20, 100.0, [[5, 1.0, 0.5, 1.9], [10, 2.0, 1.0, 1.7]]),
        final("adamw", 1, 1.8, 4 * 2**20, 100.0, [[5, 1.0, 0.5, 1.9], [10, 2.0, 1.0, 1.8]]),
        final("adamw", 1, 0.0, 4 * 2**20, 100.0, [[10, 9.0, 9.0, 0.0]]) | {"lr": 4e-3},  # not the best of the sweep
        final("fira", 0, 1.6, 2**20, 120.0, [[5, 1.0, 0.5, 1.8], [10, 3.0, 1.5, 1.6]]),
        final("fira", 1, 1.9, 2**20, 130.0, [[5, 1.0, 0.5, 2.0], [10, 3.0, 1.5, 1.9]]),
        final("apollo", 0, 1.9, 2**19, 90.0, [[10, 1.8, 0.9, 1.9]]),
    ]
    lines = quality.table(rows).splitlines()[2:]
    assert lines == [
        "| adamw | 0.002 / 0.012 | 1.7500 (1.7000, 1.8000) | +0.0000 | 4.00 (1.00x) | 100.0 (1.00x) | 2.0 | 2.0 |",
        "| fira | 0.002 / 0.012 | 1.7500 (1.6000, 1.9000) | +0.0000 | 1.00 (0.25x) | 125.0 (1.25x) | 3.0 "
        "| 2.0 (1 of 2 seeds) |",
        "| apollo | 0.002 / 0.012 | 1.9000 (1.9000) | +0.2000 | 0.50 (0.12x) | 90.0 (0.90x) | 1.8 | never |",
    ]
    assert "| 62.5 (1.25x) | 1.5 | 1.0 (1 of 2 seeds) |" in quality.table(rows, "cpu")
    without = quality.table([r for r in rows if r["optimizer"] != "adamw"]).splitlines()[2:]
    assert without[1] == "| apollo | 0.002 / 0.012 | 1.9000 (1.9000) |  | 0.50 | 90.0 | 1.8 |  |"


def test_the_table_command_draws_next_to_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.json"
    for entry in (row("adamw", 100, "sweep"), final("adamw", 0, 1.7, 2**20, 100.0, [[10, 2.0, 1.0, 1.7]])):
        quality.append(results, entry)
    assert quality.main(["table", "--results", str(results)]) == 0
    assert "| adamw |" in capsys.readouterr().out
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="no final run to draw"):
        quality.main(["table", "--results", str(tmp_path / "none.json")])


def test_names_keep_their_distance_and_stay_below_the_top() -> None:
    heights = quality.spread([0.1, 0.1, 0.5, 0.97, 0.98, 0.99], gap=0.1)
    assert all(above - below >= 0.1 - 1e-12 for below, above in pairwise(heights))
    assert heights == pytest.approx([0.1, 0.2, 0.5, 0.8, 0.9, 1.0])
