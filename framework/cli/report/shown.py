"""What a report is about: the runs and sweeps of some folders, and what ranks them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightspan.cli.report.compare import FEW
from lightspan.cli.report.fold import fold
from lightspan.cli.report.page import Script, render
from lightspan.cli.report.ranking import Ranking, ranked
from lightspan.cli.report.runs import Run
from lightspan.cli.report.sweeps import SweepRuns, load
from lightspan.cli.runs.direction import Mode
from lightspan.cli.runs.status import status_of


@dataclass(frozen=True)
class Shown:
    """The content of a report.

    Attributes:
        runs: those that differ by their seed alone as one, if they are folded.
        metric, mode: what ranks them, None for the default; see `lightspan.cli.report.ranking.ranked`.
    """

    title: str
    runs: list[Run]
    sweeps: list[SweepRuns]
    metric: str | None
    mode: Mode | None

    def ranking(self) -> Ranking | None:
        """The runs ranked, None if nothing ranks them; see `ranked`."""
        return ranked(self.runs, self.metric, self.mode)

    def page(self, script: Script | None = None) -> str:
        """The report as HTML; see `render`."""
        return render(self.runs, self.title, self.sweeps, self.metric, self.mode, script)


def shown(
    folders: Sequence[Path],
    title: str | None = None,
    folds: bool = True,
    metric: str | None = None,
    mode: Mode | None = None,
) -> Shown:
    """Reads runs, and sweeps with all of their runs.

    Args:
        folders: of runs and sweeps.
        title: of the page; by default the names of the runs.
        folds: whether runs that differ by their seed alone become one.
        metric, mode: what ranks the runs; by default what ranks the first sweep whose metric a run has logged.
    Raises: UserError as `lightspan.cli.report.sweeps.load`.
    """
    runs, sweeps = load(folders)
    runs = [replace(run, status=status_of(run.folder)) for run in runs]
    runs = fold(runs) if folds else [replace(run, draws=1) for run in runs]
    logged = {name for run in runs for name in run.metrics()}
    ranking = next((one.sweep for one in sweeps if one.sweep.metric in logged), None)
    if metric is None and ranking is not None:
        metric, mode = ranking.metric, mode or ranking.mode
    return Shown(title or _title(runs, sweeps), runs, sweeps, metric, mode)


def _title(runs: Sequence[Run], sweeps: Sequence[SweepRuns]) -> str:
    if len(runs) <= FEW:
        return " and ".join(run.name for run in runs)
    of = f" of {sweeps[0].sweep.recipe}" if len(sweeps) == 1 else ""
    return f"{len(runs)} runs{of}"
