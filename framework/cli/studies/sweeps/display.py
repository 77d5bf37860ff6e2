"""Runs side by side with a line for each of them: while it runs on a terminal, and when it has ended everywhere."""

import time
from collections.abc import Callable, Collection, Iterator

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lightspan.cli.runs.fits import Task, run_side_by_side
from lightspan.core.console import SafeConsole
from lightspan.core.errors import printable

_LOOK_S = 0.5


def run_shown(
    tasks: Iterator[Task],
    workers: int,
    ended: Callable[[Task, int], str],
    total: int,
    completed: int,
    standing: Callable[[Task], str] = lambda task: "",
) -> None:
    """`lightspan.cli.runs.fits.run_side_by_side` with a display.

    Args:
        ended: called with each task that ended and its exit status; returns what to print about it.
        total, completed: how many runs there are in all, and how many of them were done before.
        standing: how far a running task is.
    """
    console = SafeConsole(highlight=False, soft_wrap=True)
    texts = (TextColumn("{task.description}", markup=False), TextColumn("{task.fields[said]}", markup=False))
    with Progress(texts[0], BarColumn(), texts[1], TimeElapsedColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("runs", total=total, completed=completed, said=f"{completed} of {total}")
        began_s: dict[Task, float] = {}
        lines: dict[Task, TaskID] = {}
        looked_s = 0.0

        def over(task: Task, status: int) -> None:
            nonlocal completed
            completed += 1
            seconds = time.monotonic() - began_s.pop(task, time.monotonic())
            if task in lines:
                progress.remove_task(lines.pop(task))
            progress.update(bar, completed=completed, said=f"{completed} of {total}")
            console.print(printable(f"{ended(task, status)} ({seconds:.0f} s)"), markup=False)

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
                progress.update(lines[task], said=printable(standing(task)))

        run_side_by_side(tasks, workers, over, look)
