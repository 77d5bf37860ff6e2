"""The short quickstart under every strategy, and the losses it must have: golden/NAME.json, written by
`python tests/golden/regenerate.py`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import rank_processes

from lightspan.cli.runs.differences import trace_of

GOLDEN = Path(__file__).parent / "golden"
CURVES = {
    # Momentum in 8 bits is rounded at random, and ranks with shards draw other numbers than one process.
    "quickstart": (
        "model.init_args.optimizer.init_args.moments.class_path=lightspan.optim.matrices.moments.Float32Moments",
    ),
    # New frames every three steps, so that a refresh lies on each side of a resume.
    "quickstart_lowrank": (
        "model.init_args.optimizer.init_args.rank=8",
        "model.init_args.optimizer.init_args.refresh=3",
    ),
    "quickstart_adamw": (),
}
"""Recipe under language/ -> what it takes to be as small as golden/short.yaml makes it."""
STEPS = 8
ROUNDING = 1e-7
"""Largest relative difference of losses in float64, whatever the processor, the ranks and the strategy. It is 1e-15 as
long as transformers' norms and rotary angles, float32 in any model, round alike, and 2e-9 with all weights rounded to
float32 once.
"""
FLOAT32 = 1e-5
"""The same to a run in float32, the only precision without gradient scaling that Lightning gives DeepSpeed."""


@dataclass(frozen=True)
class Scenario:
    """A run in one or more starts.

    Attributes:
        golden: one of CURVES, and the name of the file with the losses it must have.
        starts: of each start the number of ranks, and the optimiser steps done at its end.
        flags: what is laid over the recipe.
        tolerance: largest relative difference of losses.
        environment: variables of the ranks.
    """

    golden: str
    starts: tuple[tuple[int, int], ...]
    flags: tuple[str, ...] = ()
    tolerance: float = ROUNDING
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """Of each optimiser step the mean loss over all ranks, and the digests of all samples, sorted."""

    losses: list[float]
    samples: list[list[str]]


def read(golden: str) -> Curve:
    return Curve(**json.loads((GOLDEN / f"{golden}.json").read_text()))


def run(scenario: Scenario, folder: Path) -> Curve:
    """Runs `lightspan fit` once for each start, in `folder`."""
    text = folder / "text"
    text.mkdir(parents=True)
    for part in range(6):
        (text / f"{part}.txt").write_text(_sums(80 * part, 80 * (part + 1)))
    for ranks, steps in scenario.starts:
        arguments = [
            "fit", f"language/{scenario.golden}", "-c", str(GOLDEN / "short.yaml"),
            *CURVES[scenario.golden], *scenario.flags,
            "--allow-module", "tiny_lab", "--run", str(folder / "run"), f"trainer.devices={ranks}",
            f"trainer.callbacks.length.init_args.steps={steps}", f"data.init_args.paths=[{text}]",
        ]  # fmt: skip
        ended = rank_processes.launch(arguments, ranks, folder / "run", environment=scenario.environment)
        assert ended.statuses == [0] * ranks, ended.said
    trace = trace_of(folder / "run")
    assert sorted(trace) == list(range(STEPS))
    return Curve([trace[step].loss for step in range(STEPS)], [trace[step].samples for step in range(STEPS)])


def _sums(first: int, last: int) -> str:
    """A text that is the same wherever the tests run, which the standard library's source is not."""
    return "".join(f"{n} and {n + 7} make {2 * n + 7}; {n} times itself is {n * n}.\n" for n in range(first, last))
