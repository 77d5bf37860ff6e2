"""The optimiser benchmark on tiny shapes: whether its figures mean what they say, not how large they are."""

import importlib
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lightspan.core.memory import MIB, state_bytes

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PEER_PACKAGES = ("galore_torch", "apollo_torch", "fira", "pytorch_optimizer", "bitsandbytes", "torchao")
CHOSEN = ("lightspan LowRank r4", "lightspan LowRank no residual r4", "torch AdamW for-loop", "galore-torch", "8bit")


@pytest.fixture(scope="module")
def optim_step() -> Iterator[ModuleType]:
    """The benchmark, imported where no peer can be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        loaded = [name for name in sys.modules if name.startswith(tuple(f"{package}." for package in PEER_PACKAGES))]
        for name in (*PEER_PACKAGES, *loaded):
            patch.setitem(sys.modules, name, None)
        yield importlib.import_module("optim_step")


@pytest.fixture(scope="module")
def result(optim_step: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The file of a quick run."""
    file, threads = tmp_path_factory.mktemp("benchmark") / "optim_step.json", torch.get_num_threads()
    optim_step.main(["--quick", "--threads", "1", "--json", str(file), "--only", *CHOSEN])
    torch.set_num_threads(threads)
    return json.loads(file.read_text())


def test_the_file_has_the_shape_that_its_readers_expect(result: dict[str, Any]) -> None:
    assert {"shapes", "threads", "optimizers", "train_step"} <= result.keys()
    assert result["threads"] == 1
    assert {"adamw_ms", "projected_backward_ms"} <= result["train_step"].keys()
    for row in result["optimizers"].values():
        assert {"dtype", "rank", "steady_x", "refresh_x", "amortised_x", "state_mib"} <= row.keys()


def test_all_ratios_are_finite_and_positive(result: dict[str, Any]) -> None:
    assert len(result["optimizers"]) >= 4
    for name, row in result["optimizers"].items():
        ratios = [row["steady_x"], row["amortised_x"], row["state_mib"]]
        if name.startswith("lightspan"):
            ratios += [row["refresh_x"], row["slowest_to_median"]]
        assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios), name


def test_the_yardstick_is_one_of_itself(result: dict[str, Any]) -> None:
    row = result["optimizers"]["torch AdamW fused"]
    assert (row["steady_x"], row["amortised_x"], row["refresh_x"]) == (1.0, 1.0, None)


def test_a_refresh_is_spread_over_the_method_s_own_gap(result: dict[str, Any]) -> None:
    row = result["optimizers"]["lightspan LowRank r4"]
    assert row["gap"] == 50
    assert row["amortised_x"] == pytest.approx((49 * row["steady_x"] + row["refresh_x"]) / 50)


def test_every_part_of_the_training_step_was_timed(result: dict[str, Any]) -> None:
    assert result["train_step"]["adamw_ms"] > 0
    assert result["train_step"]["whole_backward_ms"] > 0


def test_a_missing_peer_is_named_with_its_install_line(result: dict[str, Any]) -> None:
    for name, requirement in {"galore-torch r4": "galore-torch", "torchao AdamW8bit": "torchao"}.items():
        assert re.match(f"pip install {requirement} ", result["skipped"][name])
        assert name not in result["optimizers"]


def test_state_is_counted_as_the_library_counts_it(optim_step: ModuleType) -> None:
    weights = optim_step.Weights.make(optim_step.QUICK, torch.float32)
    optimizer = torch.optim.AdamW([*weights.matrices, *weights.others], fused=True)
    optimizer.step()
    state, constants = optim_step.state_and_constants(optimizer)
    assert sum(state.values()) * MIB == state_bytes(optimizer)
    assert constants == {}


def test_state_inside_objects_counts_once_and_constants_count_apart(optim_step: ModuleType) -> None:
    class Projector:
        def __init__(self) -> None:
            self.frame = torch.zeros(256, 1024)  # 1 MiB
            self.same = self.frame[:3]

    parameter = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = torch.optim.SGD([parameter])
    optimizer.state[parameter] = {"projector": Projector(), "codes": [torch.zeros(MIB, dtype=torch.int8)]}
    optimizer.table = torch.zeros(512, 1024, dtype=torch.bfloat16)
    state, constants = optim_step.state_and_constants(optimizer)
    assert state == {"float32": 1.0, "int8": 1.0}
    assert constants == {"SGD 512x1024 bfloat16": 1.0}


def test_only_what_is_slow_in_both_periods_counts_as_the_schedule_s(
    optim_step: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Milliseconds of two periods of four steps: place three is slow by schedule, one step by accident."""
    times = iter([2.0, 2.0, 3.0, 2.0, 2.0, 9.0, 3.5, 2.0])
    monkeypatch.setattr(optim_step, "timed_ms", lambda function: next(times))
    parameter = torch.nn.Parameter(torch.zeros(1))
    assert optim_step.slowest_to_median(torch.optim.SGD([parameter]), 4) == 1.5


def test_every_optimiser_of_torch_and_ours_takes_its_place(
    optim_step: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim_step, "slowest_to_median", lambda optimizer, gap: 1.0)
    weights = {dtype: optim_step.Weights.make(optim_step.QUICK, dtype) for dtype in (torch.float32, torch.bfloat16)}
    cases = [*optim_step.torch_cases(), *optim_step.own_cases([4])]
    runs = [optim_step.prepared(case, weights[case.dtype]) for case in cases]
    assert len(runs) > 20
    for run in runs:
        assert run.case.refreshes == (run.gap is not None) == (run.refreshing is not None), run.case.name


@pytest.mark.parametrize(
    ("cpu", "name"),
    [("AMD EPYC", "amd_epyc"), ("Intel(R) Xeon(R) Processor @ 2.1GHz", "intel_xeon_processor_2_1ghz")],
)
def test_results_are_kept_by_processor(optim_step: ModuleType, cpu: str, name: str) -> None:
    assert optim_step.kept(cpu).name == f"optim_step_{name}.json"
