"""Pictures of many bands in colours: the bands that were asked for, each stretched by itself over what is valid."""

from pathlib import Path
from typing import Any

import torch

from lightspan.callbacks.pictures.band_colours import band_bounds, chosen_bands, coloured_dates
from lightspan.callbacks.pictures.first_batch import FirstBatch
from lightspan.datamodules.shards.decoders import decode_image


def batch(*dates: int) -> dict[str, Any]:
    image = torch.rand(3, 5, *dates, 6, 7, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 6).view(
        1, 5, *[1] * len(dates), 1, 1
    )
    return {"image": image, "valid": torch.ones_like(image, dtype=torch.int64)}


def test_each_band_goes_from_black_to_white_by_its_own_values() -> None:
    given = batch()
    shown = coloured_dates(given, (4, 0, 2))
    assert shown is not None
    assert shown.shape == (3, 1, 3, 6, 7)
    for colour, band in enumerate((4, 0, 2)):
        values = given["image"][:, band]
        low, high = values.flatten().quantile(torch.tensor([0.02, 0.98]))
        torch.testing.assert_close(shown[:, 0, colour], ((values - low) / (high - low)).clamp(0, 1))


def test_what_is_not_valid_is_grey_and_stretches_nothing() -> None:
    given = batch(2)
    expected = coloured_dates(given, None)
    assert expected is not None
    given["image"][1, :, 1, 2, 3], given["valid"][1, :, 1, 2, 3] = 1e6, 0
    shown = coloured_dates(given, None)
    assert shown is not None
    assert (shown[1, 1, :, 2, 3] == 0.5).all()
    others = torch.ones(3, 2, 3, 6, 7, dtype=torch.bool)
    others[1, 1, :, 2, 3] = False
    torch.testing.assert_close(shown[others], expected[others], atol=0.1, rtol=0)
    given["valid"].zero_()
    assert (coloured_dates(given, None) == torch.tensor(0.5)).all()


def test_other_batches_are_left_alone() -> None:
    for other in (None, {}, {"image": torch.rand(2, 3, 4, 4)}, {"image": torch.rand(2, 3), "valid": torch.ones(2, 3)}):
        assert coloured_dates(other, None) is None
    grey = torch.rand(2, 1, 4, 4)
    assert chosen_bands(grey, None) is grey
    assert chosen_bands(torch.rand(2, 2, 4, 4), None).shape == (2, 3, 4, 4)
    assert band_bounds(torch.rand(2, 5, 4, 4))[0].shape == (5, 1, 1)


def test_a_first_batch_of_series_has_a_column_for_each_date(tmp_path: Path) -> None:
    class Trainer:
        global_step, is_global_zero, datamodule = 0, True, None

    FirstBatch(str(tmp_path), rows=2).on_train_batch_start(Trainer(), None, batch(4), 0)  # type: ignore[arg-type]
    picture = decode_image((tmp_path / "first-batch.png").read_bytes())
    height, width = 6 * 10, 7 * 10  # enlarged
    assert picture.shape == (3, 2 * (height + 2) + 2, 4 * (width + 2) + 2)
