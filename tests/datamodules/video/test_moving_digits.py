"""A digit moves straight on, in the direction that its label names, and no single frame shows which."""

import numpy as np
import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import RandomViews
from lightspan.datamodules.video.sets.moving_digits import DIRECTIONS, MovingDigits


def ready(**settings: object) -> MovingDigits:
    data = MovingDigits(**settings)  # type: ignore[arg-type]
    data.setup()
    return data


def test_each_frame_is_the_first_one_moved_on() -> None:
    data = ready(speed=(2.0, 2.0), frames=9)
    assert data.train is not None
    for index in range(DIRECTIONS):
        sample = data.train.sample(index, seed=5)
        assert sample["label"] == index
        clip = sample["clip"][0]
        row, column = (round(16 * part) for part in (np.sin(index * np.pi / 4), np.cos(index * np.pi / 4)))
        moved = [torch.roll(clip[0], (row + a, column + b), (0, 1)) for a in (-1, 0, 1) for b in (-1, 0, 1)]
        assert any(torch.equal(clip[8], one) for one in moved), index  # after 8 steps of 2 pixels


def test_clips_are_drawn_anew_in_training_alone_and_standardised() -> None:
    data = ready(label="digit", frames=2)
    assert data.train is not None
    assert data.num_classes == 10
    one, other = (data.train.sample(3, seed) for seed in (1, 2))
    assert not torch.equal(one["clip"], other["clip"])
    assert one["label"] == other["label"] == data.bank.sample(3, 9)["label"]
    assert torch.equal(data.bank.sample(3, 1)["clip"], data.bank.sample(3, 2)["clip"])
    pixels = torch.stack([data.bank.sample(index, 0)["clip"] for index in range(len(data.train))])
    assert float(pixels.mean()) == pytest.approx(0, abs=1e-3)
    assert float(pixels.std()) == pytest.approx(1, abs=1e-3)
    assert float(pixels.min()) == pytest.approx(float(data.bounds[0]), abs=1e-5)
    for wrong in ({"frames": 0}, {"size": 15}, {"speed": (2.0, 1.0)}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            MovingDigits(**wrong)  # type: ignore[arg-type]


def test_clips_of_a_digit_show_one_movement_at_several_speeds() -> None:
    settings: dict[str, object] = {"frames": 4, "speed": (2.0, 2.0)}
    data, plain = ready(clips=2, speeds=(1, 3), **settings), ready(**settings)
    assert data.train is not None
    assert plain.train is not None
    for index in range(DIRECTIONS):
        sample = data.train.sample(index, seed=5)
        assert torch.equal(sample["frames"].diff(dim=1), torch.tensor([[1] * 3, [3] * 3] * 2))
        assert sample["fps"].tolist() == pytest.approx([25, 25 / 3] * 2)
        shown = dict[int, torch.Tensor]()
        for clip, numbers in zip(sample["views"], sample["frames"].tolist(), strict=True):
            for frame, number in zip(clip[0], numbers, strict=True):
                assert torch.equal(shown.setdefault(number, frame), frame)  # whichever clip shows it
        assert len(shown) > 8
        assert torch.equal(sample["views"][0], plain.train.sample(index, 5)["clip"])
    assert "clip" in data.bank.sample(0, 0)


def test_views_change_all_clips_of_a_start_alike() -> None:
    data = ready(clips=2, speeds=(1, 2), frames=3, speed=(0.0, 0.0), views=RandomViews(count=1, size=24))
    assert data.train is not None
    slow, fast, other, _ = data.train.sample(0, 3)["views"]
    assert slow.shape == (1, 3, 24, 24)
    assert torch.equal(slow, fast)
    assert not torch.equal(slow, other)
