"""Runs that differ by their seed alone, folded into one: means and standard deviations of what they reached."""

import math
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from lightspan.cli.report.compare import flatten
from lightspan.cli.report.runs import Run
from lightspan.cli.runs.metrics import AXES

_SEEDS = ("seed", "seed_everything")


def fold(runs: Sequence[Run]) -> list[Run]:
    """The runs in their order, those that differ by their seed alone as one run with `members`.

    Two runs with the same seed are never folded: they would count as two draws. Of a metric a folded run has the mean
    at the steps that all members logged, in `spreads` the standard deviation there (by n - 1); so too of the figures of
    its summary. A figure that is not finite for one member has no mean: it is null.
    """
    groups: dict[tuple[Any, ...], list[Run]] = {}
    taken: set[tuple[Any, ...]] = set()  # (key, seeds) of the runs so far
    for at, run in enumerate(runs):
        settings, seeds = _divided(run.config)
        key: tuple[Any, ...] = (
            (frozenset(settings.items()), run.config.get("about") is None) if run.config and seeds else (at,)
        )
        own = frozenset(seeds.items())
        while (key, own) in taken:
            key = (*key, "again")
        taken.add((key, own))
        groups.setdefault(key, []).append(run)
    names = _names(list(groups.values()))
    return [_folded(group, name) for group, name in zip(groups.values(), names, strict=True)]


def without_seeds(config: dict[str, Any]) -> dict[str, str]:
    """The settings of a run by their dotted keys, without its seeds and without `about`."""
    return _divided(config)[0]


def is_seed(key: str) -> bool:
    """Whether a dotted key names a seed."""
    return key.rpartition(".")[2] in _SEEDS


def _divided(config: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """(all settings but seeds, the seeds), each by its dotted key, in order; `about` describes and sets nothing."""
    flat = flatten({key: value for key, value in config.items() if key != "about"})
    seeds = {key: value for key, value in flat.items() if is_seed(key)}
    return {key: value for key, value in flat.items() if key not in seeds}, seeds


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Of a group what its members' names begin with, if that tells it from the others, else its first member's."""
    shared = [os.path.commonprefix([run.name for run in group]) for group in groups]  # noqa: RUF071
    names = [
        re.sub(r"[\W_]*(?:seed)?[\W_]*$", "", prefix.rstrip("0123456789")) if len(group) > 1 else prefix
        for group, prefix in zip(groups, shared, strict=True)
    ]
    return [
        name if name and names.count(name) == 1 else group[0].name for name, group in zip(names, groups, strict=True)
    ]


def _folded(group: Sequence[Run], name: str) -> Run:
    first = group[0]
    if len(group) == 1:
        return first
    rows, spreads = _mean_rows(group)
    summary, spread = _mean_summary(group)
    return replace(
        first,
        name=f"{name} ({len(group)} seeds)",
        rows=rows,
        row_spreads=spreads,
        summary=summary,
        spread=spread,
        config=_with_seeds(first.config, [run.config for run in group]),
        members=tuple(group),
    )


def _mean_rows(group: Sequence[Run]) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    """One row a step with the means of what all members logged there, and beside each row the deviations."""
    logged = [_by_step(run.rows) for run in group]
    steps = [step for step in logged[0] if all(step in one for one in logged)]
    rows, spreads = [], []
    for step in sorted(steps):
        at_step = [one[step] for one in logged]
        row: dict[str, Any] = {"step": step}
        spread = {}
        for name in at_step[0]:
            values = [one.get(name, _ABSENT) for one in at_step]
            if _ABSENT not in values:
                row[name], spread[name] = _mean(values), _deviation(values)
        rows.append(row)
        spreads.append({name: value for name, value in spread.items() if name not in AXES and value is not None})
    return rows, spreads


_ABSENT = object()


def _by_step(rows: Iterable[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """step -> the last value of each metric logged there."""
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(row["step"], {}).update({key: value for key, value in row.items() if key != "step"})
    return found


def _mean_summary(group: Sequence[Run]) -> tuple[dict[str, Any], dict[str, float]]:
    summary: dict[str, Any] = {}
    spread = {}
    for key, value in group[0].summary.items():
        if not all(key in run.summary for run in group):
            continue
        values = [run.summary[key] for run in group]
        if isinstance(value, bool):
            summary[key] = all(values)
        elif all(other == value for other in values):
            summary[key] = value
        else:
            summary[key] = _mean(values)
            if (deviation := _deviation(values)) is not None:
                spread[key] = deviation
    return summary, spread


def _mean(values: Sequence[Any]) -> float | None:
    numbers = _finite(values)
    return statistics.fmean(numbers) if len(numbers) == len(values) else None


def _deviation(values: Sequence[Any]) -> float | None:
    numbers = _finite(values)
    return statistics.stdev(numbers) if len(numbers) == len(values) > 1 else None


def _finite(values: Sequence[Any]) -> list[float]:
    """Those that are numbers whose squares can be added."""
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return [float(value) for value in numbers if math.isfinite(value) and abs(value) < 1e150]


def _with_seeds(value: Any, of_members: Sequence[Any]) -> Any:
    """The configuration of the first member, with the seeds of all."""
    if isinstance(value, dict):
        return {
            key: ", ".join(str(other[key]) for other in of_members)
            if key in _SEEDS and not isinstance(child, dict | list)
            else _with_seeds(child, [other[key] for other in of_members])
            for key, child in value.items()
        }
    if isinstance(value, list):
        return [_with_seeds(child, [other[at] for other in of_members]) for at, child in enumerate(value)]
    return value
