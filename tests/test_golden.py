"""One loss curve for all: however the short quickstart is run, its losses are those of golden/*.json."""

from pathlib import Path

import golden_runs
import pytest
from golden_runs import CURVES, FLOAT32, GOLDEN, STEPS, Curve, Scenario
from tiny_project.tiny_lab import zero

pytestmark = pytest.mark.runs

FSDP2 = ("-c", "scale/fsdp2", "trainer.accelerator=cpu")
SCENARIOS = {
    "one process": Scenario("quickstart", ((1, STEPS),)),
    "FSDP2 on two, one, then four ranks": Scenario("quickstart", ((2, 3), (1, 6), (4, STEPS)), FSDP2),
    "LowRank in one process": Scenario("quickstart_lowrank", ((1, STEPS),)),
    "LowRank on two ranks of DDP": Scenario("quickstart_lowrank", ((2, STEPS),), ("-c", "scale/cpu2")),
    "LowRank on four ranks of DDP, resumed": Scenario("quickstart_lowrank", ((4, 3), (4, STEPS)), ("-c", "scale/cpu2")),
    "LowRank on two ranks of FSDP2": Scenario("quickstart_lowrank", ((2, STEPS),), FSDP2),
    "LowRank with FSDP2 on two, one, then four ranks": Scenario(
        "quickstart_lowrank", ((2, 3), (1, 6), (4, STEPS)), FSDP2
    ),
    "AdamW in one process": Scenario("quickstart_adamw", ((1, STEPS),)),
}


def zero_of(stage: int) -> Scenario:
    """Elementwise optimisers only: ZeRO refuses those of matrices."""
    strategy = ("trainer.strategy.class_path=tiny_lab.zero.OnCPU", f"trainer.strategy.init_args.stage={stage}")
    flags = ("trainer.plugins=[]", *strategy)
    return Scenario("quickstart_adamw", ((2, STEPS),), flags, FLOAT32, zero.environment())


def assert_golden(curve: Curve, scenario: Scenario) -> None:
    golden = golden_runs.read(scenario.golden)
    assert len(golden.losses) == STEPS
    assert curve.samples == golden.samples
    assert curve.losses == pytest.approx(golden.losses, rel=scenario.tolerance, abs=0)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.smoke] * (name == "one process")) for name in SCENARIOS]
)
def test_losses_are_the_golden_ones(name: str, tmp_path: Path) -> None:
    assert_golden(golden_runs.run(SCENARIOS[name], tmp_path), SCENARIOS[name])


@pytest.mark.skipif(not zero.READY, reason=zero.NOT_READY)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_under_zero_are_the_golden_ones(stage: int, tmp_path: Path) -> None:
    assert_golden(golden_runs.run(zero_of(stage), tmp_path), zero_of(stage))


def test_a_resumed_run_has_the_golden_losses_and_every_bit_of_the_straight_one(tmp_path: Path) -> None:
    straight, resumed = (Scenario("quickstart_lowrank", starts) for starts in (((1, STEPS),), ((1, 4), (1, STEPS))))
    curve = golden_runs.run(resumed, tmp_path / "resumed")
    assert_golden(curve, resumed)
    assert curve.losses == golden_runs.run(straight, tmp_path / "straight").losses


def test_every_golden_file_is_compared() -> None:
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(CURVES) == {s.golden for s in SCENARIOS.values()}
