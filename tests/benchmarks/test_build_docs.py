"""docs/benchmarks.md from small made-up results: every figure in its cell, every goal with its verdict."""

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def build_docs() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))  # of quality, which it imports when it has something to show
        spec = importlib.util.spec_from_file_location("benchmark_docs", ROOT / "benchmarks" / "build_docs.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


def optimizer(steady: float, refresh: float | None = None, **others: Any) -> dict[str, Any]:
    row = {"dtype": "float32", "rank": 64 if refresh else None, "steady_x": steady, "refresh_x": refresh}
    return row | {"amortised_x": steady + 0.5, "state_mib": 82.5, "steady_ms": 4 * steady, "unheard_of": [1]} | others


OPTIM_STEP: dict[str, Any] = {
    "date": "2026-11-20",
    "threads": 2,
    "rounds": 9,
    "optimizers": {
        "torch AdamW fused": optimizer(1.0),
        "torch Muon (matrices)": optimizer(85.0, state_mib=40.5),
        "the two products alone r64": optimizer(2.5, rank=64),
        "galore-torch r64": optimizer(6.0, 400.0, gap=200),
        "apollo-torch r64": optimizer(10.0, 20.0),
        "lightspan LowRank r64": optimizer(3.25, 39.0, gap=50, slowest_to_median=1.25, state_mib=17.3),
        "lightspan LowRank r64 bf16": optimizer(1.75, 9.0, dtype="bfloat16"),
        "lightspan LowRank int8 r64": optimizer(4.5, 45.0, state_mib=5.75, constants_mib={"a": 0.5, "b": 0.25}),
    },
    "train_step": {"adamw_ms": 100.0, "adamw_median_ms": 110.0, "projected_backward_ms": 80.0, "novel_ms": 200.0},
    "skipped": {"fira r64": "pip install fira"},
    "machine": {"cpu": "Abacus 3", "cores": 2, "torch": "2.13", "peers": {"galore-torch": "1.0"}},
    "load": {"before": [0.5, 0.5, 0.5], "after": [1.0, 0.5, 0.5]},
}


def quality_rows() -> list[dict[str, Any]]:
    """Two seeds of AdamW and of ours, which ends 0.02 nats above it on average at a quarter of its state."""

    def row(name: str, seed: int, stage: str, loss: float | None, state: int) -> dict[str, Any]:
        times = {"wall_s": 10.0, "cpu_s": 9.0, "step_wall_ms": 30.0, "step_cpu_ms": 20.0}
        curve = [[1, 10.0, 9.0, loss]] if loss else []
        key = {"task": "stdlib", "optimizer": name, "lr": 2e-3, "other_lr": 1e-2, "momentum": 0.9}
        key |= {"seed": seed, "stage": stage}
        known = key | times | {"steps": 300, "online_loss": 2.0, "val_loss": loss, "state_bytes": state, "curve": curve}
        return known | {"date": "2026-11-21", "unheard_of": None}

    losses = {("adamw", 0): 1.7, ("adamw", 1): 1.75, ("low_rank", 0): 1.73, ("low_rank", 1): 1.76}
    sweeps = [row(name, 100, "sweep", None, 0) for name in ("adamw", "low_rank")]
    state = {"adamw": 8 * 2**20, "low_rank": 2 * 2**20}
    return sweeps + [row(name, seed, "final", loss, state[name]) for (name, seed), loss in losses.items()]


def kernels_record() -> dict[str, Any]:
    def row(name: str, us: float, x_adamw: float | None, **others: Any) -> dict[str, Any]:
        return {"name": name, "us": us, "gb_per_s": 2500.4, "share_of_floor": 0.8125, "x_adamw": x_adamw} | others

    one = [row("torch AdamW fused", 120.0, 1.0, mode="graph"), row("LowRank no residual", 40.5, 0.34, mode="graph")]
    many = [row("LowRank, max_norm", 30000.0, 0.5, mode="eager"), row("LowRank, max_norm", 20000.0, 0.4, mode="graph")]
    versions = {
        "driver": "570.1",
        "cuda": "12.9",
        "torch": "2.13",
        "triton": "3.9",
        "date": "2026-11-22",
        "seconds": 200,
    }
    return versions | {
        "card": "Abacus G",
        "shape": {"matrices": 4, "rows": 4096, "columns": 4096, "rank": 128},
        "copy_gb_per_s": 2990.0,
        "layers": {"measured": 16, "scaled_to": 32},
        "ops": [row("project", 50.0, 0.25, x_copy=1.25, unheard_of=1)],
        "steps": {"one matrix": one, "LLaMA-7B": many},
        "refused": {"dct_energies": "off by 0.5"},
    }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    for name, content in (
        ("optim_step_abacus_3", OPTIM_STEP),
        ("quality", quality_rows()),
        ("kernels_abacus", kernels_record()),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def sections(page: str) -> dict[str, str]:
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in page.split("\n## ")[1:]}


def test_what_has_no_results_says_so_and_nothing_else(build_docs: ModuleType, tmp_path: Path) -> None:
    found = sections(build_docs.page(tmp_path))
    assert list(found) == [
        "One step on a CPU",
        "A step of Muon on a CPU",
        "Loss on equal data",
        "Time of a training step",
        "Rates in units of AdamW's",
        "Nets with dead rows",
        "Kernels on a GPU",
        "Memory that a plan predicts",
        "Random projections on a CPU",
        "Adapters on a CPU",
        "Views of pictures on a CPU",
    ]
    assert {body.strip() for body in found.values()} == {"not yet measured"}
    assert build_docs.short_table(tmp_path) == "not yet measured\n"


def test_rates_are_shown_in_units_of_adamws_and_of_both_lengths_of_steps(build_docs: ModuleType, results: Path) -> None:
    """On two models muon's best rate is 2 and 0.5 times AdamW's, and 0.25 nats lower there."""
    rows = [
        {"task": model, "optimizer": arm, "lr": lr, "seed": seed, "online_loss": loss, "cpu_s": 30.0}
        for model, best in (("w32d2", 4e-3), ("w128d2", 1e-3))
        for arm, lr, loss in (
            ("adamw", 2e-3, 2.0), ("adamw", 8e-3, 2.5), ("muon", best, 1.75), ("muon", 2e-3, 2.125),
        )
        for seed in (100, 101)
    ]  # fmt: skip
    (results / "rates.json").write_text(json.dumps(rows))
    steps = {"model": "w32d2", "arm": "adamw", "beta2": 0.95, "batch": 8, "rms": [0.2, 0.3, 0.4], "spectral": [0.1] * 3}
    (results / "rates_updates.json").write_text(json.dumps([steps]))
    other = [
        {"optimizer": arm, "lr": lr, "val_loss": loss}
        for arm, lr, loss in (("adamw", 1e-3, 3.0), ("adamw", 1e-3, 3.5), ("muon", 1e-3, 2.0), ("adamw", 2e-3, None))
    ]
    (results / "rates_other.json").write_text(json.dumps(other))
    body = sections(build_docs.page(results))["Rates in units of AdamW's"]
    assert "| width 32, 2 blocks | 0.002 | 2.00 | -0.250 | +0.125 |  |" in body
    assert "| width 128, 2 blocks | 0.002 | 0.50 | -0.250 | +0.125 |  |" in body
    assert "| muon | adamw | 1.00 | 2.00 |" in body
    kimi = math.sqrt(2 * math.sqrt(32 / 3) * 0.5 * math.sqrt(128 / 3))
    assert f"| muon | kimi | {kimi:.2f} | 1.41 |" in body  # 2 and 0.5 times the roots of the widths differ less
    assert "| w32d2 | adamw | 8 | 0.95 | 0.300 | 0.100 | 9.0 |" in body
    assert "| 0.001 | 3.2500 | 2.0000 |" in body
    assert "| 0.002 | not finite |  |" in body
    assert "| best rate of muon over AdamW's, farthest from one number | <= 1.5 | 2 | **no** |" in body
    assert "| muon at AdamW's rate: loss minus AdamW's, at worst | <= 0 nats | 0.125 nats | **no** |" in body
    assert body.strip().endswith("`python benchmarks/rates.py sweep`, 16 runs of 300 steps, 8 processor minutes.")


def test_nets_with_dead_rows_show_their_worst_rate(build_docs: ModuleType, tmp_path: Path) -> None:
    row = {"net": "N", "optimizer": "LowRank", "largest_loss": 2.0, "farthest_step_x_lr": 4.0, "cpu_s": 60.0}
    rows = [
        row | {"lr": 1e-3, "final_loss": 0.5, "stopped": None},
        row | {"lr": 3e-4, "final_loss": None, "farthest_step_x_lr": None, "stopped": "step 3: not finite"},
    ]
    (tmp_path / "robustness.json").write_text(json.dumps({"rows": rows, "rank": 16}))
    body = sections(build_docs.page(tmp_path))["Nets with dead rows"]
    assert "| N | LowRank | 3e-04 / 1e-03 | not finite / 0.5 | 2 | not finite | 1 |" in body
    assert "| runs that ended in something not finite | <= 0 | 1 | **no** |" in body
    assert "2 processor minutes" in body


def test_steps_of_muon_are_held_to_their_goals(build_docs: ModuleType, tmp_path: Path) -> None:
    rows = {
        "torch Muon": {"ms": 100.0, "x_torch": 1.0, "x_torch_float32": 0.25},
        "lightspan FactoredMuon": {"ms": 120.0, "x_torch": 1.2, "x_torch_float32": 0.3},
        "lightspan FactoredMuon, products in bfloat16": {"ms": 50.0, "x_torch": 0.5, "x_torch_float32": 0.125},
    }
    (tmp_path / "muon_step.json").write_text(json.dumps({"cpu": "a CPU", "threads": 1, "rows": rows}))
    found = "\n".join(build_docs.muon_step(tmp_path))
    assert "| lightspan FactoredMuon | 120.00 | 1.20 | 0.30 |" in found
    assert "| step of lightspan FactoredMuon, x torch Muon | <= 1 | 1.2 | **no** |" in found
    assert "| step of lightspan FactoredMuon, products in bfloat16, x torch Muon | <= 0.6 | 0.5 | yes |" in found


def test_projections_and_adapters_are_held_to_their_goals(build_docs: ModuleType, tmp_path: Path) -> None:
    row = {"projection": "Fastfood", "weights": 2048, "dim": 16, "push_ms": 1.5, "pull_ms": 2.0, "push_x_floor": 5.0}
    row |= {"pull_x_floor": 6.0, "kept_mib": 8.0}
    made_up = {"rows": [row], "target_x_floor": 4.0, "worst_fastfood_push_x_floor": 5.0, "device": "Abacus 3"}
    (tmp_path / "projections.json").write_text(json.dumps(made_up))
    layers = [
        {"layer": "l", "work": "w", "adapter": a, "ms": 1.0, "of_lora": x, "kept_kib": kept}
        for a, x, kept in (("LoRA", 1, None), ("FLoRA", 1.1, 1234.4))
    ]
    (tmp_path / "adapted_layers.json").write_text(json.dumps({"rows": layers, "limit": 1.15, "rank": 16}))
    found = sections(build_docs.page(tmp_path))
    assert "| Fastfood | 2,048 | 16 | 1.50 | 2.00 | 5.00 | 6.00 | 8.0 |" in found["Random projections on a CPU"]
    assert "| push of Fastfood, x floor, at worst | <= 4 | 5 | **no** |" in found["Random projections on a CPU"]
    assert "| l | w | FLoRA | 1.00 | 1.100 | 1,234 |" in found["Adapters on a CPU"]
    assert "| SVFit and FLoRA, x LoRA, at worst | <= 1.15 | 1.1 | yes |" in found["Adapters on a CPU"]


def test_views_stand_beside_those_of_others(build_docs: ModuleType, tmp_path: Path) -> None:
    rows = [{"case": "photographs", "arm": "kornia", "views_per_s": 1234.5, "x_baseline": 0.5}]
    (tmp_path / "views.json").write_text(json.dumps({"rows": rows, "baseline": "torchvision", "threads": 1}))
    found = sections(build_docs.page(tmp_path))["Views of pictures on a CPU"]
    assert "| pictures | made by | views a second | x torchvision |" in found
    assert "| photographs | kornia | 1,234 | 0.50 |" in found
    assert "`python benchmarks/views.py`, threads 1." in found


def test_steps_stand_in_their_columns(build_docs: ModuleType, results: Path) -> None:
    body = sections(build_docs.page(results))["One step on a CPU"]
    head = "| optimiser | dtype | rank | gap | steady, ms | steady x | refresh x | amortised x | slowest | state, MiB "
    for line in (
        head + "| constants, MiB |\n|---|---|---|---|---|---|---|---|---|---|---|",
        "| torch AdamW fused | float32 |  |  | 4.00 | 1.00 |  | 1.50 |  | 82.50 |  |",
        "| galore-torch r64 | float32 | 64 | 200 | 24.00 | 6.00 | 400.00 | 6.50 |  | 82.50 |  |",
        "| lightspan LowRank r64 | float32 | 64 | 50 | 13.00 | 3.25 | 39.00 | 3.75 | 1.25 | 17.30 |  |",
        "| lightspan LowRank int8 r64 | float32 | 64 |  | 18.00 | 4.50 | 45.00 | 5.00 |  | 5.75 | 0.75 |",
        "| lightspan projected backward | 80.0 |  | 0.80 |",
        "| torch AdamW fused | 100.0 | 110.0 | 1.00 |",
        "| novel | 200.0 |  | 2.00 |",
        "- not run: fira r64: pip install fira",
    ):
        assert f"\n{line}\n" in body
    assert body.strip().endswith(
        "`python benchmarks/optim_step.py --keep`, Abacus 3 (2 cores), date 2026-11-20, threads 2, rounds 9, "
        "torch 2.13, galore-torch 1.0, load 0.50 0.50 0.50 to 1.00 0.50 0.50."
    )


def test_goals_of_the_step_are_shown_met_or_not(build_docs: ModuleType, results: Path) -> None:
    body = sections(build_docs.page(results))["One step on a CPU"]
    lines = body[body.index("| goal |") :].splitlines()
    assert lines[2:17] == [
        "| steady step of lightspan LowRank r64, x AdamW | <= 4 | 3.25 | yes |",
        "| steady step of lightspan LowRank no residual r64, x AdamW | <= 4 |  | not yet measured |",
        "| steady step of lightspan LowRank r64 bf16, x AdamW | <= 2 | 1.75 | yes |",
        "| steady step of lightspan LowRank no residual r64 bf16, x AdamW | <= 2 |  | not yet measured |",
        "| steady step of lightspan LowRank no residual r64, x the two products | <= 1.3 |  | not yet measured |",
        "| steady step of lightspan LowRank r64, x the two products | <= 1.6 | 1.3 | yes |",
        "| steady step of lightspan LowRank no residual r64 bf16, x the two products | <= 2 |  | not yet measured |",
        "| steady step of galore-torch over that of lightspan LowRank, rank 64 | >= 2.5 | 1.846 | **no** |",
        "| steady step of apollo-torch over that of lightspan LowRank, rank 64 | >= 2.5 | 3.077 | yes |",
        "| steady step of fira over that of lightspan LowRank, rank 64 | >= 5 |  | not yet measured |",
        "| refresh step of lightspan LowRank r64 over its steady step | <= 10 | 12 | **no** |",
        "| slowest step of lightspan LowRank r64 over its median step | <= 1.2 | 1.25 | **no** |",
        "| slowest step of lightspan LowRank no residual r64 over its median step | <= 1.2 |  | not yet measured |",
        "| state of lightspan LowRank int8 r64 | <= 6 MiB | 5.75 MiB | yes |",
        "| whole training step, projected backward over AdamW | <= 0.85 | 0.8 | yes |",
    ]


def test_losses_are_compared_seed_by_seed(build_docs: ModuleType, results: Path) -> None:
    body = sections(build_docs.page(results))["Loss on equal data"]
    assert (
        "| **low_rank** | 0.002 / 0.01 / 0.9 | 1.7450 | +0.0200 (+0.0100 to +0.0300) |  | 2.00 (0.25x) | 20.0 (1.00x) |"
        in body
    )
    assert "| stdlib: validation loss, low_rank minus adamw | <= 0.01 nats | 0.02 nats | **no** |" in body
    assert "| stdlib: optimiser state, low_rank over adamw | <= 0.35 | 0.25 | yes |" in body
    assert body.strip().endswith("`python benchmarks/quality.py final`, 2026-11-21.")
    assert "![" not in body
    (results / "quality_stdlib.png").touch()
    assert "](../benchmarks/results/quality_stdlib.png)" in build_docs.page(results)


def test_each_task_with_results_has_its_table_and_picture(build_docs: ModuleType, results: Path) -> None:
    rows = quality_rows()
    vit = [row | {"task": "vit", "steps": 500, "val_accuracy": 0.875} for row in rows]
    (results / "quality.json").write_text(json.dumps([*rows, *vit]))
    (results / "quality_vit.png").touch()
    body = sections(build_docs.page(results))["Loss on equal data"]
    _, stdlib, shown = body.split("\n### ")
    assert stdlib.startswith("stdlib\n\nA Llama of 2.3 million")
    assert "accuracy" not in stdlib
    assert shown.startswith("vit\n\nA vision transformer")
    assert "| **low_rank** | 0.002 / 0.01 / 0.9 | 1.7450 | 0.8750 |" in shown
    assert "](../benchmarks/results/quality_vit.png)" in shown
    assert body.count("![") == 1


def test_times_of_training_steps_are_told_beside_adamws_of_the_same_task(build_docs: ModuleType, results: Path) -> None:
    tasks = {
        "stdlib": {"cpu": "Abacus", "rounds": 3, "ms": {"adamw": 100.0, "muon": 125.0}},
        "vit": {"cpu": "Abacus", "rounds": 3, "ms": {"factored_muon": 50.0}},
    }
    (results / "quality_steps.json").write_text(json.dumps(tasks))
    body = sections(build_docs.page(results))["Time of a training step"]
    assert "| optimiser | stdlib | vit |" in body
    assert "| muon | 125.0 (1.25x) |  |" in body
    assert "| factored_muon |  | 50.0 |" in body
    assert "`python benchmarks/quality.py time`, stdlib: cpu Abacus, rounds 3, vit: cpu Abacus, rounds 3." in body


def test_a_diverged_run_meets_no_goal(build_docs: ModuleType, results: Path) -> None:
    rows = [row | {"val_loss": None, "curve": []} if row["optimizer"] == "low_rank" else row for row in quality_rows()]
    (results / "quality.json").write_text(json.dumps(rows))
    assert "| <= 0.01 nats | not finite nats | **no** |" in build_docs.page(results)


def test_a_sweep_alone_is_no_measurement(build_docs: ModuleType, results: Path) -> None:
    sweeps = [row for row in quality_rows() if row["stage"] == "sweep"]
    (results / "quality.json").write_text(json.dumps(sweeps))
    assert sections(build_docs.page(results))["Loss on equal data"].strip() == "not yet measured"


def test_a_card_has_its_ops_its_steps_and_its_goals(build_docs: ModuleType, results: Path) -> None:
    body = sections(build_docs.page(results))["Kernels on a GPU"]
    for line in (
        "### Abacus G",
        "| op | us | GB/s | of the floor | x AdamW | x copy | x torch |",
        "| project | 50.0 | 2500 | 81% | 0.25 | 1.25 |  |",
        "Whole steps on one matrix.",
        "Whole steps on LLaMA-7B, 16 of 32 layers, scaled.",
        "| LowRank, max_norm | graph | 20000.0 | 2500 | 81% | 0.40 |",
        "| LowRank no residual, graph, one matrix: time | <= 50 us | 40.5 us | yes |",
        "| LowRank no residual, graph, one matrix: share of the copy's bandwidth | >= 70 % | 81.25 % | yes |",
        "| LowRank, max_norm, eager, LLaMA-7B: x AdamW with clip_grad_norm_ | <= 0.45 | 0.5 | **no** |",
        "| LowRank, max_norm, graph, LLaMA-7B: x AdamW with clip_grad_norm_ | <= 0.45 | 0.4 | yes |",
        "| LowRank no residual, max_norm, eager, LLaMA-7B: x AdamW with clip_grad_norm_ | <= 0.45 |  "
        "| not yet measured |",
        "- not timed: dct_energies: off by 0.5",
    ):
        assert f"\n{line}\n" in body
    assert body.strip().endswith(
        "`python benchmarks/gpu_kernels.py`, date 2026-11-22, driver 570.1, cuda 12.9, torch 2.13, triton 3.9, 200 s."
    )


def test_a_plan_stands_beside_the_peak_of_its_run(build_docs: ModuleType, results: Path) -> None:
    case = {"recipe": "language/a", "strategy": "ddp", "ranks": 2, "rows": 4, "planned_mib": 110.4, "process_mib": 80.0}
    cases = [case | {"measured_mib": 100.0, "error": 0.104}, case | {"measured_mib": 137.0, "error": -0.1942}]
    record = {"date": "2026-11-23", "machine": "abacus", "torch": "2.13", "cases": cases}
    (results / "plan_error.json").write_text(json.dumps(record))
    body = sections(build_docs.page(results))["Memory that a plan predicts"]
    assert "| language/a | ddp | 2 | 4 | 110 | 30 | 100 | +10.4% |" in body
    assert "| language/a | ddp | 2 | 4 | 110 | 30 | 137 | -19.4% |" in body
    assert "| largest error of a plan | <= 15 % | 19.42 % | **no** |" in body
    assert body.strip().endswith("`python benchmarks/plan_error.py`, machine abacus, date 2026-11-23, torch 2.13.")


def test_the_file_of_a_dry_run_makes_a_page(build_docs: ModuleType, tmp_path: Path) -> None:
    """The builder reads what the GPU benchmark writes, not only what this file makes up."""
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks" / "gpu_kernels.py")
    assert spec is not None
    assert spec.loader is not None
    kernels = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, kernels)
        spec.loader.exec_module(kernels)
        assert kernels.main(["--dry-run", "--json", str(tmp_path / "kernels_dry.json")]) == 0
    body = sections(build_docs.page(tmp_path))["Kernels on a GPU"]
    held = 6 + sum(op.multiplies for op in kernels.OPS)
    assert body.count("\n| ") == 2 + len(kernels.OPS) + 4 * len(kernels.STEPS) + 2 + held
    assert "not yet measured" not in body


