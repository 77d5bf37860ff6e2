"""Quality next to speed: what each optimiser reaches on equal tokens, and what it pays in state and time.

    python benchmarks/lm_quality.py sweep|final|table [--only NAME ...] [--results FILE] [--clock wall|cpu]

One model and one text for all: a Llama of 2.3 million parameters (width 192, depth 5) on the bytes of the Python
standard library's source, batches of 8 windows of 128 tokens, the project's parameter groups, gradients clipped at 1, a
warm-up and a cosine schedule, betas (0.9, 0.95), decay 0.1 on the matrices, rank 48 (APOLLO-Mini: 1). The order of the
data and the first weights follow from the seed; one thread, so that the losses repeat bit by bit.

`sweep` finds two rates for each optimiser, of the matrices and of everything else, on seed 100 and by the online loss:
the mean training loss of the last fifth of a short run, whose windows are all new. Validation files are not used. The
other rate is fixed while the matrices' rate takes five values a factor of two apart; then the other rate takes five
around its centre; then the two neighbours of the matrices' rate are tried again. A line whose best value is an end
is extended until the best is inside. `final` trains seeds 0, 1 and 2 at these rates for the full budget and keeps a
validation curve, which gives the time to the loss that AdamW ends at on the same seed. `table` prints the results and
draws them next to the results file.

Budget: a step of AdamW takes 0.19 s on one core of a server CPU (AVX-512, 105 GFLOP/s in float32 products), nearly all
of it the model's, so 100 steps make a sweep run of 19 s and 300 steps a final run of 57 s, with ten validations of 1 s
outside the clock. Ten optimisers at twelve sweep and three final runs each are about 80 minutes of one core.

Every finished run is kept in benchmarks/results/lm_quality.json and never run again: stop and resume at any time, or
let two processes work on different optimisers. Delete the file after a change of the setup. Times are of training
alone, by the wall clock and by the processor's; `table --clock cpu` is the one to read if the machine was shared.
"""

import argparse
import fcntl
import functools
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightspan.backbones.language import llama
from lightspan.datamodules.loading.loader import ExactLoader
from lightspan.datamodules.text.windows import ByteText
from lightspan.drawing import COLOURS, canvas, png, tidy
from lightspan.errors import UserError
from lightspan.files import write_atomic
from lightspan.memory import MIB, state_bytes
from lightspan.objectives.language import next_token_loss
from lightspan.optim.groups import ParameterGroups
from lightspan.optim.schedules import WarmupCosine
from lightspan.sweeps.descent import best_on_line

RESULTS = Path(__file__).parent / "results" / "lm_quality.json"
SWEEP_SEED, FINAL_SEEDS = 100, (0, 1, 2)
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 0.1, 1.0
# Where the search of the matrices' rate starts. All lie on one grid of factor two, and all searches can leave theirs.
START = {
    "adamw": 1e-3,
    "muon": 4e-3,
    "low_rank": 4e-3,
    "galore": 8e-3,
    "dct_adamw": 4e-3,
    "trion": 16e-3,
    "ldadam": 4e-3,
    "fira": 8e-3,
    "apollo": 8e-3,
    "apollo_mini": 8e-3,
}
OTHER_START = 1.2e-2
# Presets by their names in tables and result files.
CLASSES = {
    "galore": "GaLore",
    "dct_adamw": "DCTAdamW",
    "trion": "Trion",
    "ldadam": "LDAdam",
    "fira": "FiraAdam",
    "apollo": "APOLLO",
    "apollo_mini": "APOLLOMini",
}
# What a preset is given beyond its defaults. The papers' 200 steps between frames belong to runs of ten thousand and
# more; with the 50 of `LowRank` all see several frames in a run.
OPTIONS: dict[str, dict[str, Any]] = {
    "galore": {"refresh": 50},
    "fira": {"refresh": 50},
    "apollo": {"refresh": 50},
    "apollo_mini": {"refresh": 50, "rank": 1},
    "dct_adamw": {"error_feedback": "int8", "rotate": True},
}
# One an optimiser, in the order of START: dark enough to read as text.
OWN_COLOURS = ("#1a1a1a", *COLOURS, "#b3202c", "#2e86ab", "#6b4226")
KEY = ("optimizer", "lr", "other_lr", "seed", "stage")
Row = dict[str, Any]
Rates = tuple[float, float]  # (matrices, everything else)


@dataclass(frozen=True)
class Setup:
    """The task and its budget; the same for all optimisers."""

    width: int = 192
    depth: int = 5
    heads: int = 6
    mlp_width: int = 512
    context: int = 128
    batch_size: int = 8
    rank: int = 48
    sweep_steps: int = 100
    final_steps: int = 300
    val_windows: int = 128
    paths: tuple[str, ...] | None = None

    def steps(self, stage: str) -> int:
        return self.sweep_steps if stage == "sweep" else self.final_steps


