"""Rows of real tables with a number to predict: scikit-learn's diabetes, and house prices. Nothing is downloaded.

Shapes: N rows, F columns.
"""

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightspan.datamodules.images.views import seeded
from lightspan.datamodules.loading.loader import EvaluationLoader
from lightspan.datamodules.loading.ranks import say, sizes
from lightspan.datamodules.loading.sample_sets import SampleSets, require_sizes
from lightspan.datamodules.r_data import read_r_data
from lightspan.errors import UserError
from lightspan.places import ReadPath


class Rows(NamedTuple):
    """table: float32 [N, F]; target: float32 [N]."""

    table: np.ndarray
    target: np.ndarray


class RowViews:
    """Independent views of a row: each column is dropped at random, then all get Gaussian noise.

    Args:
        count: views of a row, at least 1.
        drop: probability that a column has its training mean instead of its value, in [0, 1).
        noise: standard deviation of the noise, >= 0, where that of a column is 1.
    """

    def __init__(self, count: int = 2, drop: float = 0.2, noise: float = 0.1) -> None:
        if count < 1 or not 0 <= drop < 1 or noise < 0:
            raise UserError(f"RowViews count={count} must be at least 1, drop={drop} in [0, 1) and noise={noise} >= 0")
        self.count, self.drop, self.noise = count, drop, noise

    def __call__(self, row_F: Tensor) -> list[Tensor]:
        return [self._view(row_F) for _ in range(self.count)]

    def _view(self, row_F: Tensor) -> Tensor:
        return row_F * (torch.rand_like(row_F) >= self.drop) + self.noise * torch.randn_like(row_F)


class RowSamples:
    """Samples of `TableBatch`, or, with views, of `TableViewsBatch`."""

    def __init__(self, rows: Rows, views: RowViews | None = None) -> None:
        self.rows, self.views = rows, views

    def __len__(self) -> int:
        return len(self.rows.target)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        row_F = torch.from_numpy(self.rows.table[index])
        rest = {"target": torch.tensor(self.rows.target[index]), "index": torch.tensor(index)}
        if self.views is None:
            return {"table": row_F, **rest}
        with seeded(seed):
            return {"views": self.views(row_F), **rest}


class TableData(SampleSets):
    """What tables share. A subclass says how many columns it has, and loads. A fifth of the rows is for testing.

    Training batches are `TableViewsBatch` if `views` is given, else `TableBatch`; all other batches are `TableBatch`.
    Columns are standardised with the mean and deviation of the training rows; one that is constant there becomes 0.

    Args:
        batch_size: rows of one optimiser step over all ranks.
        views: makes the views of a training row.
        val_size: validate on this many rows held out from training, so that settings can be chosen without the test
            rows. 0 trains on all and validates on the test rows.
        leave_out: no training row has a target from the first of these two numbers up to the second, to see what is
            predicted in the gap. None leaves out none.
        split_seed: of what is for testing and validation. `seed` is that of the order and the views.
        num_workers: processes that fetch batches.
    """

    columns: ClassVar[int]  # F

    def __init__(
        self,
        batch_size: int = 64,
        views: RowViews | None = None,
        val_size: int = 0,
        leave_out: tuple[float, float] | None = None,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        require_sizes(None, val_size)
        if leave_out is not None and not leave_out[0] < leave_out[1]:
            raise UserError(f"leave_out={list(leave_out)} must be two numbers with the smaller one first")
        self.batch_size, self.views, self.val_size, self.leave_out = batch_size, views, val_size, leave_out
        self.split_seed, self.seed, self.num_workers = split_seed, seed, num_workers
        self.train: RowSamples | None = None

    @abstractmethod
    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """(columns [N, F], targets [N]) of all rows."""

    def setup(self, stage: str | None = None) -> None:
        """Load, split and standardise, once. Raises: UserError if no training row is left."""
        if self.train is not None:
            return
        table, target = (np.asarray(values, dtype=np.float64) for values in self.load())
        order = np.random.default_rng(self.split_seed).permutation(len(target))
        test, rest = order[: len(order) // 5], order[len(order) // 5 :]
        val, train = (rest[: self.val_size], rest[self.val_size :]) if self.val_size else (test, rest)
        if self.leave_out is not None:
            train = train[(target[train] < self.leave_out[0]) | (target[train] >= self.leave_out[1])]
        if not len(train):
            raise UserError(
                f"val_size={self.val_size} and leave_out={self.leave_out} leave no training row of {len(target)}; "
                "change one of them"
            )
        mean, deviation = table[train].mean(axis=0), table[train].std(axis=0)
        table = np.where(deviation > 0, (table - mean) / np.where(deviation > 0, deviation, 1), 0)
        parts = [Rows(table[part].astype(np.float32), target[part].astype(np.float32)) for part in (train, val, test)]
        self.train, self.bank = RowSamples(parts[0], self.views), RowSamples(parts[0])
        self.val, self.test = RowSamples(parts[1]), RowSamples(parts[2])
        validated = len(self.val) if self.val_size else None
        samples = f"rows of {table.shape[1]} columns"
        say(f"rows: {type(self).__name__}, {sizes(len(self.train), validated, len(self.test), samples)}")

    def test_dataloader(self) -> EvaluationLoader:
        return self._evaluate(self.test)


class Diabetes(TableData):
    """442 patients, 10 measurements, and how far their diabetes went within a year, from 25 to 346, from scikit-learn
    (Efron et al. 2004).
    """

    columns = 10

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        from sklearn.datasets import load_diabetes

        return load_diabetes(return_X_y=True)


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
