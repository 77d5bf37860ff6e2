"""How long one optimiser step takes, and how much state it keeps: ours, torch's and other packages', in one process.

    python benchmarks/optim_step.py [--only NAME ...] [--keep | --json FILE|-]

Every figure is a ratio to torch's fused float32 AdamW of the same run, minimum over minimum: rounds are interleaved, so
that a busy machine is busy for all. Per optimiser: the steady step, in which no frame is chosen anew; the refresh step,
in which all are; and both amortised over the method's own gap. Peers refresh all matrices in one step, ours take turns,
so for ours also the slowest step over the median one at the default schedule. Of methods that refresh in every step the
amortised figure is the one to compare. All optimisers move the same weights and see the same gradients. A peer that is
not installed is named, with what pip would have to install.

The second part times a whole training step of a small Llama: fused AdamW against ours, with the backward pass that
makes projected gradients only and with the ordinary one.
"""

import argparse
import copy
import gc
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from peers import (
    LR,
    NEVER,
    Case,
    floor_cases,
    own_cases,
    own_gap,
    peer_cases,
    short_name,
    state_and_constants,
    torch_cases,
)
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lightspan.backbones.language import llama
from lightspan.core.files.atomic import write_atomic
from lightspan.optim.groups import ParameterGroups
from lightspan.optim.low_rank.gradients import attach
from lightspan.optim.low_rank.optimizer import LowRank

RESULTS = Path(__file__).parent / "results"
REFERENCE = "torch AdamW fused"
REFRESH_ROUNDS = 3  # a refresh by SVD takes seconds


@dataclass(frozen=True)
class Sizes:
    """A transformer's parameters, 6 blocks of width 384 with 10.8 million numbers, and the Llama of the whole step."""

    layers: int = 6
    width: int = 384
    ranks: tuple[int, ...] = (64,)
    model_width: int = 512
    model_depth: int = 4
    model_rank: int = 64
    batch: tuple[int, int] = (8, 128)  # sequences, tokens

    @property
    def matrices(self) -> list[tuple[int, int]]:
        d = self.width
        return [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)] * self.layers

    @property
    def others(self) -> list[tuple[int, ...]]:
        d = self.width
        return [(256, d), (128, d), *[(d,)] * (2 * self.layers + 1)]


QUICK = Sizes(layers=1, width=32, ranks=(4,), model_width=32, model_depth=2, model_rank=4, batch=(2, 16))


@dataclass
class Weights:
    """Parameters with their gradients in place, shared by all optimisers of a dtype."""

    matrices: list[Parameter]
    others: list[Parameter]

    @staticmethod
    def make(sizes: Sizes, dtype: torch.dtype) -> "Weights":
        """Gradients are of the size that training shows, 1e-3, with falling spectra above a floor of noise."""
        generator = torch.Generator().manual_seed(0)

        def parameter(shape: tuple[int, ...]) -> Parameter:
            weight = Parameter((0.02 * torch.randn(shape, generator=generator)).to(dtype))
            gradient = 1e-3 * torch.randn(shape, generator=generator)
            if len(shape) == 2:
                signal_R = 1e-3 * 0.9 ** torch.arange(16.0)
                left_MR, right_RN = (torch.randn(s, generator=generator) for s in ((shape[0], 16), (16, shape[1])))
                gradient += left_MR * signal_R @ right_RN
            weight.grad = gradient.to(dtype)
            return weight

        return Weights([parameter(s) for s in sizes.matrices], [parameter(s) for s in sizes.others])


@dataclass
class Run:
    """A case with its optimisers and their times in milliseconds."""

    case: Case
    steady: Optimizer
    refreshing: Optimizer | None
    gap: int | None
    steady_ms: list[float] = field(default_factory=list)
    refresh_ms: list[float] = field(default_factory=list)
    slowest_to_median: float | None = None


