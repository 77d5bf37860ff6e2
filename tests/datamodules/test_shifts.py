"""Shifted images: where pixels go, what moves in, and when they are mirrored."""

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import seeded
from lightspan.datamodules.image.variants.shifts import Shifted


def views(transform: Shifted, image: torch.Tensor, number: int = 300) -> list[torch.Tensor]:
    found = []
    for seed in range(number):
        with seeded(seed):
            (view,) = transform(image)
        found.append(view)
    return found


def test_a_view_is_one_of_all_shifts_with_black_moving_in() -> None:
    image = torch.arange(1, 13).view(1, 3, 4) / 12
    padded = torch.nn.functional.pad(image, [1, 1, 1, 1])
    shifts = [padded[:, top : top + 3, left : left + 4] for top in range(3) for left in range(3)]
    seen = {next(i for i, one in enumerate(shifts) if torch.equal(one, view)) for view in views(Shifted(1, 0), image)}
    assert seen == set(range(9))


def test_views_are_mirrored_as_often_as_they_are_told() -> None:
    image = torch.rand(3, 2, 5)
    for flip in (0.0, 0.5, 1.0):
        mirrored = sum(torch.equal(view, image.flip(2)) for view in views(Shifted(0, flip), image))
        assert abs(mirrored - 300 * flip) <= 4 * (300 * flip * (1 - flip)) ** 0.5


def test_bytes_become_shares_of_white() -> None:
    (view,) = Shifted(0, 0.0)(torch.full((3, 2, 2), 255, dtype=torch.uint8))
    assert torch.equal(view, torch.ones(3, 2, 2))


@pytest.mark.parametrize(("pixels", "flip"), [(-1, 0.5), (2, 1.5)])
def test_what_cannot_be_drawn_is_refused(pixels: int, flip: float) -> None:
    with pytest.raises(UserError, match=rf"pixels={pixels} must be at least 0, and flip={flip}"):
        Shifted(pixels, flip)