@functools.cache
def text(setup: Setup) -> ByteText:
    """The text, read once a process."""
    data = ByteText(
        list(setup.paths) if setup.paths else None,
        context=setup.context,
        batch_size=setup.batch_size,
        val_windows=setup.val_windows,
    )
    data.setup()
    return data


def constructor(name: str) -> Callable[..., Optimizer]:
    """The class or preset behind a name. Raises: ImportError or AttributeError where there is none (yet)."""
    if name in ("adamw", "muon"):
        return torch.optim.AdamW
    if name == "low_rank":
        return import_module("lightspan.optim.low_rank").LowRank
    return getattr(import_module("lightspan.optim.presets"), CLASSES[name])


def optimizers(name: str, model: nn.Module, rates: Rates, rank: int) -> list[Optimizer]:
    """What steps together: one optimiser, except that torch's Muon takes matrices only and AdamW the rest."""
    groups = ParameterGroups(other_lr=rates[1]).build(model)
    common: dict[str, Any] = {"lr": rates[0], "betas": BETAS, "weight_decay": WEIGHT_DECAY}
    if name == "adamw":
        return [torch.optim.AdamW(groups, **common, fused=True)]
    if name == "muon":
        matrices, rest = ([group for group in groups if group["project"] is wanted] for wanted in (True, False))
        # The adjustment brings the rate near AdamW's, so that both search the same region.
        muon = torch.optim.Muon(matrices, lr=rates[0], weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW(rest, **common, fused=True)]
    return [constructor(name)(groups, **{**common, "rank": rank, **OPTIONS.get(name, {})})]


