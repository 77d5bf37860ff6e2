"""A table of your own: which columns of a file are learned from, what is predicted, and what happens to gaps. Without
torch, so that a recipe can be fitted to a table before anything is built.

Shapes: N rows, F columns of numbers.
"""

import difflib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lightspan.core.errors import UserError, one_line
from lightspan.core.files.atomic import expanded
from lightspan.core.files.places import ReadPath
from lightspan.datamodules.table.columns import (
    MISSING,
    NUMBERS_AGAIN,
    Cells,
    Columns,
    Encoding,
    categories_of,
    encoded,
    gaps,
    read_columns,
    text_among_numbers,
)
from lightspan.datamodules.table.parts import Parts, RowOrder, divided, shuffled

Missing = Literal["refuse", "drop", "impute"]
TargetKind = Literal["number", "class"]
MOST_NAMED = 10


@dataclass(frozen=True)
class TableSettings:
    """What `lightspan.datamodules.table.file.TableFile` describes.

    Raises: UserError for settings that contradict one another or are out of range.
    """

    path: ReadPath
    target: str | None = None
    target_kind: TargetKind | None = None
    features: Sequence[str] | None = None
    without: Sequence[str] = ()
    categorical: Sequence[str] = ()
    categories: Encoding = "one_hot"
    max_categories: int = 100
    missing: Missing = "refuse"
    missing_values: Collection[str] = MISSING
    group: str | None = None
    time: str | None = None
    delimiter: str | None = None

    def __post_init__(self) -> None:
        if self.max_categories < 1:
            raise UserError(f"TableFile max_categories={self.max_categories} must be at least 1")
        if self.group is not None and self.time is not None:
            raise UserError(f"TableFile divides by group={self.group} or by time={self.time}; set one of them to null")
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            raise UserError(f"TableFile delimiter={self.delimiter!r} must be one character and no quotation mark")
        if self.target is not None and self.target in (self.features or ()):
            raise UserError(f"features has the target, {one_line(self.target)!r}, which would give the answer away")

    def chosen(self, known: Sequence[str]) -> list[str]:
        """The columns to learn from. Raises: UserError for a setting that names a column that is not there."""
        single = (("target", self.target), ("group", self.group), ("time", self.time))
        named = [(setting, [name]) for setting, name in single if name is not None]
        several = (("features", self.features or ()), ("without", self.without), ("categorical", self.categorical))
        for setting, names in (*named, *several):
            for name in names:
                _require_column(name, setting, known)
        apart = {self.target, self.group, self.time}
        chosen = [name for name in known if name not in apart] if self.features is None else self.features
        return [name for name in dict.fromkeys(chosen) if name not in self.without]


