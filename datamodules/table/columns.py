"""The columns of a file of rows, CSV or Parquet: as numbers, or as text that becomes a number for each value.

Files are those of others: nothing in one runs, and what would fill the memory is refused
(`lightspan.core.files.foreign`).
Shapes: N rows, F columns of numbers.
"""

import csv
import io
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightspan.core.errors import UserError, install_extra, one_line
from lightspan.core.files.foreign import BYTES, CELLS, NUMBERS, bounded_memory, opened_regular, whole_text
from lightspan.datamodules.image.picture_files import Kind

Cells = np.ndarray
"""A column [N]: float64, NaN where a cell is missing; or text, None where one is missing."""
Columns = dict[str, Cells]
Encoding = Literal["one_hot", "index"]

TABLES = Kind("table", "CSV (.csv, .tsv) or Parquet (.parquet)", (".csv", ".tsv", ".parquet"))
DELIMITERS = ",;\t|"
MISSING = ("", "NA", "N/A", "NaN", "nan", "NULL", "null", "None")
LARGEST = float(np.finfo(np.float32).max)
NUMBERS_AGAIN = "if its text stands for missing values, add that to data.init_args.missing_values"
"""What makes a column of numbers out of `text_among_numbers`."""
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def read_columns(path: Path, delimiter: str | None = None, missing: Collection[str] = MISSING) -> Columns:
    """Of a Parquet file, as its name ends in `.parquet`, or of a CSV file in UTF-8 whose first line names the columns.

    A column of a CSV file is numbers if all of its cells are that are not missing; else it is text.

    Args:
        delimiter: of a CSV file; None takes that of `DELIMITERS` that its first line has most often.
        missing: texts that stand for a missing value.
    Raises: ValueError for a file that is damaged, empty or beyond a limit, naming the line; UserError without pyarrow.
    """
    columns = _parquet(path, missing) if path.suffix.lower() == ".parquet" else _csv(path, delimiter, missing)
    if not columns:
        raise ValueError("it has no column with a name")
    for name, cells in columns.items():
        if not len(cells):
            raise ValueError("it has no rows")
        if cells.dtype.kind == "f" and (wrong := np.flatnonzero(np.abs(cells) > LARGEST)).size:
            raise ValueError(f"{one_line(name)!r} has {cells[wrong[0]]:g} in row {wrong[0] + 1}, too large for float32")
    return columns


def encoded(
    columns: Mapping[str, Cells], categorical: Collection[str], encoding: Encoding, most: int
) -> tuple[list[str], np.ndarray]:
    """(names [F], numbers float64 [N F] with NaN where a value is missing). Text becomes categories in sorted order.

    Args:
        categorical: columns of numbers that stand for categories, such as postcodes.
        encoding: "one_hot" makes a column of 0 and 1 of each category; "index" one column of their places.
        most: categories that a column may have.
    Raises: UserError for more; ValueError beyond the limit of numbers.
    """
    names: list[str] = []
    made: list[np.ndarray] = []
    for name, cells in columns.items():
        if cells.dtype.kind == "f" and name not in categorical:
            names.append(name)
            made.append(cells)
            continue
        categories, place_N = categories_of(cells)
        if len(categories) > most:
            text = text_among_numbers(cells)
            raise UserError(
                f"column {one_line(name)!r} has {len(categories):,} categories, such as "
                f"{text or repr(one_line(categories[0])[:40])}, and max_categories={most}; "
                + (f"{NUMBERS_AGAIN}, " if text else "")
                + "leave it out with data.init_args.without, raise data.init_args.max_categories, or set "
                "data.init_args.categories=index"
            )
        gap_N = place_N < 0
        if encoding == "index":
            names.append(name)
            made.append(np.where(gap_N, np.nan, place_N))
            continue
        NUMBERS.require((len(made) + len(categories)) * len(cells))
        names += [f"{name}={category}" for category in categories]
        made += [np.where(gap_N, np.nan, place_N == place) for place in range(len(categories))]
    if not made:
        raise UserError("no column is left to learn from; change features or without")
    return names, np.stack(made, axis=1)


def categories_of(cells: Cells) -> tuple[list[str], np.ndarray]:
    """(the different values as sorted text, their places int64 [N], -1 where a value is missing). Numbers are sorted as
    numbers.
    """
    if cells.dtype.kind == "f":
        values, place_N = np.unique(cells, return_inverse=True, equal_nan=True)
        kept = [f"{value:.17g}" for value in values if not np.isnan(value)]
        return kept, np.where(np.isnan(cells), -1, place_N)
    kept = sorted({cell for cell in cells if cell is not None})
    places = {value: place for place, value in enumerate(kept)}
    return kept, np.array([places.get(cell, -1) for cell in cells], dtype=np.int64)


def text_among_numbers(cells: Cells) -> str:
    """The first cell that is no number and its row, in words, if it makes a column of numbers one of text: if more than
    half of the cells that are not missing are numbers. Else empty.
    """
    if cells.dtype.kind == "f":
        return ""
    known = [(row, cell) for row, cell in enumerate(cells, start=1) if cell is not None]
    others = [(row, cell) for row, cell in known if not _NUMBER.fullmatch(cell)]
    if not others or 2 * len(others) >= len(known):
        return ""
    row, cell = others[0]
    return f"{one_line(cell)[:40]!r} in row {row}"


