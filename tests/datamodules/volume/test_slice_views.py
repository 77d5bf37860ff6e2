"""Slices of crops as images: which ones, as functions of their seed, and in batches."""

from typing import Any

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import MultiCrop, Plain, RandomViews
from lightspan.datamodules.volume.phantoms import Phantoms
from lightspan.datamodules.volume.slices import SliceViews


def test_slices_are_different_ones_of_the_crop_and_every_view_is_of_the_same() -> None:
    crop = torch.arange(6.0).view(1, 6, 1, 1).expand(2, 6, 4, 5) / 6
    first, second = SliceViews(Plain(2), 4)(crop, seed=3)
    assert first.shape == (4, 2, 4, 5)
    assert torch.equal(first, second)
    numbers = (6 * first[:, 0, 0, 0]).round().tolist()
    assert len({*numbers}) == 4
    assert numbers == sorted(numbers)
    assert {(6 * SliceViews(Plain(1), 1)(crop, seed)[0][0, 0, 0, 0]).round().item() for seed in range(40)} == {
        *range(6)
    }


def test_views_are_a_function_of_the_seed_and_leave_torchs_generator_alone() -> None:
    crop, made = torch.rand(1, 5, 8, 8), SliceViews(MultiCrop([RandomViews(2, 8), RandomViews(1, 4)]), 3)
    before = torch.get_rng_state()
    one, same, other = made(crop, 1), made(crop, 1), made(crop, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert [view.shape for view in one] == [(3, 1, 8, 8), (3, 1, 8, 8), (3, 1, 4, 4)]
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[0], one[1])


def test_batches_hold_slices_of_their_own_volumes() -> None:
    settings: dict[str, Any] = {"patients": 6, "cuts": 8, "side": 16, "size": (8, 16, 16), "batch_size": 4, "crops": 2}
    data = Phantoms(**settings, slices=SliceViews(Plain(2), 8))
    data.setup()
    batch = next(iter(data.train_dataloader()))
    for view in batch["slices"]:
        torch.testing.assert_close(view, batch["views"][0].transpose(1, 2))
    assert "slices" not in next(iter(data.val_dataloader()))


def test_slices_that_there_are_not_are_refused() -> None:
    with pytest.raises(UserError, match="count"):
        SliceViews(Plain(), 0)
    for settings in ({"size": 4, "crops": 2}, {"size": 8, "crops": None}):
        with pytest.raises(UserError, match=r"slices\.count=6"):
            Phantoms(**settings, slices=SliceViews(Plain(), 6))  # type: ignore[arg-type]
