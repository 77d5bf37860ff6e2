"""The queue of every study: runs side by side on this machine, each in its folder, with a line for each of them: while
it runs on a terminal, and when it has ended everywhere.
"""

import time
from collections.abc import Callable, Collection, Iterator
from datetime import datetime

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lightspan.cli.runs.fits import Task, last_lines, run_side_by_side
from lightspan.cli.runs.metrics import last_step
from lightspan.cli.runs.status import Status, status_of
from lightspan.core.console import SafeConsole
from lightspan.core.errors import one_line, printable
from lightspan.core.files.atomic import write_atomic
from lightspan.core.files.runs import FAILED, METRICS

_LOOK_S = 0.5
_STOPPED = 128  # an exit status above it says that a signal ended the run


def run_queue(
    tasks: Iterator[Task],
    workers: int,
    total: int,
    completed: int = 0,
    ended: Callable[[Task, Status], str] = lambda task, became: "",
) -> dict[str, int]:
    """Runs tasks as `lightspan.cli.runs.fits.run_side_by_side` does, and shows them. Returns {name: exit status}.

    Args:
        tasks: each writes its output into its run folder.
        total, completed: how many runs there are in all, and how many of them were done before.
        ended: called with each task that ended and what became of its run; returns what to add to its line.
    """
    statuses: dict[str, int] = {}
    console = SafeConsole(highlight=False, soft_wrap=True)
    texts = (TextColumn("{task.description}", markup=False), TextColumn("{task.fields[said]}", markup=False))
    with Progress(texts[0], BarColumn(), texts[1], TimeElapsedColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("runs", total=total, completed=completed, said=f"{completed} of {total}")
        began_s: dict[Task, float] = {}
        lines: dict[Task, TaskID] = {}
        looked_s = 0.0

        def over(task: Task, status: int) -> None:
            statuses[task.name] = status
            seconds = time.monotonic() - began_s.pop(task, time.monotonic())
            if task in lines:
                progress.remove_task(lines.pop(task))
            finished = completed + len(statuses)
            progress.update(bar, completed=finished, said=f"{finished} of {total}")
            became = final_status(task, status)
            line = f"{became}  {task.name}{ended(task, became)}{_why(task, status, became)} ({seconds:.0f} s)"
            console.print(printable(line), markup=False)

        def look(running: Collection[Task]) -> None:
            nonlocal looked_s
            now_s = time.monotonic()
            for task in running:
                began_s.setdefault(task, now_s)
            if now_s - looked_s < _LOOK_S:
                return
            looked_s = now_s
            for task in running:
                if task not in lines:
                    lines[task] = progress.add_task(task.name, total=None, said="")
                step = last_step(task.log.parent / METRICS)
                progress.update(lines[task], said="starts" if step is None else f"step {step}")

        run_side_by_side(tasks, workers, over, look)
    return statuses


def final_status(task: Task, status: int) -> Status:
    """What became of a run that ended with this exit status. A failure that the run could not record itself, such as a
    mistake in its configuration, is recorded for it.
    """
    run = task.log.parent
    found = status_of(run)
    if 0 < status < _STOPPED and found not in (Status.FAILED, Status.RUNNING):
        said = one_line((last_lines(task.log).splitlines() or ["it said nothing"])[-1])
        when = datetime.now().astimezone().isoformat(timespec="seconds")
        write_atomic(run / FAILED, f"{when}: ended with status {status}: {said}\n")
        found = Status.FAILED
    return found


def _why(task: Task, status: int, became: Status) -> str:
    """Why a run is not done."""
    if became is Status.DONE:
        return ""
    killed = f", killed by signal {-status}" if status < 0 else ""
    return killed if became is Status.PREEMPTED else f"{killed}; {task.log} ends with:\n{last_lines(task.log)}\n"
