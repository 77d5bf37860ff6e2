"""Mask samplers: exact counts, and functions of (seed, step, image, view) alone."""

from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from lightspan.core.errors import UserError
from lightspan.nn.image_numbers import image_numbers
from lightspan.nn.masking.block_masks import BlockMasks, RectangleMasks
from lightspan.nn.masking.mask_samplers import (
    CoarseMasks,
    DirichletMasks,
    RandomMasks,
    SpanMasks,
    TubeMasks,
    visible_count,
)
from lightspan.nn.masking.multi_block import Blocks, MultiBlock
from lightspan.nn.sequences.patches import places

EXACT = {
    "random": (RandomMasks(0.75), (7, 7)), "tube": (TubeMasks(0.9), (3, 4, 5)), "span": (SpanMasks(0.3), (40,)),
    "dirichlet": (DirichletMasks(0.75), (3, 4, 5)),
    "block": (BlockMasks(1.0, (0.5, 0.5), least_block=16), (14, 14)),
}  # fmt: skip


@pytest.mark.parametrize("kind", EXACT)
def test_every_mask_has_the_count_asked_for(kind: str) -> None:
    sampler, grid = EXACT[kind]
    masks: Any = sampler.draw(grid, 3, range(1000))
    assert masks.shape == (1000, *grid)
    frames, patches = (3, 20) if kind == "tube" else (1, int(np.prod(grid)))
    hidden = {"random": 49 - 12, "tube": 3 * (20 - 2), "span": 40 - 28, "dirichlet": 45, "block": 98}[kind]
    assert set(masks.reshape(1000, -1).sum(axis=1)) == {hidden}
    assert frames * patches == np.prod(grid)
    assert places(masks).shape == (1000, hidden)
    assert np.all(masks.reshape(1000, -1).any(axis=0))  # each patch is hidden in some


@pytest.mark.parametrize("kind", EXACT)
def test_a_mask_is_a_function_of_seed_step_image_and_view_whatever_the_batch(kind: str) -> None:
    sampler, grid = EXACT[kind]
    whole: Any = sampler.draw(grid, 11, [5, 9, 2, 7])
    parts = [sampler.draw(grid, 11, part) for part in ([5], [9, 2, 7])]
    assert np.array_equal(np.concatenate(parts), whole)
    others = [sampler.draw(grid, 12, [5, 9, 2, 7]), sampler.draw(grid, 11, [5, 9, 2, 7], view=1)]
    assert not any(np.array_equal(other, whole) for other in others)
    assert sampler.draw(grid, 0, []).shape == (0, *grid)


@settings(deadline=None, max_examples=25)
@given(patches=st.integers(1, 300), ratio=st.floats(0, 0.999))
def test_at_least_one_patch_stays_visible(patches: int, ratio: float) -> None:
    assert 1 <= visible_count(ratio, patches) <= patches
    for sampler in (RandomMasks(ratio), SpanMasks(ratio)):
        assert (~sampler.draw((patches,), 0, [1])).sum() == visible_count(ratio, patches)
    for grid in ((1, patches), (patches, 1), (3, patches)):
        masks = DirichletMasks(ratio).draw(grid, 0, [1])
        assert (~masks).sum() == visible_count(ratio, masks.size)


def test_counts_of_papers() -> None:
    assert visible_count(0.75, 196) == 49  # MAE
    assert visible_count(0.985, 196) == 2  # CropMAE
    assert visible_count(0.9, 100) == 10  # not 9, as binary fractions would have it
    assert visible_count(0.985, 9) == 1


def test_tubes_hide_the_same_patches_in_every_frame_and_need_frames() -> None:
    masks = TubeMasks(0.5).draw((4, 3, 3), 0, range(20))
    assert np.array_equal(masks, np.broadcast_to(masks[:, :1], masks.shape))
    with pytest.raises(UserError, match="TubeMasks need a grid of time"):
        TubeMasks(0.5).draw((8,), 0, [0])


def test_modalities_share_what_is_visible_by_a_dirichlet_draw() -> None:
    """Shares of one of three modalities follow Beta(a, 2 a), with variance 2 / (9 (3 a + 1)), to within rounding."""
    for concentration in (0.5, 1.0, 4.0):
        masks = DirichletMasks(0.75, concentration).draw((3, 8, 8), 0, range(4000))
        kept_BM = (~masks).sum(axis=(2, 3))
        assert set(kept_BM.sum(axis=1)) == {48}
        shares_BM = kept_BM / 48
        np.testing.assert_allclose(shares_BM.mean(axis=0), 1 / 3, atol=0.02)
        np.testing.assert_allclose(shares_BM.var(axis=0), 2 / 9 / (3 * concentration + 1), rtol=0.1)
    with pytest.raises(UserError, match=r"concentration=0\.0 must be above 0"):
        DirichletMasks(concentration=0.0)
    with pytest.raises(UserError, match="DirichletMasks need a grid of modalities"):
        DirichletMasks().draw((8,), 0, [0])


