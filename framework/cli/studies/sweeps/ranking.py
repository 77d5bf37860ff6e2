"""What the trials of a sweep count for (see `lightspan.cli.runs.figures`), point by point and metric by metric."""

import math
from pathlib import Path

from lightspan.cli.runs.figures import SeedScores, ended, figure, scores
from lightspan.cli.runs.metrics import last_values, read_logged
from lightspan.cli.runs.status import status_of
from lightspan.cli.studies.sweeps.files import Sweep, Trial
from lightspan.cli.studies.sweeps.points import Settings
from lightspan.core.files.runs import METRICS
from lightspan.core.spelling import nearest


def ranked(sweep: Sweep, folder: Path, metric: str) -> list[tuple[Settings, SeedScores]]:
    """The points in their order."""
    found = [
        (trials[0].values, scores({trial.seed: score(folder / trial.run, metric) for trial in trials}))
        for trials in by_point(sweep)
    ]
    return sorted(found, key=lambda one: one[1].place(sweep.mode))


def by_point(sweep: Sweep) -> list[tuple[Trial, ...]]:
    """The trials of each point, in order."""
    count = len(sweep.seeds or (None,))
    return [sweep.trials[first : first + count] for first in range(0, len(sweep.trials), count)]


def score(run: Path, metric: str) -> float | None:
    """What a run counts for by this metric, None for nothing."""
    status = status_of(run)
    return figure(status, last_logged(run, metric)) if ended(status) else None


def last_logged(run: Path, metric: str) -> float | None:
    """The last value of a metric, NaN if it was not finite; None for a run that never logged it."""
    found = read_logged(run / METRICS, [metric]).values.get(metric)
    return None if found is None else math.nan if found.last is None else found.last


def unlogged(run: Path, metric: str) -> str | None:
    """What to say of a run that is done and never logged a metric; None if it did."""
    logged = last_values(run / METRICS)
    if metric in logged:
        return None
    names = ", ".join(logged) or "nothing"
    return f"--metric {metric}: {run.name} never logged it; {nearest(metric, list(logged))}it logged {names}"


def over_seeds(sweep: Sweep, folder: Path) -> dict[str, SeedScores]:
    """Of a sweep over seeds alone: each metric by which a run counts, in the order in which they first appear."""
    found: dict[str, dict[int | None, float | None]] = {}
    for trial in sweep.trials:
        status = status_of(folder / trial.run)
        if ended(status):
            for name, value in last_values(folder / trial.run / METRICS).items():
                found.setdefault(name, {})[trial.seed] = figure(status, value)
    pairs = {name: scores(values, len(sweep.trials)) for name, values in found.items()}
    return {name: one for name, one in pairs.items() if one.values}
