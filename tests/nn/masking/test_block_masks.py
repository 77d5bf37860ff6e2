"""Block masks: exact counts, blocks, and functions of (seed, step, index, view) alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightspan.core.errors import UserError
from lightspan.nn.masking.block_masks import BlockMasks, MaskedPatches, fill_blocks


@settings(deadline=None, max_examples=100)
@given(height=st.integers(1, 14), width=st.integers(1, 14), share=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_a_mask_has_exactly_as_many_patches_as_asked_for(height: int, width: int, share: float, seed: int) -> None:
    mask, count = np.zeros((height, width), dtype=bool), int(share * height * width)
    fill_blocks(mask, count, 0.3, np.random.default_rng(seed))
    assert mask.sum() == count


def test_masked_patches_lie_side_by_side() -> None:
    mask_BHW = BlockMasks(probability=1.0, ratio=(0.3, 0.3)).draw((14, 14), 0, range(200))
    mask_BHW = torch.from_numpy(mask_BHW)
    assert mask_BHW.flatten(1).sum(dim=1).eq(int(0.3 * 196)).all()
    alike = (mask_BHW[:, 1:] == mask_BHW[:, :-1]).double().mean()
    assert alike > 0.8  # of patches drawn one by one 0.58 would be


def test_a_mask_is_a_function_of_seed_step_image_and_view_whatever_the_batch() -> None:
    masks, index = BlockMasks(seed=3), [5, 9, 2, 7]
    whole = masks.draw((7, 7), 11, index)
    parts = [masks.draw((7, 7), 11, part) for part in (index[:1], index[1:])]
    assert np.array_equal(np.concatenate(parts), whole)
    others = [
        BlockMasks(seed=4).draw((7, 7), 11, index), masks.draw((7, 7), 12, index), masks.draw((7, 7), 11, index, view=1)
    ]  # fmt: skip
    assert not any(np.array_equal(other, whole) for other in others)


def test_blocks_are_as_often_high_as_wide() -> None:
    sampler, ratios = BlockMasks(1.0, (0.2, 0.2), least_block=51), []  # one block of 51 patches
    for mask in sampler.draw((16, 16), 0, range(500)):
        high, wide = ((mask.sum(axis=axis) >= 3).sum() for axis in (1, 0))  # without the few patches that fill up
        ratios.append(np.log(high / wide))
    assert np.std(ratios) > 0.5
    assert abs(np.mean(ratios)) < 0.12  # uniform in the logarithm; uniform in the ratio, it would be 0.46


def test_the_share_of_images_and_patches_is_as_asked_for() -> None:
    shares = BlockMasks(0.5, (0.1, 0.5)).draw((10, 10), 0, range(2000)).mean(axis=(1, 2))
    masked = shares > 0
    assert masked.mean() == pytest.approx(0.5, abs=0.04)
    assert shares[masked].min() >= 0.1 - 1e-9
    assert shares.max() <= 0.5
    assert shares[masked].mean() == pytest.approx(0.295, abs=0.02)  # counts are rounded down
    assert not BlockMasks(probability=0.0).draw((4, 4), 0, range(50)).any()
    assert BlockMasks(1.0, (1.0, 1.0)).draw((4, 4), 0, range(3)).all()
    assert BlockMasks().draw((4, 4), 0, []).shape == (0, 4, 4)


def test_masked_patches_are_found_among_tokens_and_weigh_as_their_image() -> None:
    masks = np.zeros((3, 2, 2), dtype=bool)
    masks[0, 0, 1] = masks[2, 1] = True
    masked, tokens = MaskedPatches.of(masks), torch.arange(12.0).view(3, 4, 1)
    assert masked.tokens(tokens).flatten().tolist() == [1, 10, 11]
    assert torch.equal(masked.tokens(tokens), tokens[masked.hidden_BHW.flatten(1)])
    assert masked.weight_N.tolist() == pytest.approx([1, 0.5, 0.5])
    none = MaskedPatches.of(np.zeros((2, 2, 2), dtype=bool))
    assert none.tokens(tokens[:2]).shape == (0, 1)
    assert MaskedPatches.of(np.zeros((0, 2, 2), dtype=bool)).weight_N.shape == (0,)


@pytest.mark.parametrize("settings", [{"probability": 1.1}, {"ratio": (0.5, 0.1)}, {"aspect": 0.0}, {"seed": -1}])
def test_settings_out_of_range_are_refused(settings: dict) -> None:
    with pytest.raises(UserError, match=r"must lie in \[0, 1\], ratio=.* least <= most <= 1, aspect="):
        BlockMasks(**settings)