def test_no_modality_is_asked_for_more_than_it_has() -> None:
    """Two of nine tenths: at most 10 of 18 seen are of one modality, uniformly from 8 to 10 up to rounding."""
    kept_BM = (~DirichletMasks(0.1).draw((2, 10), 0, range(2000))).sum(axis=2)
    assert set(kept_BM.sum(axis=1)) == {18}
    assert kept_BM.min() == 8
    assert np.mean(kept_BM[:, 0] == 9) == pytest.approx(0.5, abs=0.05)
    few = (~DirichletMasks(0.02).draw((50, 2), 0, range(50))).sum(axis=2)  # no draw of shares can be had
    assert set(few.sum(axis=1)) == {98}


def test_spans_are_runs_of_about_the_length_asked_for() -> None:
    def mean_run(masks: np.ndarray) -> float:
        runs = [len([*run]) for row in masks for hidden, run in groupby(row) if hidden]
        return float(np.mean(runs))

    masks = SpanMasks(0.15, mean=5.0, longest=10).draw((200,), 0, range(200))
    alone = RandomMasks(0.15).draw((200,), 0, range(200))
    assert mean_run(masks) > 3.5 > 1.5 > mean_run(alone)


def test_no_span_is_longer_than_the_longest() -> None:
    hidden = SpanMasks(0.05, mean=50.0, longest=2).draw((1000,), 0, [0])[0]
    starts = hidden & ~np.roll(hidden, 1)
    assert hidden.sum() == 50
    assert starts.sum() >= 18  # 25 spans at least, of which few meet; without a longest, one to three


@pytest.mark.parametrize("make", [lambda: RandomMasks(1.0), lambda: TubeMasks(-0.1), lambda: SpanMasks(0.5, seed=-1)])
def test_settings_out_of_range_are_refused(make: Any) -> None:
    with pytest.raises(UserError, match=r"ratio=.* must lie in \[0, 1\)"):
        make()


def test_spans_need_a_length() -> None:
    with pytest.raises(UserError, match=r"mean=0\.5 and longest=10 must be at least 1"):
        SpanMasks(0.5, mean=0.5)


def test_a_plan_knows_how_many_images_there_are_but_not_which() -> None:
    assert image_numbers(torch.tensor([4, 2])) == [4, 2]
    with FakeTensorMode():
        assert len(image_numbers(torch.zeros(100, dtype=torch.int64))) == 100


def drawn(sampler: MultiBlock, *place: Any) -> Blocks:
    """As arrays."""
    return Blocks(*(np.asarray(places) for places in sampler.draw(*place)))


@settings(deadline=None, max_examples=100)
@given(
    height=st.integers(1, 14), width=st.integers(1, 14), keep=st.floats(0.01, 1.0), targets=st.integers(1, 5),
    scale=st.floats(0.01, 1.0), step=st.integers(0, 9),
)  # fmt: skip
def test_contexts_have_one_count_and_targets_one_size_on_any_grid(
    height: int, width: int, keep: float, targets: int, scale: float, step: int
) -> None:
    sampler = MultiBlock(targets, (scale, scale), context_keep=keep)
    blocks = drawn(sampler, (height, width), step, [3, 8])
    assert blocks.context_BK.shape == (2, max(1, int(round(keep * height * width, 6))))
    assert blocks.targets_BNM.shape[:2] == (2, targets)
    for one in (*blocks.context_BK, *blocks.targets_BNM.reshape(2 * targets, -1)):
        assert len(set(one)) == len(one)
        assert 0 <= one.min() <= one.max() < height * width


def test_targets_are_higher_than_wide_on_average_as_the_papers_aspect_asks_for() -> None:
    sampler, ratios = MultiBlock(targets=1), []
    for step in range(400):
        rows_M, columns_M = np.divmod(sampler.draw((40, 40), step, [0]).targets_BNM[0, 0].numpy(), 40)
        ratios.append((np.ptp(rows_M) + 1) / (np.ptp(columns_M) + 1))
    assert np.mean(ratios) == pytest.approx((0.75 + 1.5) / 2, abs=0.03)
    assert 0.7 < min(ratios) < 0.8 < 1.4 < max(ratios) < 1.6


