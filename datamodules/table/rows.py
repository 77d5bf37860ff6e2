"""Rows of real tables with a number or a class to predict: scikit-learn's diabetes and breast cancer, and house prices.
Nothing is downloaded.

Shapes: N rows, F columns.
"""

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.core.ranges import require_in
from lightspan.datamodules.image.augment.views import VIEWS, seeded
from lightspan.datamodules.loading.ranks import say, sizes
from lightspan.datamodules.loading.sample_sets import SplitSampleSets, require_sizes
from lightspan.datamodules.r_data import read_r_data
from lightspan.datamodules.table.batch import LabelledTableBatch, LabelledTableViewsBatch, TableBatch, TableViewsBatch
from lightspan.datamodules.table.parts import Parts, Rows, divided, shuffled


class RowViews:
    """Independent views of a row: each column is dropped at random, then all get Gaussian noise.

    Args:
        count: views of a row, in [1, 4096].
        drop: probability that a column has its training mean instead of its value, in [0, 1).
        noise: standard deviation of the noise, >= 0, where that of a column is 1.
    """

    def __init__(self, count: int = 2, drop: float = 0.2, noise: float = 0.1) -> None:
        require_in(VIEWS, count=count)
        if not 0 <= drop < 1 or noise < 0:
            raise UserError(f"RowViews drop={drop} must lie in [0, 1) and noise={noise} be >= 0")
        self.count, self.drop, self.noise = count, drop, noise

    def __call__(self, row_F: Tensor) -> list[Tensor]:
        return [self._view(row_F) for _ in range(self.count)]

    def _view(self, row_F: Tensor) -> Tensor:
        return row_F * (torch.rand_like(row_F) >= self.drop) + self.noise * torch.randn_like(row_F)


class RowSamples:
    """Samples of `TableBatch`, or, with views, of `TableViewsBatch`; where targets are classes, of `LabelledTableBatch`
    or `LabelledTableViewsBatch`.
    """

    def __init__(self, rows: Rows, views: RowViews | None = None) -> None:
        self.rows, self.views = rows, views

    @property
    def batch_type(self) -> type:
        numbers = self.rows.target.dtype.kind == "f"
        if self.views is None:
            return TableBatch if numbers else LabelledTableBatch
        return TableViewsBatch if numbers else LabelledTableViewsBatch

    def __len__(self) -> int:
        return len(self.rows.target)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        row_F = torch.from_numpy(self.rows.table[index])
        field = "target" if self.rows.target.dtype.kind == "f" else "label"
        rest = {field: torch.tensor(self.rows.target[index]), "index": torch.tensor(index)}
        if self.views is None:
            return {"table": row_F, **rest}
        with seeded(seed):
            return {"views": self.views(row_F), **rest}


class TableData(SplitSampleSets):
    """What tables share. A subclass says how many columns it has, and loads. Rows are divided and standardised by
    `lightspan.datamodules.table.parts.divided`.

    Batches are those of `RowSamples`, of which only training batches have views.

    Args:
        batch_size: rows of one optimiser step over all ranks.
        views: makes the views of a training row.
        val_size: validate on this many rows held out from training, so that settings can be chosen without the test
            rows. 0 trains on all and validates on the test rows.
        leave_out: no training row has a target from the first of these two numbers up to the second, to see what is
            predicted in the gap. None leaves out none.
        split_seed: of what is for testing and validation. `seed` is that of the order and the views.
        settings: the others of `SampleSets`.
    """

    columns: int
    """F; known after `setup` where it depends on a file."""

    def __init__(
        self,
        batch_size: int = 64,
        views: RowViews | None = None,
        val_size: int = 0,
        leave_out: tuple[float, float] | None = None,
        split_seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(batch_size, **settings)
        require_sizes(None, val_size)
        if leave_out is not None and not leave_out[0] < leave_out[1]:
            raise UserError(f"leave_out={list(leave_out)} must be two numbers with the smaller one first")
        self.views, self.val_size, self.leave_out, self.split_seed = views, val_size, leave_out, split_seed
        self.train: RowSamples | None = None

    @abstractmethod
    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Of all rows (columns [N, F], NaN where a value is missing; targets [N], integers if they are classes)."""

    def parts(self) -> Parts:
        """Loads, divides and standardises. Raises: UserError if no training row is left."""
        table, target = self.load()
        return divided(table, target, shuffled(len(target), self.split_seed), self.val_size, self.leave_out)

    def setup(self, stage: str | None = None) -> None:
        """Once. Raises: UserError as `parts`."""
        if self.train is not None:
            return
        parts = self.parts()
        self.train, self.bank = RowSamples(parts.train, self.views), RowSamples(parts.train)
        self.val, self.test = RowSamples(parts.val), RowSamples(parts.test)
        validated = None if parts.val is parts.test else len(self.val)
        samples = f"rows of {parts.train.table.shape[1]} columns"
        say(f"rows: {type(self).__name__}, {sizes(len(self.train), validated, len(self.test), samples)}")


class Diabetes(TableData):
    """442 patients, 10 measurements, and how far their diabetes went within a year, from 25 to 346, from scikit-learn
    (Efron et al. 2004).
    """

    columns = 10

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        from sklearn.datasets import load_diabetes

        return load_diabetes(return_X_y=True)


class BreastCancer(TableData):
    """569 growths, 30 measurements of each, and whether it is malignant (0) or benign (1), from scikit-learn (Street et
    al. 1993).
    """

    columns = 30

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        from sklearn.datasets import load_breast_cancer

        return load_breast_cancer(return_X_y=True)


class Ames(TableData):
    """2,930 houses sold in Ames, Iowa (De Cock 2011), from the R package modeldata. The target is the decimal logarithm
    of the price in dollars, from 4.1 to 5.9; columns are its numbers, and one for each value of the others.

    Args:
        library: folder of R packages that contains modeldata; None searches the usual places.
        settings: those of `TableData`.
    """

    columns = 316

    def __init__(self, library: ReadPath | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.library = library

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        (houses,) = read_r_data("modeldata", ("ames",), self.library)
        price = np.log10(houses.pop("Sale_Price").to_numpy(dtype=np.float64))
        columns: list[np.ndarray] = []
        for name in houses.columns:
            values = houses[name]
            if values.dtype.name == "category":
                columns += [(values == each).to_numpy(dtype=np.float64) for each in values.cat.categories]
            else:
                columns.append(values.to_numpy(dtype=np.float64))
        return np.stack(columns, axis=1), price
