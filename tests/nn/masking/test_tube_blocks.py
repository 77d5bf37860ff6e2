"""V-JEPA's masks: exact counts, tubes, blocks, and functions of seed, step and clip."""

import numpy as np
import pytest

from lightspan.core.errors import UserError
from lightspan.nn.masking.tube_blocks import TubeBlocks


def test_each_frame_hides_the_same_patches_and_as_many_as_asked() -> None:
    for grid, hidden, count in (((4, 14, 14), 0.72, 141), ((2, 8, 8), 0.5, 32), ((3, 5, 4, 4), 0.9, 72)):
        masks = TubeBlocks(hidden=hidden).draw(grid, 3, range(6))
        assert masks.shape == (6, *grid)
        assert (masks == masks[:, :1]).all()
        assert masks[:, 0].reshape(6, -1).sum(axis=1).tolist() == [count] * 6


def test_one_block_of_its_own_size_is_a_rectangle_with_the_sides_of_the_step() -> None:
    sampler, sides = TubeBlocks(1, 0.25, (1.0, 1.0), 0.25), set()
    for index in range(20):
        (mask,) = sampler.draw((1, 8, 8), 0, [index])[:, 0]
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        sides.add((len(rows), len(columns)))
    assert sides == {(4, 4)}


def test_the_papers_shares_are_those_of_the_largest_union_of_24_clips() -> None:
    for blocks, scale, hidden in ((8, 0.15, 0.78), (2, 0.7, 0.96)):
        largest = []
        for step in range(40):
            generator = np.random.default_rng(step)
            aspect, shares = generator.uniform(0.75, 1.5), []
            high, wide = (min(14, round((scale * 196 * ratio) ** 0.5)) for ratio in (aspect, 1 / aspect))
            for _ in range(24):
                union = np.zeros((14, 14), dtype=bool)
                for _ in range(blocks):
                    top, left = generator.integers(14 - high + 1), generator.integers(14 - wide + 1)
                    union[top : top + high, left : left + wide] = True
                shares.append(union.mean())
            largest.append(max(shares))
        assert np.median(largest) == pytest.approx(hidden, abs=0.03)


def test_masks_are_functions_of_seed_step_and_clip() -> None:
    sampler = TubeBlocks()
    first = sampler.draw((2, 8, 8), 4, [7, 9])
    assert (first[::-1] == sampler.draw((2, 8, 8), 4, [9, 7])).all()
    for other in (sampler.draw((2, 8, 8), 5, [7, 9]), TubeBlocks(seed=1).draw((2, 8, 8), 4, [7, 9]), first[::-1]):
        assert (other != first).any()
    assert sampler.draw((2, 8, 8), 0, []).shape == (0, 2, 8, 8)


def test_something_is_hidden_and_something_seen_in_the_smallest_frames() -> None:
    for hidden in (0.01, 0.99):
        masks = TubeBlocks(2, 1.0, hidden=hidden).draw((2, 1, 2), 0, range(5))
        assert masks.reshape(5, -1).sum(axis=1).tolist() == [2] * 5


def test_what_cannot_be_drawn_is_refused() -> None:
    for wrong in (
        {"blocks": 0}, {"scale": 0.0}, {"scale": 1.1}, {"aspect": (0.0, 1.0)}, {"aspect": (2.0, 1.0)}, {"hidden": 1.0},
        {"hidden": 0.0}, {"seed": -1},
    ):  # fmt: skip
        with pytest.raises(UserError, match=next(iter(wrong))):
            TubeBlocks(**wrong)  # type: ignore[arg-type]
    for grid in ((8,), (8, 1, 1)):
        with pytest.raises(UserError, match="grid"):
            TubeBlocks().draw(grid, 0, [0])
