"""Rows of a table in parts to train on, to validate with and to test with. Without torch.

Shapes: N rows, F columns.
"""

from typing import NamedTuple

import numpy as np

from lightspan.core.errors import UserError


class Rows(NamedTuple):
    """table: float32 [N, F]; target: float32 [N], or of classes their numbers, int64 [N]."""

    table: np.ndarray
    target: np.ndarray


class Parts(NamedTuple):
    """What trains, validates and tests. Without rows of its own `val` is `test`."""

    train: Rows
    val: Rows
    test: Rows


class RowOrder(NamedTuple):
    """Rows in the order in which they are divided: those for testing first, then those for validation.

    row: int64 [N], all numbers of rows.
    block: [N]; places side by side with one block come into one part.
    """

    row: np.ndarray
    block: np.ndarray


def shuffled(count: int, seed: int) -> RowOrder:
    """Any row may come into any part."""
    return RowOrder(np.random.default_rng(seed).permutation(count), np.arange(count))


def divided(
    table: np.ndarray, target: np.ndarray, order: RowOrder, val_size: int, leave_out: tuple[float, float] | None
) -> Parts:
    """A fifth of the rows tests, and at least one. Columns are standardised with the mean and deviation of the training
    rows; a value that is missing (NaN), and a column that is constant there, becomes 0.

    Args:
        table: numbers [N, F].
        target: [N], floating-point numbers or whole numbers of classes.
        val_size: rows that validate; 0 takes those that test.
        leave_out: no training row has a target from the first of these numbers up to the second.
    Raises: UserError if no training row is left.
    """
    ends = np.flatnonzero(np.append(order.block[1:] != order.block[:-1], True)) + 1
    first = _end_from(ends, max(1, len(target) // 5))
    second = _end_from(ends, first + val_size) if val_size else first
    test, val, train = np.split(order.row, [first, second])
    if leave_out is not None:
        train = train[(target[train] < leave_out[0]) | (target[train] >= leave_out[1])]
    if not len(train):
        kept = f", of which {len(ends)} groups each stay together" if len(ends) < len(target) else ""
        raise UserError(
            f"val_size={val_size} and leave_out={leave_out} leave no training row of {len(target)}{kept}; change one "
            "of them, or give more rows"
        )
    answers = target.astype(np.float32 if target.dtype.kind == "f" else np.int64)
    scaled = _standardised(np.asarray(table, dtype=np.float64), train).astype(np.float32)
    rows = [Rows(scaled[part], answers[part]) for part in (train, val, test)]
    return Parts(rows[0], rows[1 if val_size else 2], rows[2])


def _end_from(ends: np.ndarray, place: int) -> int:
    """The first end of a block from a place on, or the last of all."""
    return int(ends[min(int(np.searchsorted(ends, place)), len(ends) - 1)])


def _standardised(table: np.ndarray, train: np.ndarray) -> np.ndarray:
    """With the moments of the values that are known in the training rows; of a column without any these are 0."""
    known = ~np.isnan(table[train])
    count = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, table[train], 0).sum(axis=0) / count
    deviation = np.sqrt(np.where(known, (table[train] - mean) ** 2, 0).sum(axis=0) / count)
    # The rounded mean of equal numbers need not be that number, so that their deviation can be above 0.
    low, high = np.where(known, table[train], np.inf).min(axis=0), np.where(known, table[train], -np.inf).max(axis=0)
    varies = (low < high) & (deviation > 0)
    return np.where(varies & ~np.isnan(table), (table - mean) / np.where(varies, deviation, 1), 0)