@dataclass(frozen=True)
class OwnTable:
    """All rows of a file.

    Attributes:
        names: of the F columns.
        table: float64 [N, F], NaN where a value is missing.
        target: [N], float64, or int64 for classes; zeros without a target.
        classes: of the target in the order of their numbers; empty for numbers.
        key: the column of `group` or `time` [N], if there is one.
        remarks: lines on what was found.
    """

    settings: TableSettings
    names: tuple[str, ...]
    table: np.ndarray
    target: np.ndarray
    classes: tuple[str, ...]
    key: Cells | None
    remarks: tuple[str, ...]

    def parts(self, val_size: int | None, leave_out: tuple[float, float] | None, seed: int) -> Parts:
        """As `divided`; a `val_size` of None is a tenth of the rows, and at least one."""
        val_size = max(1, len(self.target) // 10) if val_size is None else val_size
        return divided(self.table, self.target, self.order(seed), val_size, leave_out)

    def order(self, seed: int) -> RowOrder:
        """Random, of whole groups if there are any; by time the latest first."""
        if self.key is None:
            return shuffled(len(self.target), seed)
        _, place_N = categories_of(self.key)
        if self.settings.time is not None:
            rank_N = -place_N
        else:
            rank_N = np.random.default_rng(seed).permutation(int(place_N.max()) + 1)[place_N]
        row = np.argsort(rank_N, kind="stable")
        return RowOrder(row, rank_N[row])


def read_table(settings: TableSettings) -> OwnTable:
    """Raises: UserError for a file that cannot be read, naming the line, and for columns that it does not have."""
    file = expanded(settings.path, "data.init_args.path")
    with _naming(f"data.init_args.path={file} cannot be read as a table"):
        columns = read_columns(file, settings.delimiter, settings.missing_values)
    columns, remarks = _without_gaps(columns, settings)
    learned = {name: columns[name] for name in settings.chosen([*columns])}
    with _naming(f"{file} has too much in it"):
        names, table = encoded(learned, settings.categorical, settings.categories, settings.max_categories)
    target, classes = _answers(columns, settings, len(table))
    if classes:
        shown = ", ".join(classes[:MOST_NAMED]) + (", ..." if len(classes) > MOST_NAMED else "")
        remarks.append(f"{len(classes)} classes of {settings.target}: {shown}")
    remarks += _mixed(columns, [*learned], settings)
    key = settings.group if settings.group is not None else settings.time
    return OwnTable(
        settings, tuple(names), table, target, classes, None if key is None else columns[key], tuple(remarks)
    )


@contextmanager
def _naming(what: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error


def _without_gaps(columns: Columns, settings: TableSettings) -> tuple[Columns, list[str]]:
    """(what is left as `missing` says, lines on it); in it values may be missing only if they are imputed."""
    needed = [name for name in (settings.target, settings.group, settings.time) if name is not None]
    lacking = {name: gaps(columns[name]) for name in dict.fromkeys([*settings.chosen([*columns]), *needed])}
    lacking = {name: gap_N for name, gap_N in lacking.items() if gap_N.any()}
    if not lacking:
        return columns, []
    first, total = min(int(np.argmax(gap_N)) for gap_N in lacking.values()), len(next(iter(lacking.values())))
    shown = ", ".join(f"{one_line(name)!r} ({int(gap_N.sum()):,})" for name, gap_N in [*lacking.items()][:MOST_NAMED])
    shown += f" and {len(lacking) - MOST_NAMED} more columns" if len(lacking) > MOST_NAMED else ""
    if settings.missing == "refuse":
        raise UserError(
            f"{settings.path}: of {total:,} rows values are missing in {shown}, first in row {first + 1}; set "
            "data.init_args.missing to impute or drop, or leave columns out with data.init_args.without"
        )
    dropping = [gap_N for name, gap_N in lacking.items() if settings.missing == "drop" or name in needed]
    kept = ~np.logical_or.reduce([np.zeros(total, dtype=bool), *dropping])
    if not kept.any():
        raise UserError(f"{settings.path}: missing={settings.missing} leaves no row; values are missing in {shown}")
    said = f"values are missing in {shown}; {total - int(kept.sum()):,} of {total:,} rows are left out"
    said += ", and other gaps are filled with the mean of the training rows" if settings.missing == "impute" else ""
    return {name: cells[kept] for name, cells in columns.items()}, [said]


def _mixed(columns: Columns, learned: Sequence[str], settings: TableSettings) -> list[str]:
    """A line on columns of numbers that text has made categories, unless the settings say that these are."""
    answers = [] if settings.target is None or settings.target_kind == "class" else [settings.target]
    looked = [name for name in (*learned, *answers) if name not in settings.categorical]
    found = {name: text for name in looked if (text := text_among_numbers(columns[name]))}
    shown = ", ".join(f"{one_line(name)!r} ({text})" for name, text in [*found.items()][:MOST_NAMED])
    shown += f" and {len(found) - MOST_NAMED} more columns" if len(found) > MOST_NAMED else ""
    why = "numbers become categories, one for each, where a column has text too"
    return [f"{why}: {shown}; {NUMBERS_AGAIN}"] if found else []


def _answers(columns: Columns, settings: TableSettings, count: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """(targets [N], names of classes)."""
    if settings.target is None:
        return np.zeros(count, dtype=np.int64), ()
    cells = columns[settings.target]
    is_number = cells.dtype.kind == "f"
    if settings.target_kind == "number" and not is_number:
        text = text_among_numbers(cells)
        raise UserError(
            f"target={one_line(settings.target)} has text{text and f', such as {text}'}, so it cannot be predicted as "
            f"a number; {text and f'{NUMBERS_AGAIN}; otherwise '}train a classifier, such as "
            "supervised/table_classification, or write the column as numbers"
        )
    if is_number and settings.target_kind != "class":
        return cells, ()
    categories, place_N = categories_of(cells)
    if len(categories) > settings.max_categories:
        raise UserError(
            f"target={one_line(settings.target)} has {len(categories):,} different values in {len(cells):,} rows, and "
            f"max_categories={settings.max_categories}; predict numbers by regression, such as with "
            "supervised/table_regression, or raise data.init_args.max_categories if each value is a class"
        )
    return place_N, tuple(categories)


def _require_column(name: str, setting: str, known: Sequence[str]) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {one_line(near[0])!r}?" if near else f"it has {one_line(', '.join(known[:20]))}"
    raise UserError(f"data.init_args.{setting}: the file has no column {one_line(name)!r}; {hint}")
