"""The comparison of runs as plain data: one row per figure, one cell per run; page and console print the same rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightspan.cli.report.runs import Run
from lightspan.cli.runs.direction import Better, better
from lightspan.cli.runs.numbers import SCORE_DIGITS, number, spread_text


@dataclass(frozen=True)
class ComparedFigure:
    """What is compared: the key in summary.json, its label, its unit, and which direction is better.

    `relative` says how another run is compared with the first: as a ratio, as a difference, or not at all.
    """

    key: str
    label: str
    unit: str
    better: Better
    relative: Literal["ratio", "difference", "none"]


@dataclass(frozen=True)
class Cell:
    """One run's figure.

    `relative` is relative to the first run ("" for the first); `best`: no run is better; `share`: value / largest.
    """

    text: str
    relative: str
    best: bool
    share: float | None


@dataclass(frozen=True)
class Row:
    figure: ComparedFigure
    cells: list[Cell]


FIGURES = (
    ComparedFigure("val_loss_nats", "Validation loss", "nats", "lower", "difference"),
    ComparedFigure("val_bits_per_byte", "Validation loss", "bits per byte", "lower", "difference"),
    ComparedFigure("optimizer_state_mib", "Optimiser state", "MiB", "lower", "ratio"),
    ComparedFigure("step_ms_median", "Median step", "ms", "lower", "ratio"),
    ComparedFigure("peak_device_mib", "Peak device memory", "MiB", "lower", "ratio"),
    ComparedFigure("peak_rss_mib", "Peak host memory", "MiB", "lower", "ratio"),
    ComparedFigure("seconds", "Wall time", "s", "lower", "ratio"),
    ComparedFigure("steps", "Steps", "", "neither", "none"),
    ComparedFigure("parameters", "Parameters", "", "neither", "none"),
    ComparedFigure("trainable_parameters", "Trainable parameters", "", "neither", "none"),
)
TIMES, MINUS = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"
DIFFERENCE_DIGITS = 3
_SCORES = ("val_", "probe_", "test_")
_LOADING = ("batch_size", "num_workers", "prefetch_factor", "persistent_workers", "pin_memory")
FEW = 4  # runs that sentences and titles name, and that a console has room for side by side
_FEW = 3  # settings that a sentence names


def compare(runs: Sequence[Run]) -> list[Row]:
    """Rows for every figure that at least one run has: losses first, then other scores, then cost, then size."""
    known = {figure.key for figure in FIGURES}
    scores = dict.fromkeys(
        key
        for run in runs
        for key, value in run.summary.items()
        if key.startswith(_SCORES) and _finite(value) is not None
    )
    extra = [_score(key) for key in scores if key not in known]
    figures = (*FIGURES[:2], *extra, *FIGURES[2:])
    return [_row(figure, runs) for figure in figures if any(_shown(run, figure) for run in runs)]


def headline(runs: Sequence[Run]) -> list[str]:
    """One sentence for every run after the first: its loss and its cost relative to the first run. Of more than `FEW`
    runs the ranking says who is best.
    """
    if len(runs) > FEW:
        return []
    rows = {row.figure.key: row for row in compare(runs)}
    wanted = {
        "val_loss_nats": "{} nats validation loss",
        "optimizer_state_mib": "{} optimiser state",
        "step_ms_median": "{} step time",
    }
    sentences = []
    for at, run in enumerate(runs[1:], start=1):
        parts = [
            text.format(rows[key].cells[at].relative)
            for key, text in wanted.items()
            if key in rows and rows[key].cells[at].relative
        ]
        if parts:
            sentences.append(f"{run.name} against {runs[0].name}: {', '.join(parts)}")
    return sentences


def caution(runs: Sequence[Run]) -> str:
    """One sentence on what makes the scores of these runs hard to compare: other data, or no score in common. "" if
    there is nothing to say. How data are loaded, in which batches and by how many workers, does not count.
    """
    if len(runs) < 2:
        return ""
    known = all(run.config for run in runs)
    measured = [{"data": run.config.get("data"), **_validated(run)} for run in runs if known]
    changed = [
        f"{key} ({', '.join(dict.fromkeys(values))})"
        for key, values in differences(measured)
        if key.rpartition(".")[2] not in _LOADING
    ]
    more = f" and {len(changed) - _FEW} more" if len(changed) > _FEW else ""
    parts = [f"they differ in {', '.join(changed[:_FEW])}{more}"] if changed else []
    scores = [{key for key, value in run.summary.items() if key.startswith(_SCORES)} for run in runs]
    if all(scores) and not set.intersection(*scores):
        first = ", ".join(f"{run.name} has {min(one)}" for run, one in zip(runs, scores, strict=True))
        parts.append(f"they have no score in common ({first})")
    return f"The scores of these runs may not be comparable: {'; '.join(parts)}" if parts else ""


def _validated(run: Run) -> dict[str, Any]:
    trainer = run.config.get("trainer")
    limit = trainer.get("limit_val_batches") if isinstance(trainer, dict) else None
    return {} if limit is None else {"trainer": {"limit_val_batches": limit}}


def differences(configs: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """The dotted keys whose values differ between configurations, with each one's value ("—" if it has none)."""
    flat = [flatten(config) for config in configs]
    keys = dict.fromkeys(key for one in flat for key in one)
    table = [(key, [one.get(key, "—") for one in flat]) for key in keys]
    return [(key, values) for key, values in table if len(set(values)) > 1]


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings and lists as {dotted key: text}; empty ones keep their key."""
    if isinstance(value, dict | list) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {
            k: v for key, child in pairs for k, v in flatten(child, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: "null" if value is None else str(value)} if prefix else {}


def _score(key: str) -> ComparedFigure:
    label, unit = key.replace("_", " ").capitalize(), "nats" if key.endswith("_nats") else ""
    return ComparedFigure(key, label, unit, better(key), "difference")


def _row(figure: ComparedFigure, runs: Sequence[Run]) -> Row:
    values = [_finite(run.summary.get(figure.key)) for run in runs]
    known = [value for value in values if value is not None]
    contest = len(runs) > 1 and figure.better != "neither" and len(set(known)) > 1
    winner = (min if figure.better == "lower" else max)(known) if contest else None
    top = max(known, default=0.0)
    has_bar = figure.relative == "ratio" and top > 0
    return Row(
        figure,
        [
            Cell(
                text=_shown(run, figure) or "—",
                relative=_relative(figure, values[0], value) if at else "",
                best=winner is not None and value == winner,
                share=value / top if has_bar and value is not None else None,
            )
            for at, (run, value) in enumerate(zip(runs, values, strict=True))
        ],
    )


def _relative(figure: ComparedFigure, first: float | None, value: float | None) -> str:
    if first is None or value is None or figure.relative == "none":
        return ""
    if figure.relative == "ratio":
        return f"{TIMES}{value / first:.2f}" if first > 0 else ""
    apart = number(abs(value - first), DIFFERENCE_DIGITS)
    return f"{MINUS if value < first else '+'}{apart}"


def _shown(run: Run, figure: ComparedFigure) -> str:
    value = run.summary.get(figure.key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return ""
    text = number(float(value), SCORE_DIGITS if figure.relative == "difference" else 4)
    spread = run.spread.get(figure.key)
    return text + ("" if spread is None else f" ± {spread_text(spread)}")


def _finite(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None