def train(setup: Setup, name: str, rates: Rates, seed: int, stage: str) -> Row:
    """One run, as the row that the results keep. Losses in nats; null where the run diverged, which ends it."""
    steps, data = setup.steps(stage), text(setup)
    assert data.train is not None
    torch.manual_seed(seed)
    model = llama(256, setup.width, setup.depth, setup.heads, setup.mlp_width, setup.context)
    together = optimizers(name, model, rates, setup.rank)
    schedules = [WarmupCosine(optimizer, steps) for optimizer in together]
    loader = ExactLoader(data.train, setup.batch_size, seed)
    assert steps <= len(loader), "a window met twice would make the online loss one of seen text"
    losses: list[float] = []
    walls: list[float] = []
    cpus: list[float] = []
    curve: list[tuple[int, float, float, float]] = []
    checks = {round(steps * tenth / 10) for tenth in range(1, 11)} if stage == "final" else set()
    for step, batch in enumerate(islice(loader, steps), 1):
        wall, cpu = time.perf_counter(), time.process_time()
        loss = batch_loss(model, batch["tokens"])
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        losses.append(loss.item())
        if not math.isfinite(losses[-1] + norm.item()):
            losses[-1] = math.nan
            break
        for optimizer, schedule in zip(together, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
        if step in checks:
            curve.append((step, round(sum(walls), 3), round(sum(cpus), 3), round(validation_loss(model, data), 5)))
    tail = losses[-max(steps // 5, 1) :]
    online = sum(tail) / len(tail)  # not a number if the run ended early: its last loss was none
    values = (name, *rates, seed, stage)
    return dict(zip(KEY, values, strict=True)) | {
        "steps": steps,
        "online_loss": round(online, 5) if math.isfinite(online) else None,
        "val_loss": curve[-1][-1] if curve and len(losses) == steps and math.isfinite(curve[-1][-1]) else None,
        "state_bytes": sum(state_bytes(optimizer) for optimizer in together),
        "wall_s": round(sum(walls), 2),
        "cpu_s": round(sum(cpus), 2),
        "step_wall_ms": round(1e3 * statistics.median(walls or [0.0]), 2),
        "step_cpu_ms": round(1e3 * statistics.median(cpus or [0.0]), 2),
        "curve": curve,  # (step, wall seconds, processor seconds, validation loss)
    }


def batch_loss(model: nn.Module, tokens_BT1: Tensor) -> Tensor:
    return next_token_loss(model(input_ids=tokens_BT1[:, :-1]).logits, tokens_BT1[:, 1:])


@torch.no_grad()
def validation_loss(model: nn.Module, data: ByteText) -> float:
    """Mean over the validation windows, which are the same for all runs."""
    sums = [batch_loss(model, batch["tokens"]).item() * len(batch["tokens"]) for batch in data.val_dataloader()]
    return sum(sums) / len(data.val_dataloader().indices)


def read(results: Path) -> list[Row]:
    return json.loads(results.read_text()) if results.is_file() else []


def key_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[part] for part in KEY)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time. The lock is on the folder itself, since the results file is replaced at each write."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def append(results: Path, row: Row) -> None:
    """Adds a row to those that stand in the file now; one line a row, in the order of the keys."""
    with locked(results.parent):
        rows = {key_of(known): known for known in read(results)} | {key_of(row): row}
        lines = ",\n".join(json.dumps(rows[key]) for key in sorted(rows))
        write_atomic(results, f"[\n{lines}\n]\n")


def measured(results: Path, setup: Setup, name: str, rates: Rates, seed: int, stage: str) -> Row:
    """The row of a run: from the file, or by training it.

    Raises: UserError if the file's row comes from a run of another length.
    """
    wanted = (name, *rates, seed, stage)
    row = next((row for row in read(results) if key_of(row) == wanted), None)
    if row is None:
        row = train(setup, name, rates, seed, stage)
        append(results, row)
        loss = row["online_loss" if stage == "sweep" else "val_loss"]
        print(f"{stage} {name} {rates[0]:.3g} / {rates[1]:.3g} seed {seed}: {loss} nats, {row['wall_s']} s", flush=True)
    if row["steps"] != setup.steps(stage):
        raise UserError(
            f"{results} has {wanted} with steps={row['steps']}, and a {stage} run now takes {setup.steps(stage)}; "
            "delete the file or name another with --results"
        )
    return row


def search(loss: Callable[[Rates], float], start: Rates) -> Rates:
    """The protocol of the module's docstring: one line of five along each axis, and a last look beside the first."""
    lr = best_on_line(lambda rate: loss((rate, start[1])), start[0], reach=2)
    other = best_on_line(lambda rate: loss((lr, rate)), start[1], reach=2)
    return best_on_line(lambda rate: loss((rate, other)), lr, reach=1), other


def sweep(results: Path, setup: Setup, name: str) -> Rates:
    """The best rates of an optimiser; a diverged run counts as the worst of all."""

    def loss(rates: Rates) -> float:
        online = measured(results, setup, name, rates, SWEEP_SEED, "sweep")["online_loss"]
        return math.inf if online is None else online

    search(loss, (START[name], OTHER_START))
    best = best_rates(read(results), name)
    if best is None:
        raise UserError(f"{name} diverged at every rate from {START[name]:.3g} down; lower its START")
    return best


def best_rates(rows: list[Row], name: str) -> Rates | None:
    """Where the online loss of the sweep is lowest; each line of the search keeps the best of those before it."""
    swept = [row for row in rows if (row["optimizer"], row["stage"]) == (name, "sweep")]
    finite = [row for row in swept if row["online_loss"] is not None]
    best = min(finite, key=lambda row: row["online_loss"], default=None)
    return (best["lr"], best["other_lr"]) if best else None


def final_rows(rows: list[Row]) -> dict[str, list[Row]]:
    """The final runs at the best rates of the sweep, by optimiser in the order of START and then by seed."""
    chosen = {}
    for name in START:
        rates = best_rates(rows, name)
        finals = [row for row in rows if rates and key_of(row)[:3] == (name, *rates) and row["stage"] == "final"]
        if finals:
            chosen[name] = sorted(finals, key=lambda row: row["seed"])
    return chosen


def val_loss(row: Row) -> float:
    return math.inf if row["val_loss"] is None else row["val_loss"]


def time_to(curve: list[list[float]], loss: float, clock: str) -> float | None:
    """Seconds until a curve first reaches `loss`, on straight lines between its points; None if it never does."""
    at = {"wall": 1, "cpu": 2}[clock]
    before = None
    for point in curve:
        if point[3] <= loss:
            if before is None:
                return point[at]
            return before[at] + (point[at] - before[at]) * (before[3] - loss) / (before[3] - point[3])
        before = point
    return None


def table(rows: list[Row], clock: str = "wall") -> str:
    """The results in Markdown; what compares with AdamW stays empty while AdamW has no final run."""
    finals = final_rows(rows)
    adamw = {row["seed"]: row for row in finals.get("adamw", [])}
    lines = [
        "| optimiser | lr / other lr | validation loss, nats (by seed) | minus AdamW's | state, MiB (ratio) "
        f"| step, {clock} ms (ratio) | run, s | s to AdamW's loss |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def ratio(value: float, key: str) -> str:
        return f" ({value / statistics.median(row[key] for row in adamw.values()):.2f}x)" if adamw else ""

    for name, runs in finals.items():
        paired = [(row, adamw[row["seed"]]) for row in runs if row["seed"] in adamw]
        gap = f"{statistics.mean(val_loss(row) - val_loss(peer) for row, peer in paired):+.4f}" if paired else ""
        times = [time_to(row["curve"], val_loss(peer), clock) for row, peer in paired]
        reached = [seconds for seconds in times if seconds is not None]
        when = f"{statistics.mean(reached):.1f}" if reached else "never" if times else ""
        if reached and len(reached) < len(times):
            when += f" ({len(reached)} of {len(times)} seeds)"
        state = runs[0]["state_bytes"]
        step = statistics.median(row[f"step_{clock}_ms"] for row in runs)
        cells = (
            name,
            f"{runs[0]['lr']:.3g} / {runs[0]['other_lr']:.3g}",
            f"{statistics.mean(map(val_loss, runs)):.4f} ({', '.join(f'{val_loss(row):.4f}' for row in runs)})",
            gap,
            f"{state / MIB:.2f}{ratio(state, 'state_bytes')}",
            f"{step:.1f}{ratio(step, f'step_{clock}_ms')}",
            f"{statistics.mean(row[f'{clock}_s'] for row in runs):.1f}",
            when,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(wanted: list[float], gap: float) -> list[float]:
    """Ascending heights near ascending wanted ones, at least `gap` apart and at most 1."""
    heights: list[float] = []
    for height in wanted:
        heights.append(max(height, heights[-1] + gap) if heights else height)
    ceiling = 1.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - gap
    return heights


def draw(rows: list[Row], path: Path) -> None:
    """State bytes against validation loss, a point an optimiser (torch's own are squares); bars span the seeds."""
    from matplotlib.ticker import FixedLocator, NullLocator

    points = [
        (statistics.mean(losses), min(losses), max(losses), runs[0]["state_bytes"] / MIB, name)
        for name, runs in final_rows(rows).items()
        if math.isfinite(max(losses := [val_loss(row) for row in runs]))
    ]
    if not points:
        raise UserError("there is no final run to draw; run `sweep` and `final` first")
    points.sort()
    low, high = min(point[1] for point in points), max(point[2] for point in points)
    margin = max(0.08 * (high - low), 1e-3)
    low, high = low - margin, high + margin
    figure, ((panel,),) = canvas("Loss and optimiser state on equal tokens (mean and range of the seeds)", (8.4, 4.6))
    panel.set_xscale("log")
    panel.set(ylim=(low, high), xlabel="optimiser state, MiB", ylabel="validation loss, nats per byte")
    heights = spread([(point[0] - low) / (high - low) for point in points], gap=0.062)
    for (mean, least, most, state, name), height in zip(points, heights, strict=True):
        colour, marker = OWN_COLOURS[list(START).index(name)], "s" if name in ("adamw", "muon") else "o"
        panel.errorbar(
            state, mean, [[mean - least], [most - mean]], fmt=marker, color=colour, markersize=5.5, capsize=2.5
        )
        panel.annotate(
            f"{name}  {mean:.3f}",
            xy=(state, mean),
            xytext=(1.06, height),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=colour,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "alpha": 0.4,
                "linewidth": 0.9,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
            zorder=1,
        )
    ticks = [2.0**k for k in range(-3, 8)]
    panel.set_xlim(min(point[3] for point in points) / 1.25, max(point[3] for point in points) * 1.25)
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter("{x:g}")
    tidy(panel)
    write_atomic(path, png(figure))


def main(arguments: list[str] | None = None, setup: Setup = Setup()) -> int:
    """Exit status 1 if an optimiser failed; the others are run all the same."""
    parser = argparse.ArgumentParser(description="Compare optimisers on a small language model.")
    parser.add_argument("stage", choices=("sweep", "final", "table"))
    parser.add_argument("--only", nargs="+", choices=list(START), default=list(START), metavar="NAME")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    chosen = parser.parse_args(arguments)
    if chosen.stage == "table":
        rows = [row for row in read(chosen.results) if row["optimizer"] in {*chosen.only, "adamw"}]
        print(table(rows, chosen.clock))
        draw(rows, chosen.results.with_suffix(".png"))
        return 0
    torch.set_num_threads(1)
    failed = False
    for name in chosen.only:
        try:
            constructor(name)
        except (ImportError, AttributeError) as error:
            print(f"{name} skipped: {error}", flush=True)
            continue
        try:
            rates = sweep(chosen.results, setup, name)
            if chosen.stage == "final":
                for seed in FINAL_SEEDS:
                    measured(chosen.results, setup, name, rates, seed, "final")
        except Exception:  # a night's work on the others must not end here
            traceback.print_exc()
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