def test_targets_are_rectangles_of_the_step_outside_the_context() -> None:
    sampler = MultiBlock(seed=2)
    sizes = set()
    for step in range(20):
        blocks = drawn(sampler, (14, 14), step, range(30))
        of_step = set()
        for context, targets in zip(*blocks, strict=True):
            assert not set(context) & set(targets.ravel())
            for target in targets:
                rows, columns = np.unique(target // 14), np.unique(target % 14)
                assert len(rows) * len(columns) == len(target)
                assert np.ptp(rows) + 1 == len(rows)
                assert np.ptp(columns) + 1 == len(columns)
                of_step.add((len(rows), len(columns)))
        assert len(of_step) == 1
        sizes |= of_step
        assert 0.85 * 0.15 * 196 <= blocks.targets_BNM.shape[2] <= 1.15 * 0.2 * 196  # sides are rounded
    assert len(sizes) > 3


def contexts_by_the_authors_rule(generator: np.random.Generator, images: int, side: int) -> int:
    """How many patches the contexts of one batch have in I-JEPA's code: as many as the smallest of them."""
    drawn = generator.uniform()  # one number for the area and the aspect of targets
    area, aspect = int(side**2 * (0.15 + 0.05 * drawn)), 0.75 + 0.75 * drawn
    square = int(side**2 * generator.uniform(0.85, 1.0)) ** 0.5

    def blocks(height: float, width: float, count: int) -> np.ndarray:
        """[images side side]: in any of so many blocks, whose sides and places end one patch before the grid does."""
        covered = np.ones((images, count, 1, 1), dtype=bool)
        for axis, length in ((2, height), (3, width)):
            patches = min(round(length), side - 1)
            start = generator.integers(side - patches, size=(images, count, 1, 1))
            place = np.arange(side).reshape([side if each == axis else 1 for each in range(4)])
            covered = covered & (start <= place) & (place < start + patches)
        return covered.any(axis=1)

    return (blocks(square, square, 1) & ~blocks((area * aspect) ** 0.5, (area / aspect) ** 0.5, 4)).sum((1, 2)).min()


def test_contexts_are_as_large_as_by_the_authors_rule() -> None:
    generator = np.random.default_rng(0)
    median = np.median([contexts_by_the_authors_rule(generator, 128, 14) for _ in range(300)])
    assert drawn(MultiBlock(), (14, 14), 0, [0]).context_BK.shape == (1, median)


def test_blocks_are_a_function_of_seed_step_image_and_view_whatever_the_batch() -> None:
    sampler = MultiBlock()
    whole, part = drawn(sampler, (14, 14), 5, [5, 9, 2]), drawn(sampler, (14, 14), 5, [9, 2])
    assert all(np.array_equal(a[1:], b) for a, b in zip(whole, part, strict=True))
    for other in (sampler.draw((14, 14), 5, [5, 9, 2], view=1), MultiBlock(seed=1).draw((14, 14), 5, [5, 9, 2])):
        assert not np.array_equal(other.context_BK, whole.context_BK)
    assert [len(part) for part in sampler.draw((14, 14), 5, [])] == [0, 0]


def test_settings_of_blocks_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match=r"MultiBlock: targets=0 must be at least 1"):
        MultiBlock(targets=0)


@settings(deadline=None, max_examples=12)
@given(align=st.sampled_from([1, 2, 4]), share=st.floats(0, 0.9), step=st.integers(0, 99))
def test_rectangles_are_unions_of_cells_of_align_and_hide_little_more_than_their_share(
    align: int, share: float, step: int
) -> None:
    masks = RectangleMasks(share, align=align).draw((32, 64), step, range(2))
    cells = masks.reshape(2, 32 // align, align, 64 // align, align)
    assert (cells.all(axis=(2, 4)) == cells.any(axis=(2, 4))).all()
    hidden = masks.mean(axis=(1, 2))
    assert (hidden >= share - 1e-6).all()
    assert (hidden <= share + 0.09).all()


def test_rectangles_need_a_grid_that_align_fits_and_a_share_that_they_reach() -> None:
    assert not RectangleMasks(0.0).draw((8, 8), 0, [0]).any()
    for grid in ((9,), (9, 8)):
        with pytest.raises(UserError, match="sides are multiples of align=4"):
            RectangleMasks(align=4).draw(grid, 0, [0])
    for settings_ in ({"share": 0.95}, {"longest": 0.0}, {"align": 0}, {"seed": -1}):
        with pytest.raises(UserError, match=r"RectangleMasks: share=.* must lie in \[0, 0.9\]"):
            RectangleMasks(**settings_)
    assert RectangleMasks(0.5, longest=0.01, align=4).draw((8, 8), 0, [0]).mean() == 0.5  # a side is align at least


def test_coarse_masks_hide_whole_blocks_and_cut_the_last_ones() -> None:
    sampler = CoarseMasks((2, 3), RandomMasks(0.5, seed=4))
    masks = sampler.draw((4, 6), 1, [3, 8])
    assert np.array_equal(masks, np.kron(RandomMasks(0.5, seed=4).draw((2, 2), 1, [3, 8]), np.ones((1, 2, 3), bool)))
    assert np.array_equal(sampler.draw((3, 4), 1, [3, 8]), masks[:, :3, :4])
    assert sampler.seed == 4
    assert CoarseMasks((1, 1), RandomMasks(0.3)).draw((5, 4), 0, [1]).sum() == 6
    assert sampler.draw((4, 6), 1, []).shape == (0, 4, 6)
    with pytest.raises(UserError, match=r"block=\[2, 3\]"):
        sampler.draw((4, 6, 2), 0, [0])
    with pytest.raises(UserError, match="block="):
        CoarseMasks((2, 0))