def test_the_comparison_gets_a_compact_table(build_docs: ModuleType, results: Path) -> None:
    other = OPTIM_STEP | {"machine": {"cpu": "Sliderule"}, "train_step": {}}
    other["optimizers"] = {"torch Muon (matrices)": optimizer(20.0)}
    (results / "optim_step_sliderule.json").write_text(json.dumps(other))
    assert build_docs.short_table(results).splitlines() == [
        "| optimiser | state, MiB | steady, x AdamW: Abacus 3 | amortised, x AdamW: Abacus 3 "
        "| steady, x AdamW: Sliderule | amortised, x AdamW: Sliderule |",
        "|---|---|---|---|---|---|",
        "| torch AdamW fused | 82.50 | 1.00 | 1.50 |  |  |",
        "| galore-torch, rank 64 | 82.50 | 6.00 | 6.50 |  |  |",
        "| apollo-torch, rank 64 | 82.50 | 10.00 | 10.50 |  |  |",
        "| fira, rank 64 | not yet measured |  |  |  |  |",
        "| torch Muon | 40.50 | 85.00 | 85.50 | 20.00 | 20.50 |",
        "| lightspan FactoredMuon | not yet measured |  |  |  |  |",
        "| lightspan FactoredMuon, bfloat16 weights and products | not yet measured |  |  |  |  |",
        "| lightspan LowRank, rank 64 | 17.30 | 3.25 | 3.75 |  |  |",
        "| lightspan LowRank without residual, rank 64 | not yet measured |  |  |  |  |",
        "| lightspan LowRank, rank 64, bfloat16 weights | 82.50 | 1.75 | 2.25 |  |  |",
        "| lightspan LowRank, rank 64, int8 moments | 5.75 | 4.50 | 5.00 |  |  |",
        "",
        "A whole training step with lightspan's projected backward takes 0.80x AdamW's on Abacus 3.",
    ]