def timed_ms(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def prepared(case: Case, weights: Weights) -> Run:
    """Optimisers built and warm: state exists, what compiles has compiled."""

    def build(gap: int | None) -> Optimizer:
        return case.build(weights.matrices, weights.others, gap)

    gap = own_gap(build(None)) if case.refreshes else None
    run = Run(case, build(NEVER), build(1) if case.refreshes else None, gap)
    for optimizer in (run.steady, run.refreshing):
        if optimizer is not None:
            optimizer.step()
    run.steady.step()
    if gap is not None and gap > 1 and not case.requirement:
        run.slowest_to_median = slowest_to_median(build(None), gap)
    return run


def slowest_to_median(optimizer: Optimizer, gap: int) -> float:
    """The slowest step over the median one in a period of `gap` steps after the first step, which refreshes everything.

    Two periods are run and the smaller time of each place in the period counts: what is slow in both is the schedule,
    not the machine.
    """
    optimizer.step()
    first, second = ([timed_ms(optimizer.step) for _ in range(gap)] for _ in range(2))
    period = [min(pair) for pair in zip(first, second, strict=True)]
    return max(period) / median(period)


def measure(cases: Iterable[Case], sizes: Sizes, rounds: int) -> tuple[list[Run], dict[str, str]]:
    """Times of all cases in interleaved rounds, and why some did not run."""
    weights = {dtype: Weights.make(sizes, dtype) for dtype in (torch.float32, torch.bfloat16)}
    runs, skipped = [], {}
    for case in cases:
        try:
            runs.append(prepared(case, weights[case.dtype]))
        except Exception as error:
            if not case.requirement:
                raise
            # Others' code on a platform that it was not made for: one that fails must not stop the run.
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            missing = isinstance(error, ImportError)
            skipped[case.name] = f"pip install {case.requirement} ({reason})" if missing else reason
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for run in runs:
                run.steady_ms.append(timed_ms(run.steady.step))
                if run.refreshing is not None and number < REFRESH_ROUNDS:
                    run.refresh_ms.append(timed_ms(run.refreshing.step))
    finally:
        gc.enable()
    return runs, skipped


def figures(run: Run, reference_ms: float) -> dict[str, Any]:
    """What the file says about one optimiser; what has no meaning for it is None."""
    steady, refresh, gap = min(run.steady_ms), min(run.refresh_ms, default=None), run.gap
    amortised = steady if refresh is None or gap is None else ((gap - 1) * steady + refresh) / gap
    state, constants = state_and_constants(run.steady)
    return {
        "dtype": short_name(run.case.dtype),
        "rank": run.case.rank,
        "steady_x": steady / reference_ms,
        "refresh_x": None if refresh is None else refresh / reference_ms,
        "amortised_x": amortised / reference_ms,
        "state_mib": sum(state.values()),
        "state_mib_by_dtype": state,
        "constants_mib": constants,
        "gap": gap,
        "steady_ms": steady,
        "steady_median_ms": median(run.steady_ms),
        "refresh_ms": refresh,
        "slowest_to_median": run.slowest_to_median,
    }


def measure_train_step(sizes: Sizes, rounds: int) -> dict[str, float]:
    """Milliseconds of forward, backward and optimiser step: minimum and median per optimiser.

    Our two drop the residual: what a projected backward never makes cannot be scaled. They refresh by their default
    schedule.
    """
    torch.manual_seed(0)
    width, (batch, tokens) = sizes.model_width, sizes.batch
    original = llama(256, width, sizes.model_depth, max(width // 64, 2), 8 * width // 3 // 16 * 16, tokens)
    text_BT = torch.randint(256, (batch, tokens))

    def adamw(model: nn.Module) -> Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)

    def ours(backward: Literal["projected", "whole"]) -> Callable[[nn.Module], Optimizer]:
        def build(model: nn.Module) -> Optimizer:
            groups = ParameterGroups().build(model)
            optimizer = LowRank(groups, lr=LR, rank=sizes.model_rank, residual=None, backward=backward)
            if backward == "projected":
                attach(model, optimizer)
            return optimizer

        return build

    def step_of(build: Callable[[nn.Module], Optimizer]) -> Callable[[], None]:
        model = copy.deepcopy(original)
        optimizer = build(model)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            model(input_ids=text_BT, labels=text_BT).loss.backward()
            optimizer.step()

        for _ in range(2):
            step()
        return step

    builds = {"adamw": adamw, "projected_backward": ours("projected"), "whole_backward": ours("whole")}
    steps = {name: step_of(build) for name, build in builds.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(timed_ms(step))
    smallest = {f"{name}_ms": min(values) for name, values in times.items()}
    return smallest | {f"{name}_median_ms": median(values) for name, values in times.items()}


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {}
    for requirement in sorted({case.requirement for case in peer_cases([1])}):
        try:
            versions[requirement] = metadata.version(requirement)
        except metadata.PackageNotFoundError:
            continue
    cpu = models[0] if models else platform.processor()
    return {"cpu": cpu, "cores": os.cpu_count(), "torch": torch.__version__, "peers": versions}


def kept(cpu: str) -> Path:
    """The results file of a processor: ratios of arithmetic to memory traffic hold for one only."""
    name = re.sub(r"\([a-z]*\)|[^a-z0-9]+", " ", cpu.lower())
    return RESULTS / f"optim_step_{'_'.join(name.split())}.json"


def table(result: dict[str, Any]) -> Table:
    """The optimisers, one a row."""
    title = f"One step: x is against {REFERENCE}; mean is over the gap; slowest is the slowest step over the median one"
    drawn = Table(title=title)
    drawn.add_column("optimiser", no_wrap=True)
    for column in ("rank", "min ms", "median", "steady x", "refresh x", "gap", "mean x", "slowest", "MiB", "const"):
        drawn.add_column(column, justify="right")
    for name, row in result["optimizers"].items():
        drawn.add_row(
            name,
            str(row["rank"] or ""),
            f"{row['steady_ms']:.2f}",
            f"{row['steady_median_ms']:.2f}",
            f"{row['steady_x']:.2f}",
            "" if row["refresh_x"] is None else f"{row['refresh_x']:.2f}",
            str(row["gap"] or ""),
            f"{row['amortised_x']:.2f}",
            "" if row["slowest_to_median"] is None else f"{row['slowest_to_median']:.2f}",
            f"{row['state_mib']:.1f}",
            f"{sum(row['constants_mib'].values()):.2f}" if row["constants_mib"] else "",
        )
    return drawn


def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures, as they are written to the file."""
    sizes = QUICK if arguments.quick else Sizes()
    ranks = arguments.ranks or list(sizes.ranks)
    rounds = arguments.rounds or (2 if arguments.quick else 9)
    torch.set_num_threads(arguments.threads)
    # As the first activations of a training run do: after a large block has been freed, glibc keeps memory instead of
    # handing it back, and no optimiser's temporaries cost page faults in every step.
    torch.zeros(31 * 2**18)
    before = os.getloadavg()
    cases = [*torch_cases(), *floor_cases(ranks), *peer_cases(ranks), *own_cases(ranks)]
    wanted = [part.lower() for part in arguments.only]
    if unknown := [part for part in wanted if not any(part in case.name.lower() for case in cases)]:
        raise SystemExit(
            f"--only {unknown[0]}: no name contains it; there are {', '.join(case.name for case in cases)}"
        )
    chosen = [c for c in cases if c.name == REFERENCE or not wanted or any(part in c.name.lower() for part in wanted)]
    runs, skipped = measure(chosen, sizes, rounds)
    reference_ms = min(runs[0].steady_ms)
    return {
        "shapes": {"matrices": sizes.matrices, "others": sizes.others},
        "threads": arguments.threads,
        "date": time.strftime("%Y-%m-%d"),
        "rounds": rounds,
        "optimizers": {run.case.name: figures(run, reference_ms) for run in runs},
        "train_step": measure_train_step(sizes, rounds),
        "skipped": skipped,
        "machine": machine(),
        "load": {"before": before, "after": os.getloadavg()},
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    written = parser.add_mutually_exclusive_group()
    written.add_argument("--json", metavar="FILE", help="write the figures there; - is standard output")
    written.add_argument("--keep", action="store_true", help="write them to results/optim_step_<processor>.json")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default 9)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--ranks", type=int, nargs="+", help="of every low-rank optimiser (default 64)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="those whose names contain one of these")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, 2 rounds: whether it works, not how fast")
    arguments = parser.parse_args(argv)
    result = benchmark(arguments)
    console = Console(file=sys.stderr if arguments.json == "-" else sys.stdout)
    console.width = max(console.width, 140)  # into a pipe too
    console.print(table(result))
    for name, reason in result["skipped"].items():
        console.print(f"skipped: {name}: {reason}", markup=False, highlight=False, soft_wrap=True)
    train, host, load = result["train_step"], result["machine"], result["load"]
    times = ", ".join(f"{key[:-3]} {ms:.1f} ms" for key, ms in train.items())
    console.print(f"Training step of a Llama: {times}", highlight=False)
    averages = " -> ".join(" ".join(f"{value:.2f}" for value in load[when]) for when in ("before", "after"))
    peers = ", ".join(f"{name} {version}" for name, version in host["peers"].items()) or "no peers installed"
    about = f"{host['cpu']}, {arguments.threads} threads, torch {host['torch']}, {peers}; load {averages}"
    console.print(about, highlight=False)
    if arguments.json == "-":
        print(json.dumps(result, indent=1))
    elif path := kept(host["cpu"]) if arguments.keep else arguments.json:
        write_atomic(Path(path), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
