"""Rows of your own, from a CSV or Parquet file. Nothing in the file runs.

Shapes: N rows, F columns of numbers.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightspan.core.files.places import ReadPath
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.table.columns import MISSING, Encoding
from lightspan.datamodules.table.own import Missing, OwnTable, TableSettings, TargetKind, read_table
from lightspan.datamodules.table.parts import Parts
from lightspan.datamodules.table.rows import TableData


class TableFile(TableData):
    """Rows of a CSV or Parquet file, with a number or a class to predict from each, or neither.

    Text becomes categories, each value of a column one, and so do numbers in columns that `categorical` names.

    Args:
        path: of the file; `~` is the home folder. A name that ends in `.parquet` is read as Parquet, any other as CSV
            in UTF-8, whose first line names the columns; one without a name, such as an index, is left out.
        target: the column to predict. None: there is none, and all labels are 0.
        target_kind: "number" or "class", whose classes are the column's values in sorted order. None takes a number
            where the column has numbers.
        features: the columns to learn from. None takes all but target, group and time.
        without: columns not to learn from.
        categorical: columns of numbers that are categories.
        categories: "one_hot" has a column of 0 and 1 for each category, and "index" one with its place in sorted order,
            which says that the order means something.
        max_categories: that a column may have in features, or as a target of classes, at least 1; a column of names,
            comments or measurements has more.
        missing: what happens where a value is missing. "refuse" names the columns, "drop" leaves out the rows, "impute"
            takes the column's mean over the training rows, of a category its share. A row without its target, group or
            time is left out in both.
        missing_values: the texts that stand for a missing value.
        group: rows with the same value in this column, such as a patient, are all in one part.
        time: the latest rows by this column test, those before them validate, and the others train; equal ones are in
            one part. Numbers, or text that sorts by time, such as 2024-05-31.
        delimiter: of a CSV file, one character. None takes the one of , ; tab | that the first line has most often.
        val_size: rows to validate with. None takes a tenth, and 0 the rows for testing.
        settings: the others of `TableData`.
    Raises: UserError at setup for a file that cannot be read, naming the line, and for columns that it does not have.

    Attributes:
        own: all rows, after `setup`, with the names of columns and classes.
    """

    def __init__(
        self,
        path: ReadPath,
        target: str | None = None,
        target_kind: TargetKind | None = None,
        features: list[str] | None = None,
        without: Sequence[str] = (),
        categorical: Sequence[str] = (),
        categories: Encoding = "one_hot",
        max_categories: int = 100,
        missing: Missing = "refuse",
        missing_values: Sequence[str] = MISSING,
        group: str | None = None,
        time: str | None = None,
        delimiter: str | None = None,
        val_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(val_size=val_size or 0, **settings)
        self.held_out = val_size
        self.table = TableSettings(
            *(path, target, target_kind, features, without, categorical, categories, max_categories),
            *(missing, missing_values, group, time, delimiter),
        )
        self.own: OwnTable | None = None
        self._content = ""

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        self.own = read_table(self.table)
        self.columns = len(self.own.names)
        return self.own.table, self.own.target

    def parts(self) -> Parts:
        self.load()
        assert self.own is not None
        parts = self.own.parts(self.held_out, self.leave_out, self.split_seed)
        self._content = hashlib.sha256(b"".join(array.tobytes() for array in parts.train)).hexdigest()
        return parts

    def setup(self, stage: str | None = None) -> None:
        if self.train is not None:
            return
        super().setup(stage)
        assert self.own is not None
        for remark in self.own.remarks:
            say(f"rows: {remark}")

    def training_content(self) -> str:
        return self._content