@pytest.mark.parametrize("between", ["", "an older table\n"])
def test_only_what_stands_between_the_markers_is_replaced(build_docs: ModuleType, results: Path, between: str) -> None:
    root, (begin, end) = results.parents[1], (build_docs.BEGIN, build_docs.END)
    page = root / "docs" / "comparison.md"
    page.parent.mkdir()
    page.write_text(f"before\n{begin}{between}{end}after\n")
    for _ in range(2):
        build_docs.build(root)
        assert page.read_text() == f"before\n{begin}{build_docs.short_table(results)}{end}after\n"
    assert (root / "docs" / "benchmarks.md").read_text() == build_docs.page(results)


def test_a_page_without_both_markers_stays_as_it_is(build_docs: ModuleType) -> None:
    for text in ("text\n", f"text\n{build_docs.BEGIN}text\n", f"text\n{build_docs.END}{build_docs.BEGIN}text\n"):
        assert build_docs.with_fragment(text, "table\n") == text


def test_the_committed_pages_are_those_of_the_committed_results(build_docs: ModuleType) -> None:
    """After a new measurement: `make pages`."""
    results, docs = ROOT / "benchmarks" / "results", ROOT / "docs"
    assert (docs / "benchmarks.md").read_text() == build_docs.page(results)
    comparison = (docs / "comparison.md").read_text()
    assert build_docs.BEGIN in comparison
    assert comparison == build_docs.with_fragment(comparison, build_docs.short_table(results))


