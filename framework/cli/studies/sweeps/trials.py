"""The trials of a sweep on local workers: which are due, what comes next, and what each reached."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from lightspan.cli.runs.figures import figure, scores
from lightspan.cli.runs.fits import Task, fit_command
from lightspan.cli.runs.metrics import last_values
from lightspan.cli.runs.numbers import SCORE_DIGITS, number
from lightspan.cli.runs.status import Status, status_of
from lightspan.cli.studies.queue import run_queue
from lightspan.cli.studies.sweeps.files import Sweep, Trial, write
from lightspan.cli.studies.sweeps.points import Settings
from lightspan.cli.studies.sweeps.ranking import by_point, last_logged, unlogged
from lightspan.cli.studies.sweeps.tables import scores_of
from lightspan.core.errors import UserError, printable
from lightspan.core.files.runs import METRICS, OUTPUT

MOST_SCORES = 3  # in the line of a run that has ended


def run_due(sweep: Sweep, folder: Path, workers: int, retry_failed: bool) -> Sweep:
    """Runs the trials of a sweep folder that are due, side by side and shown; the sweep with all that were tried."""
    queue = TrialQueue(sweep, folder, retry_failed)
    before = sum(not queue.due(trial) for trial in sweep.trials)
    ended_before = f", {before} of them ended before" if before else ""
    print(printable(f"{sweep.recipe}: {sweep.total} runs -> {folder}{ended_before}"), flush=True)
    run_queue(queue.tasks(), workers, sweep.total, before, queue.ended)
    return queue.sweep


class TrialQueue:
    """Gives out the trials that are due and, for `tpe`, suggests new ones while results come in.

    A trial is due unless its run is done, or has failed and is not to be retried. Of a run that another process works
    on, the fit itself finds out, since the run folder has a lock.

    Attributes:
        sweep: with the trials suggested so far; its file is written before the first of them starts.
    """

    def __init__(self, sweep: Sweep, folder: Path, retry_failed: bool) -> None:
        self.sweep, self.folder, self.retry_failed = sweep, folder, retry_failed
        self._given: set[str] = set()  # trials that have started and not ended
        self._last: dict[str, float | None] = {}  # of those that are done, see `last_logged`; read once

    def due(self, trial: Trial) -> bool:
        status = status_of(self.folder / trial.run)
        return status is not Status.DONE and (status is not Status.FAILED or self.retry_failed)

    def tasks(self) -> Iterator[Task]:
        """The trials in their order. A suggestion is made when it is asked for.

        Raises: UserError if `tpe` has nothing to follow, since none of the runs that are done logged the metric.
        """
        for trial in self.sweep.trials:
            if self.due(trial):
                yield self._task(trial)
        while len(self.sweep.trials) < self.sweep.total:
            for trial in self._suggested():
                yield self._task(trial)

    def ended(self, task: Task, became: Status) -> str:
        """Takes note of the end of a trial's run; returns what it reached, if it is done."""
        self._given.discard(task.name)
        return self.reached(task.name) if became is Status.DONE else ""

    def reached(self, run: str) -> str:
        """The metric of a run that is done, in words; without one, its first scores."""
        if (metric := self.sweep.metric) is None:
            logged = scores_of(last_values(self.folder / run / METRICS))
            first = islice(logged.items(), MOST_SCORES)
            return "".join(f"  {name} {number(value, SCORE_DIGITS)}" for name, value in first)
        if (value := self._last_of(run)) is None:
            return f"; {unlogged(self.folder / run, metric)}"
        return f"  {metric} {number(value, SCORE_DIGITS)}"

    def _task(self, trial: Trial) -> Task:
        run = self.folder / trial.run
        self._given.add(trial.run)
        self._last.pop(trial.run, None)
        return Task(trial.run, fit_command(self.sweep.words(trial), run), run / OUTPUT)

    def _suggested(self) -> list[Trial]:
        from lightspan.cli.studies.sweeps.tpe import suggest

        assert self.sweep.metric is not None
        done = [trial.run for trial in self.sweep.trials if self._done(trial.run)]
        if done and all(self._last_of(run) is None for run in done):
            raise UserError(unlogged(self.folder / done[0], self.sweep.metric))
        known = [self._result(trials) for trials in by_point(self.sweep)]
        values = suggest(self.sweep.keys, self.sweep.mode, known, self.sweep.draw_seed)
        trials = self.sweep.of_point(len(known), values)
        self.sweep = replace(self.sweep, trials=(*self.sweep.trials, *trials))
        write(self.folder, self.sweep)
        return trials

    def _result(self, trials: tuple[Trial, ...]) -> tuple[Settings, float | None]:
        """A point and what it counts for: None while one of its runs goes on, NaN unless all of them count."""
        if any(trial.run in self._given for trial in trials):
            return trials[0].values, None
        figures = {trial.seed: self._last_of(trial.run) if self._done(trial.run) else None for trial in trials}
        found = scores({seed: figure(Status.DONE, last) for seed, last in figures.items()})
        return trials[0].values, found.mean if found.complete else math.nan

    def _done(self, run: str) -> bool:
        return run not in self._given and (run in self._last or status_of(self.folder / run) is Status.DONE)

    def _last_of(self, run: str) -> float | None:
        """The last value of the metric of a run that is done."""
        assert self.sweep.metric is not None
        if run not in self._last:
            self._last[run] = last_logged(self.folder / run, self.sweep.metric)
        return self._last[run]