def gaps(cells: Cells) -> np.ndarray:
    """Where a column lacks its value, bool [N]."""
    return np.isnan(cells) if cells.dtype.kind == "f" else np.array([cell is None for cell in cells], dtype=bool)


def _csv(path: Path, delimiter: str | None, missing: Collection[str]) -> Columns:
    text = whole_text(path)
    if not text.strip():
        raise ValueError("it is empty")
    first = text.partition("\n")[0]
    delimiter = delimiter or max(DELIMITERS, key=first.count)
    CELLS.require(text.count(delimiter))  # before a line of any number of fields becomes a list
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    most, cells, line = CELLS.most, 0, 1
    names: list[str] = []
    columns: list[list[str | None]] = []
    try:
        for row in reader:
            if not names:
                names = [name.strip() for name in row]
                columns = [[] for _ in names]
                if names and all(_NUMBER.fullmatch(name) for name in names):
                    raise ValueError("its first line has numbers alone; the first line must name the columns")
            elif row:
                if len(row) != len(names):
                    raise ValueError(f"line {line} has {len(row)} fields, and the first line names {len(names)}")
                cells += len(row)
                if cells > most:
                    CELLS.require(cells)
                for column, cell in zip(columns, row, strict=True):
                    column.append(_cell(cell, missing))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {line}: {error}") from error
    # A program that numbers the rows leaves that column without a name.
    return {name: _typed(columns[place]) for name, place in _places(names).items() if name}


def _places(names: Sequence[str]) -> dict[str, int]:
    """Raises: ValueError for a name that two columns have."""
    places: dict[str, int] = {}
    for place, name in enumerate(names):
        if name and name in places:
            raise ValueError(f"two of its columns are called {one_line(name)!r}; rename one")
        places[name] = place
    return places


def _cell(text: str, missing: Collection[str]) -> str | None:
    text = text.strip()
    return None if text in missing else text


def _typed(cells: Sequence[str | None]) -> Cells:
    if all(cell is None or _NUMBER.fullmatch(cell) for cell in cells):
        return np.array([np.nan if cell is None else float(cell) for cell in cells], dtype=np.float64)
    return _texts(cells)


def _texts(cells: Sequence[str | None]) -> Cells:
    made = np.empty(len(cells), dtype=object)
    made[:] = cells
    return made


def _parquet(path: Path, missing: Collection[str]) -> Columns:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"Parquet files are read by pyarrow; install it: {install_extra('tables')}") from error
    with opened_regular(path) as file:
        BYTES.require(os.fstat(file.fileno()).st_size)
        try:
            stored = parquet.ParquetFile(file)
            said = stored.metadata
            CELLS.require(said.num_rows * said.num_columns)
            BYTES.require(sum(said.row_group(number).total_byte_size for number in range(said.num_row_groups)))
            kinds = [(field.name, field.type) for field in stored.schema_arrow]
            for name, kind in kinds:
                _require_readable(name, kind)
            # A text is stored once however many cells have it, and stays so in memory.
            texts = [name for name, kind in kinds if _is_text(kind)]
            with bounded_memory():  # sizes above are what the file says of itself
                table = parquet.ParquetFile(file, read_dictionary=texts).read(use_threads=False)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"it is no Parquet file: {one_line(error)[:200]}") from error
    return {name: _arrow(table.column(place), missing) for name, place in _places(table.column_names).items()}


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind)


def _require_readable(name: str, kind: Any) -> None:
    """Before anything is read: a cell that is a list may have any number of entries. Raises: ValueError."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    number = (types.is_integer, types.is_floating, types.is_decimal, types.is_boolean, types.is_temporal, types.is_null)
    if not (_is_text(kind) or any(is_number(kind) for is_number in number)):
        raise ValueError(f"{one_line(name)!r} is a column of {kind}; leave it out of the file")


def _arrow(column: Any, missing: Collection[str]) -> Cells:
    """Dates and times become numbers that grow with them, in the unit in which they are stored."""
    import pyarrow
    from pyarrow import types

    kind = column.type
    if types.is_dictionary(kind) and _is_text(kind.value_type):
        cells: list[str | None] = []
        for chunk in column.chunks:
            texts = [None if text is None else _cell(text, missing) for text in chunk.dictionary.to_pylist()]
            cells += [None if place is None else texts[place] for place in chunk.indices.to_pylist()]
        return _texts(cells)
    if types.is_dictionary(kind):
        return _arrow(column.cast(kind.value_type), missing)
    if types.is_temporal(kind):
        column = column.cast(pyarrow.int32() if kind.bit_width == 32 else pyarrow.int64())
    elif types.is_boolean(kind):
        column = column.cast(pyarrow.int8())
    return column.cast(pyarrow.float64(), safe=False).to_numpy(zero_copy_only=False).astype(np.float64)
