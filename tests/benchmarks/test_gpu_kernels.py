"""The GPU benchmark without a GPU: its bytes, its refusals and its file; interpreted kernels pass the check of ops."""

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from kernel_inputs import needs_triton

FILE = Path(__file__).parents[2] / "benchmarks" / "gpu_kernels.py"
GPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the benchmark would run on it")


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    """The benchmark under a name of its own: `kernels` is a package that transformers looks for."""
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FILE)
    assert spec is not None
    assert spec.loader is not None
    module, threads = importlib.util.module_from_spec(spec), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        torch.set_num_threads(1)  # threads of a busy machine wait for each other longer than these sizes take
        yield module
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dry_run(kernels: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The file of a dry run."""
    file = tmp_path_factory.mktemp("benchmark") / "kernels.json"
    assert kernels.main(["--dry-run", "--json", str(file)]) == 0
    return json.loads(file.read_text())


def operands(kernels: ModuleType, name: str) -> tuple[Any, tuple[Any, ...]]:
    op = next(op for op in kernels.OPS if op.name == name)
    return op, op.arguments(kernels.Inputs(kernels.TINY, torch.device("cpu")))


@GPU_ONLY
def test_without_a_gpu_it_says_so_in_one_sentence_and_exits_with_2(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "benchmark", None)  # nothing may have been started by then
    assert kernels.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("torch sees no GPU here")
    assert said.err.count("\n") == 1


def test_every_op_and_every_step_has_its_row(kernels: ModuleType, dry_run: dict[str, Any]) -> None:
    assert [row["name"] for row in dry_run["ops"]] == [op.name for op in kernels.OPS]
    for rows in dry_run["steps"].values():
        expected = [(step.name, mode) for step in kernels.STEPS for mode in ("eager", "graph")]
        assert [(row["name"], row["mode"]) for row in rows] == expected
    assert list(dry_run["steps"]) == ["one matrix", "LLaMA-7B"]
    assert dry_run["refused"] == {}
    assert {"card", "driver", "cuda", "torch", "triton", "date", "copy_gb_per_s", "layers"} <= dry_run.keys()


def test_every_row_is_finite_and_adamw_is_one_of_itself(dry_run: dict[str, Any]) -> None:
    rows = [*dry_run["ops"], *dry_run["steps"]["one matrix"], *dry_run["steps"]["LLaMA-7B"]]
    for row in rows:
        assert all(math.isfinite(value) and value > 0 for value in row.values() if isinstance(value, float)), row
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
        floor_us = row["bytes"] / dry_run["copy_gb_per_s"] / 1e3
        assert row["share_of_floor"] == pytest.approx(floor_us / row["us"])
        if row["name"].startswith("torch"):
            assert row["x_adamw"] == 1


def test_the_bytes_of_an_op_are_what_must_be_read_and_written(kernels: ModuleType, dry_run: dict[str, Any]) -> None:
    """By hand: G, W in bfloat16, coordinates, frames and moments in float32; 0-d tensors weigh 4 bytes, a seed 8."""
    sizes = kernels.TINY
    B, M, N, R = sizes.matrices, sizes.rows, sizes.columns, sizes.rank
    MN, MR, NR, rates = B * M * N, B * M * R, B * N * R, 4 + 4 + 8
    by_hand = {
        "project": 2 * MN + 4 * NR + 4 * MR + 4 * B * M,
        "low_rank_adam, float32": 24 * MR + 4 * B * R,
        "low_rank_adam, bfloat16": 16 * MR + 4 * B * R + 8,
        "low_rank_adam, int8": 12 * MR + 16 * B * M + 4 * B * R + 8,
        "backproject_update": 4 * MN + 4 * MR + 4 * NR + rates,
        "backproject_update, residual": 6 * MN + 4 * MR + 4 * NR + 4 * B * M + rates,
        "walsh_hadamard": 4 * MN,
        "symmetric_product": 2 * MN + 2 * B * N * N,
        "symmetric_product, added": 2 * MN + 4 * B * N * N,
        "dct_energies": 2 * MN + 4 * B * N,
        "quantise_error, int8": 4 * MN + 4 * MR + 4 * NR + MN + 4 * B * M,
        "quantise_error, int4": 4 * MN + 4 * MR + 4 * NR + MN // 2 + 4 * B * M,
        "add_error, int8": 2 * MN + MN + 4 * B * M + 4 + 4 * MN,
        "add_error, int4": 2 * MN + MN // 2 + 4 * B * M + 4 + 4 * MN,
    }
    assert {row["name"]: row["bytes"] for row in dry_run["ops"]} == by_hand


def test_the_bytes_of_the_steps_are_those_of_the_formulas(kernels: ModuleType) -> None:
    """Per weight, at q = r / n = 1 / 32: 14 and 20 for AdamW in bfloat16, 6 + 20 q to 8 + 28 q for LowRank."""
    square = [(4096, 4096)]
    per_weight = {step.name: step.bytes(square, 128) / 4096**2 for step in kernels.STEPS}
    assert per_weight["torch AdamW fused"] == 14
    assert per_weight["torch AdamW fused, clip_grad_norm_"] == 20
    assert per_weight["LowRank no residual"] == 6 + 20 / 32
    assert per_weight["LowRank, max_norm"] == 8 + 28 / 32
    step = kernels.STEPS[2]
    assert step.bytes([(4096, 11008)], 128) == step.bytes([(11008, 4096)], 128)  # the longer side is kept


def test_fewer_layers_are_measured_where_memory_is_short(kernels: ModuleType) -> None:
    sizes = kernels.Sizes()
    assert kernels.layers_that_fit(sizes, 78 * 2**30) == 32
    assert 4 <= kernels.layers_that_fit(sizes, 22 * 2**30) < 16
    with pytest.raises(kernels.UserError, match=r"1\.0 GiB of free device memory hold no layer of 1\.8 GiB"):
        kernels.layers_that_fit(sizes, 2**30)


@needs_triton
def test_interpreted_kernels_pass_the_check(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tolerances leave room for what kernels and references round differently, stochastic rounding included."""
    uneven = kernels.Sizes(matrices=2, rows=21, columns=8, rank=1)
    for op in kernels.OPS:
        monkeypatch.setattr(op.module, op.function, getattr(op.module, f"{op.function}_triton"))
        for sizes in (kernels.TINY, uneven):
            assert kernels.verified_traffic(op, op.arguments(kernels.Inputs(sizes, torch.device("cpu")))) > 0, op.name


FAULTS = {
    "shifted by a column": lambda t: t.copy_(t.roll(1, -1)),
    "last row missing": lambda t: t[..., -1, :].zero_(),
    "one number off": lambda t: t.view(-1)[5:6].copy_(
        torch.full((), math.nan) if t.is_floating_point() else ~t[0, 0, :1]
    ),
}
OUTPUTS = {  # where an op's result lies, among (result, arguments)
    "project": lambda result, arguments: result[0],
    "low_rank_adam, int8": lambda result, arguments: arguments[1],
    "backproject_update": lambda result, arguments: arguments[0][1],
    "quantise_error, int4": lambda result, arguments: arguments[4],
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", OUTPUTS)
def test_an_op_that_is_wrong_is_refused(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, fault: str
) -> None:
    op, arguments = operands(kernels, name)
    right = op.run

    def wrong(*given: Any) -> Any:
        result = right(*given)
        FAULTS[fault](OUTPUTS[name](result, given))
        return result

    monkeypatch.setattr(op.module, op.function, wrong)
    with pytest.raises(kernels.UserError, match="wrong on this device: off by"):
        kernels.verified_traffic(op, arguments)


def test_what_is_wrong_is_not_timed_and_neither_are_the_steps_made_of_it(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("out of registers\nand more")

    monkeypatch.setattr(kernels.project, "project", fails)
    file = tmp_path / "kernels.json"
    assert kernels.main(["--dry-run", "--json", str(file)], kernels.OPS[:2]) == 1
    result = json.loads(file.read_text())
    assert result["refused"] == {
        "project": "RuntimeError: out of registers",
        "whole steps": "made of what is wrong: project",
    }
    assert [row["name"] for row in result["ops"]] == ["low_rank_adam, float32"]
    assert result["steps"] == {}
    assert "not timed: project: RuntimeError: out of registers" in capsys.readouterr().out


def test_a_captured_step_that_moves_other_weights_is_refused(kernels: ModuleType) -> None:
    class Stale(kernels.Dry):
        """A capture that replays nothing."""

        def capture(self, step: Any) -> Any:
            super().capture(step)
            return lambda: None

    step = next(step for step in kernels.STEPS if step.name == "LowRank")
    kernels.require_equal_capture(kernels.Dry(), step, kernels.TINY)
    with torch.no_grad(), pytest.raises(kernels.UserError, match="the captured step moves weights otherwise"):
        kernels.require_equal_capture(Stale(), step, kernels.TINY)


def test_a_step_that_cannot_be_captured_is_named_and_timed_eagerly_only(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(gpu: Any, step: Any, sizes: Any) -> None:
        if step.name == "LowRank":
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(kernels, "require_equal_capture", fails)
    result = kernels.benchmark(kernels.Dry(), kernels.TINY, kernels.OPS[:1], 1)
    assert list(result["refused"]) == ["LowRank, captured"]
    modes = [row["mode"] for row in result["steps"]["LLaMA-7B"] if row["name"] == "LowRank"]
    assert modes == ["eager"]


def test_times_of_fewer_layers_are_scaled_to_all(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "layers_that_fit", lambda sizes, free: 1)
    monkeypatch.setattr(kernels.Dry, "time_us", lambda self, function, hides_host: 1.0)
    result = kernels.benchmark(kernels.Dry(), kernels.TINY, kernels.OPS[:1], 1)
    assert result["layers"] == {"measured": 1, "scaled_to": 2}
    assert {row["us"] for row in result["steps"]["LLaMA-7B"]} == {2.0}
    step, whole = kernels.STEPS[0], list(kernels.TINY.layer) * 2
    assert result["steps"]["LLaMA-7B"][0]["bytes"] == step.bytes(whole, kernels.TINY.rank)