def test_goals_of_quality_are_met_missed_or_not_measured(build_docs: ModuleType) -> None:
    def finals(**losses: list[float | None]) -> dict[str, list[dict[str, Any]]]:
        bytes_of = {"adamw": 100, "muon": 52, "factored_muon": 14}
        return {
            name: [{"seed": i, "val_loss": loss, "state_bytes": bytes_of[name]} for i, loss in enumerate(of)]
            for name, of in losses.items()
        }

    found = {
        name: value
        for name, _, _, value, _ in build_docs.quality_goals(
            {
                "austen": finals(adamw=[2.0, 2.0], muon=[1.5, 1.7], factored_muon=[1.25, 1.45, 9.0]),
                "vit": finals(muon=[0.5], factored_muon=[0.4]),
                "large": finals(adamw=[2.0], muon=[1.5], factored_muon=[None]),
            }
        )
    }
    assert found == {
        "austen: validation loss, factored_muon minus muon": pytest.approx(-0.25),
        "austen: optimiser state, factored_muon over adamw": 0.14,
        "vit: validation loss, factored_muon minus muon": pytest.approx(-0.1),
        "vit: optimiser state, factored_muon over adamw": None,
        "large: validation loss, factored_muon minus muon": math.inf,
        "large: optimiser state, factored_muon over adamw": 0.14,
    }
