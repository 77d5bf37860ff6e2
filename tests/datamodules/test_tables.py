import numpy as np
import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.datamodules.table.parts import divided, shuffled
from lightspan.datamodules.table.rows import Diabetes, RowViews, TableData


def test_rows_are_in_one_part_and_columns_standardised_by_the_training_rows() -> None:
    data = Diabetes(val_size=60)
    data.setup()
    sizes = [len(part) for part in (data.train, data.val, data.test)]
    assert sizes == [294, 60, 88]
    table = data.train.rows.table
    np.testing.assert_allclose(table.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(table.std(axis=0), 1, atol=1e-5)
    seen = np.concatenate([part.rows.target for part in (data.train, data.val, data.test)])
    assert sorted(seen) == sorted(Diabetes().load()[1])
    assert data.bank.rows.target is data.train.rows.target


def test_no_training_row_is_in_the_gap() -> None:
    data, whole = Diabetes(leave_out=(100.0, 150.0)), Diabetes()
    data.setup()
    whole.setup()
    target = data.train.rows.target
    assert not ((target >= 100) & (target < 150)).any()
    assert len(target) == len([y for y in whole.train.rows.target if not 100 <= y < 150])
    assert np.array_equal(data.test.rows.target, whole.test.rows.target)


def test_views_are_a_function_of_the_seed_and_drop_and_shake_columns() -> None:
    row = torch.arange(1.0, 1001.0)
    torch.manual_seed(0)
    one, other = RowViews(drop=0.25, noise=0.0)(row)
    assert not torch.equal(one, other)
    assert (one == 0).float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert torch.equal(one[one != 0], row[one != 0])
    (shaken,) = RowViews(1, drop=0.0, noise=0.5)(row)
    assert (shaken - row).std().item() == pytest.approx(0.5, rel=0.1)
    data = Diabetes(views=RowViews())
    data.setup()
    assert torch.equal(data.train.sample(3, 1)["views"][0], data.train.sample(3, 1)["views"][0])
    assert not torch.equal(data.train.sample(3, 1)["views"][0], data.train.sample(3, 2)["views"][0])


class Constant(TableData):
    columns = 2

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        return np.stack([np.full(10, 3.0), np.arange(10.0)], axis=1), np.arange(10.0)


def test_a_constant_column_is_zero() -> None:
    data = Constant()
    data.setup()
    assert not data.train.rows.table[:, 0].any()
    assert np.isfinite(data.test.rows.table).all()


def test_a_column_that_is_constant_in_the_training_rows_is_zero_in_all_whatever_their_rounded_mean() -> None:
    for number in (0.1, 152.3, 1e6 + 0.1, 3.3e8 + 0.3):
        for count in (3, 7, 17, 100, 999):
            table = np.full((2 * count, 1), number)
            order = shuffled(2 * count, 0)
            table[order.row[0]] = 5  # a row to test with
            parts = divided(table, np.arange(2.0 * count), order, 1, None)
            assert not any(part.table.any() for part in parts), (number, count)


def test_settings_out_of_range_are_refused() -> None:
    for settings, message in (
        ({"val_size": -1}, "val_size=-1 is negative"),
        ({"leave_out": (2.0, 1.0)}, r"leave_out=\[2.0, 1.0\] must be two numbers"),
    ):
        with pytest.raises(UserError, match=message):
            Diabetes(**settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"drop=1.0"):
        RowViews(drop=1.0)
    with pytest.raises(UserError, match=r"leave no training row of 10"):
        Constant(leave_out=(0.0, 10.0)).setup()
