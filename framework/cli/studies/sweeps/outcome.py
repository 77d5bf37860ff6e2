"""What is said when a sweep has ended: the ranking, the best point as flags, what is not done, and what to do next."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from lightspan.cli.config.flags import allow_options
from lightspan.cli.runs.catalogue import failure
from lightspan.cli.runs.direction import better
from lightspan.cli.runs.figures import standings
from lightspan.cli.runs.metrics import last_values
from lightspan.cli.runs.status import Status, status_of
from lightspan.cli.studies.sweeps.files import Sweep, Trial
from lightspan.cli.studies.sweeps.points import flags_of
from lightspan.cli.studies.sweeps.ranking import over_seeds, ranked, unlogged
from lightspan.cli.studies.sweeps.tables import SCORES, ranking_table, seed_table
from lightspan.core.console import SafeConsole
from lightspan.core.errors import print_notes, printable
from lightspan.core.files.runs import METRICS, OUTPUT

_FEW = 5  # runs that are not done and are named


def conclude(sweep: Sweep, folder: Path) -> bool:
    """Prints the outcome; whether every run is done."""
    console = SafeConsole(highlight=False, soft_wrap=True)
    undone = [trial for trial in sweep.trials if status_of(folder / trial.run) is not Status.DONE]
    commands = [["report", str(folder)], ["runs", str(folder)]]
    done = [trial for trial in sweep.trials if trial not in undone]
    if not sweep.keys:
        console.print(seed_table(over_seeds(sweep, folder)))
    elif sweep.metric is None:
        if known := known_metric(sweep, folder):
            commands.insert(0, ["sweep", str(folder), *allow_options(sweep.modules), "--metric", known])
    else:
        ranking = ranked(sweep, folder, sweep.metric)
        console.print(ranking_table(sweep, ranking))
        best, scores = ranking[0]
        if scores.values:
            equal = standings([one for _, one in ranking], sweep.mode).count(1)
            which = f", the first of {equal} equal ones" if equal > 1 else ""
            console.print(f"best{which}: {shlex.join(flags_of(best))}", markup=False)
            commands.append(["fit", sweep.recipe, *sweep.arguments, *flags_of(best)])
        elif done and (said := unlogged(folder / done[0].run, sweep.metric)):
            print_notes([said])
    if undone:
        print_unfinished(undone, folder)
        retry = ["--retry-failed"] if any(status_of(folder / trial.run) is Status.FAILED for trial in undone) else []
        commands.insert(0, ["sweep", str(folder), *allow_options(sweep.modules), *retry])
    print(printable(f"{'not finished' if undone else 'done'}: {folder}"))
    for at, words in enumerate(commands):
        print(printable(f"{'next:' if at == 0 else '     '} lightspan {shlex.join(words)}"))
    return not undone


def known_metric(sweep: Sweep, folder: Path) -> str | None:
    """A score that the runs logged and whose name says which direction is better."""
    names = dict.fromkeys(name for trial in sweep.trials[:1] for name in last_values(folder / trial.run / METRICS))
    return next((name for name in names if name.startswith(SCORES) and better(name) != "neither"), None)


def print_unfinished(undone: Sequence[Trial], folder: Path) -> None:
    """Prints which runs are not done, and why."""
    for trial in undone[:_FEW]:
        run = folder / trial.run
        status = status_of(run)
        why = failure(run) if status is Status.FAILED else ""
        see = f", see {OUTPUT} there" if (run / OUTPUT).exists() else ""  # a task of an array prints elsewhere
        print(printable(f"{status}: {run}{see}" + (f"\n    {why}" if why else "")))
    if len(undone) > _FEW:
        print(printable(f"and {len(undone) - _FEW} more that are not done"))
