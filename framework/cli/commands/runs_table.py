"""The catalogue of runs as a table on the console."""

import functools
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lightspan.cli.config.key_names import short_names
from lightspan.cli.runs.catalogue import Entry, Progress, read_progress
from lightspan.cli.runs.direction import better
from lightspan.cli.runs.numbers import SCORE_DIGITS, number
from lightspan.core.errors import one_line, printable

if TYPE_CHECKING:
    from rich.text import Text

LONGEST_REASON = 80  # characters
WIDTH = 180
"""Columns of the table where it is not printed to a terminal."""
STYLES = {"running": "cyan", "stale": "yellow", "preempted": "yellow", "failed": "red", "done": "green"}


class ListedRun:
    """One line of the catalogue; how far the run came is read when it is first asked for."""

    def __init__(self, entry: Entry, metrics: Sequence[str]) -> None:
        self.entry, self._metrics = entry, metrics

    @functools.cached_property
    def progress(self) -> Progress:
        return read_progress(self.entry.folder, self._metrics)


class Column(NamedTuple):
    """A column of the table; numbers stand on the right, and never in two lines."""

    heading: str
    texts: Sequence[str]
    of_numbers: bool = False


def print_table(rows: Sequence[ListedRun], metrics: Sequence[str], remarks: Sequence[str]) -> None:
    """Prints the rows without columns that say nothing: empty ones, and what all runs have in common, which is said
    once below the table with the other remarks.
    """
    from rich.table import Table
    from rich.text import Text

    from lightspan.core.console import SafeConsole

    console = SafeConsole(width=None if sys.stdout.isatty() else WIDTH)
    changes, shared = _what_differs([row.entry for row in rows])
    said = [*remarks, *([f"all with {shared}"] if shared else [])]
    hosts = [row.entry.host for row in rows]
    if len(set(hosts)) == 1 and hosts[0]:
        said.append(f"all on {hosts[0]}")
        hosts = []
    columns = [
        Column("run", [str(row.entry.folder) for row in rows]),
        Column("recipe", [row.entry.recipe for row in rows]),
        Column("differs in", changes),
        Column("status", [str(row.entry.status) for row in rows], of_numbers=False),
        Column("step", [number_text(row.progress.steps) for row in rows], of_numbers=True),
        *_metric_columns(rows, metrics),
        Column("time", [duration_text(row.progress.seconds) for row in rows], of_numbers=True),
        Column("host", hosts),
        Column("tags", [" ".join(row.entry.tags) for row in rows]),
        Column("reason", [_shortened(row.entry.reason) for row in rows]),
        Column("note", [row.entry.note for row in rows]),
    ]
    shown = [column for column in columns if any(column.texts)]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in shown:
        table.add_column(
            Text(one_line(column.heading)),
            justify="right" if column.of_numbers else "left",
            no_wrap=column.of_numbers or column.heading == "status",
            overflow="fold",
        )
    for at in range(len(rows)):
        table.add_row(*(_cell(column, at) for column in shown))
    console.print(table if rows else "no runs")
    for remark in said:
        console.print(Text(one_line(remark)))


def _shortened(reason: str) -> str:
    """The error without its time, and no more of it than a table has room for."""
    text = reason.partition(": ")[2] or reason
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 1]}…"


def _cell(column: Column, at: int) -> "Text":
    from rich.text import Text

    text = column.texts[at]
    safe = printable(text) if column.heading == "note" else one_line(text)
    return Text(safe, style=STYLES.get(text, "") if column.heading == "status" else "")


def _what_differs(entries: Sequence[Entry]) -> tuple[list[str], str]:
    """What each run was started with beside its recipe, and apart from what all of several runs were started with.

    Settings go by as little of the end of their keys as tells them apart.
    """
    flags = [entry.flags for entry in entries]
    common = set.intersection(*(set(one.items()) for one in flags)) if len(entries) > 1 else set()
    names = short_names(list(dict.fromkeys(key for one in flags for key in one)))
    options = [_options(entry.words) for entry in entries]
    shared = [one for one in options[0] if all(one in own for own in options)] if len(entries) > 1 else []
    changes = [
        " ".join(
            [
                *(one for one in own if one not in shared),
                *(f"{names[key]}={value}" for key, value in one.items() if (key, value) not in common),
            ]
        )
        for own, one in zip(options, flags, strict=True)
    ]
    return changes, " ".join([*shared, *sorted(f"{key}={value}" for key, value in common)])


def _options(words: Sequence[str]) -> list[str]:
    """Words of a command line as options with their values."""
    found: list[list[str]] = []
    for word in words:
        if word.startswith("-") or not found:
            found.append([word])
        else:
            found[-1].append(word)
    return [shlex.join(one) for one in found]


def _metric_columns(rows: Sequence[ListedRun], metrics: Sequence[str]) -> Iterator[Column]:
    """Last and best of each metric; without names, those of each run's own score, and its name."""
    if not metrics:
        own = [next(iter(row.progress.values), "") for row in rows]
        one = len(set(filter(None, own))) == 1
        yield from [] if one else [Column("metric", own)]
        yield from _last_and_best(rows, own, max(own) if one else "last")
    for metric in metrics:
        yield from _last_and_best(rows, [metric] * len(rows), metric)


def _last_and_best(rows: Sequence[ListedRun], names: Sequence[str], heading: str) -> Iterator[Column]:
    found = [row.progress.values.get(name) for row, name in zip(rows, names, strict=True)]
    yield Column(heading, [figure_text(None if values is None else values.last) for values in found], of_numbers=True)
    best = [None if values is None else values.best(better(name)) for values, name in zip(found, names, strict=True)]
    yield Column("best", [figure_text(value) for value in best], of_numbers=True)


def number_text(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def figure_text(value: float | None) -> str:
    return "" if value is None else number(value, SCORE_DIGITS)


def duration_text(seconds: float | None) -> str:
    """Seconds as `12 s`, `3.5 min`, `2.1 h` or `4.0 d`; "" for None."""
    if seconds is None:
        return ""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
