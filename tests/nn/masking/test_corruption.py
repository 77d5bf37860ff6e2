"""Group corruption: what stays, what is put in, and that ranks and resumes draw the same."""

import numpy as np
import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.core.noise import hashed_noise, mixed_seed
from lightspan.nn.masking.block_masks import BlockMasks
from lightspan.nn.masking.corruption import GroupCorruption

IMAGES = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0))
GRID, INDEX = (4, 4), torch.arange(6) + 20


def hidden(masks: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(masks).repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)[:, None].expand_as(IMAGES)


def test_only_masked_patches_change_and_the_masks_are_the_samplers() -> None:
    corruption = GroupCorruption()
    images, masks = corruption(IMAGES, GRID, INDEX, step=3, view=1)
    assert np.array_equal(masks, corruption.masks.draw(GRID, 3, INDEX.tolist(), 1))
    assert torch.equal(images[~hidden(masks)], IMAGES[~hidden(masks)])
    assert (images != IMAGES)[hidden(masks)].all()
    assert 0.3 * 16 - 1 <= masks.sum(axis=(1, 2)).min() <= masks.sum(axis=(1, 2)).max() <= 0.7 * 16


def test_aliens_show_the_image_before_and_all_others_noise() -> None:
    images, masks = GroupCorruption(alien=1.0)(IMAGES, GRID, INDEX, step=0)
    assert torch.equal(images[hidden(masks)], IMAGES.roll(1, dims=0)[hidden(masks)])
    many, index = torch.zeros(64, 1, 8, 8), torch.arange(64)
    noise, masks = GroupCorruption(BlockMasks(1.0, (1.0, 1.0)), alien=0.0)(many, GRID, index, step=0)
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05
    mixed, _ = GroupCorruption(BlockMasks(1.0, (1.0, 1.0)), alien=0.5)(many, GRID, index, step=0)
    assert 16 < int((mixed.flatten(1) == 0).all(dim=1).sum()) < 48


def test_an_images_noise_depends_on_its_number_and_step_alone() -> None:
    corruption = GroupCorruption(alien=0.0)
    whole, _ = corruption(IMAGES, GRID, INDEX, step=5)
    half, _ = corruption(IMAGES[3:], GRID, INDEX[3:], step=5)
    assert torch.equal(whole[3:], half)
    assert not torch.equal(whole, corruption(IMAGES, GRID, INDEX, step=6)[0])
    assert not torch.equal(whole, corruption(IMAGES, GRID, INDEX, step=5, view=1)[0])


def test_the_noise_is_hashed_on_the_images_device_from_seed_step_number_and_view() -> None:
    corruption = GroupCorruption(BlockMasks(1.0, (1.0, 1.0), seed=9), alien=0.0)
    noise, _ = corruption(IMAGES, GRID, INDEX, step=3, view=1)
    assert torch.equal(noise, hashed_noise(mixed_seed(INDEX, 3, 9), 1, (2, 8, 8)))
    other = GroupCorruption(BlockMasks(1.0, (1.0, 1.0), seed=8), alien=0.0)
    assert not torch.equal(noise, other(IMAGES, GRID, INDEX, step=3, view=1)[0])


def test_an_image_alone_and_no_image_are_ordinary_batches_also_in_half_precision() -> None:
    alone, _ = GroupCorruption(alien=1.0)(IMAGES[:1].bfloat16(), GRID, INDEX[:1], step=0)
    assert torch.equal(alone, IMAGES[:1].bfloat16())
    assert GroupCorruption()(IMAGES[:0], GRID, INDEX[:0], step=0)[0].shape == (0, 2, 8, 8)
    with pytest.raises(UserError, match=r"alien=1.5 is a share of images and must lie in \[0, 1\]"):
        GroupCorruption(alien=1.5)


def test_zeros_are_zeros_and_a_shifted_image_shows_its_own_pixels_from_one_other_place() -> None:
    everything = BlockMasks(1.0, (1.0, 1.0))
    assert not GroupCorruption(everything, 0.0, "zeros")(IMAGES, GRID, INDEX, step=0)[0].any()
    shifted, _ = GroupCorruption(everything, 0.0, "shifted")(IMAGES, GRID, INDEX, step=0)
    shifts = [
        [(y, x) for y in range(8) for x in range(8) if torch.equal(image.roll((-y, -x), (1, 2)), other)]
        for image, other in zip(IMAGES, shifted, strict=True)
    ]
    assert all(len(found) == 1 for found in shifts)
    assert len({found[0] for found in shifts}) > 1
    half, _ = GroupCorruption(everything, 0.0, "shifted")(IMAGES[3:], GRID, INDEX[3:], step=0)
    assert torch.equal(shifted[3:], half)
    assert GroupCorruption(everything, 0.0, "shifted")(IMAGES[:0], GRID, INDEX[:0], step=0)[0].shape == (0, 2, 8, 8)


def test_aliens_have_masks_of_their_own_where_they_are_given() -> None:
    masks, of_aliens = BlockMasks(1.0, (0.5, 0.5)), BlockMasks(1.0, (0.25, 0.25))
    _, drawn = GroupCorruption(masks, 0.5, "zeros", of_aliens)(torch.zeros(64, 1, 8, 8), GRID, torch.arange(64), 0)
    counts = drawn.sum(axis=(1, 2)).tolist()
    assert set(counts) == {4, 8}
    assert 16 < counts.count(4) < 48


def test_another_fill_is_refused() -> None:
    with pytest.raises(UserError, match="fill='mean' must be noise, zeros or shifted"):
        GroupCorruption(fill="mean")  # type: ignore[arg-type]
