"""Grids of one, two and three axes: what holds on each, and that two axes are not special."""

import math
from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.nn.masking.block_masks import BlockMasks, MaskedPatches, RectangleMasks, block_at_random, block_sides
from lightspan.nn.masking.corruption import GroupCorruption
from lightspan.nn.masking.mask_samplers import RandomMasks, SpanMasks, TubeMasks, seen_and_hidden, visible_count
from lightspan.nn.masking.multi_block import MultiBlock
from lightspan.nn.masking.patch_mix import PatchMix
from lightspan.nn.masking.sparse_convs import ActiveCells
from lightspan.nn.sequences.patches import at_places, cells_to_pixels, patchify, unpatchify
from lightspan.nn.sequences.positions import LearnedPositions, SummedPositions, resampled, sincos, sincos_by_axis
from lightspan.nn.tokens import Tokens, arranged

GRIDS = ((9,), (4, 6), (2, 3, 4))
PATCH = 3, 2, 4


def sides(grid: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(count * side for count, side in zip(grid, PATCH, strict=False))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_patchify_and_unpatchify_are_adjoint_and_inverse() -> None:
    for grid in GRIDS:
        patch = PATCH[: len(grid)]
        x, y = normal(2, 3, *sides(grid)), normal(2, math.prod(grid), 3 * math.prod(patch))
        torch.testing.assert_close((patchify(x, patch) * y).sum(), (x * unpatchify(y, patch, grid)).sum())
        assert torch.equal(unpatchify(patchify(x, patch), patch, grid), x)


def test_cells_cover_their_pixels() -> None:
    for grid in GRIDS:
        cells, patch = normal(2, *grid), PATCH[: len(grid)]
        assert np.array_equal(cells_to_pixels(cells, patch).numpy(), np.kron(cells.numpy(), np.ones((1, *patch))))


def test_masks_have_exact_counts_and_depend_on_seed_step_index_and_view_alone() -> None:
    for grid in GRIDS:
        count = math.prod(grid)
        hidden = count - visible_count(0.5, count)
        for sampler in (RandomMasks(0.5), SpanMasks(0.5), BlockMasks(1.0, (hidden / count + 1e-9,) * 2)):
            masks = sampler.draw(grid, 2, range(20), view=1)
            assert masks.shape == (20, *grid)
            assert set(masks.reshape(20, -1).sum(axis=1)) == {hidden}
            assert np.array_equal(sampler.draw(grid, 2, [7], view=1)[0], masks[7])


def test_tubes_repeat_the_mask_of_a_frame_over_time() -> None:
    for frame in GRIDS:
        masks = TubeMasks(0.5, seed=3).draw((5, *frame), 1, range(4))
        of_frame = RandomMasks(0.5, seed=3).draw(frame, 1, range(4))
        assert np.array_equal(masks, np.stack([of_frame] * 5, axis=1))


def test_blocks_have_the_size_and_the_ratios_asked_for_and_lie_inside() -> None:
    generator = np.random.default_rng(0)
    assert block_sides(12.0, []) == (12,)
    assert block_sides(18.0, [2.0]) == (6, 3)
    assert block_sides(6.0 * 3 * 4, [6 / 4, 3 / 4]) == (6, 3, 4)
    for grid in GRIDS:
        for _ in range(50):
            block = np.zeros(grid)
            wanted = tuple(generator.integers(1, side + 1) for side in grid)
            block[block_at_random(grid, wanted, generator)] = 1
            assert block.sum() == math.prod(wanted)
            assert all(
                np.ptp(where) + 1 == side for where, side in zip(np.nonzero(block), wanted, strict=True)
            )  # one run on each axis


def test_masked_places_are_neighbours_on_each_axis() -> None:
    for grid in ((60,), (12, 12), (8, 8, 8)):
        share = 0.25
        masks = BlockMasks(1.0, (share, share), least_block=8).draw(grid, 0, range(40))
        for axis in range(1, masks.ndim):
            alike = np.diff(masks.astype(int), axis=axis) == 0
            assert alike.mean() > 0.8  # drawn one by one it would be 0.62


def test_square_blocks_are_drawn_too() -> None:
    for grid in GRIDS:  # the logarithm of an aspect of 1 is 0, whose negative is no upper limit
        assert BlockMasks(1.0, (0.5, 0.5), aspect=1.0).draw(grid, 0, range(3)).any()


def test_rectangles_reach_their_share_in_multiples_of_align() -> None:
    for grid in ((24,), (8, 12), (4, 8, 8)):
        masks = RectangleMasks(0.5, align=2).draw(grid, 0, range(10))
        assert (masks.reshape(10, -1).mean(axis=1) >= 0.5).all()
        coarse = masks[(slice(None), *[slice(None, None, 2)] * len(grid))]
        assert np.array_equal(cells_to_pixels(torch.from_numpy(coarse), [2] * len(grid)).numpy(), masks)
    with pytest.raises(UserError, match="align=4"):
        RectangleMasks(align=4).draw((8, 8, 6), 0, [0])


def test_contexts_and_targets_are_blocks_apart() -> None:
    for grid in ((40,), (10, 12), (6, 6, 8)):
        context_BK, targets_BNM = MultiBlock(targets=2, context_keep=0.3).draw(grid, 0, range(10))
        assert context_BK.shape == (10, int(0.3 * math.prod(grid)))
        for context, targets in zip(context_BK.numpy(), targets_BNM.numpy(), strict=True):
            assert not set(context) & set(targets.ravel())
            for target in targets:
                spread = [np.ptp(where) + 1 for where in np.unravel_index(target, grid)]
                assert math.prod(spread) == len(target) == len(set(target))


def test_masked_patches_weigh_as_their_sample() -> None:
    for grid in GRIDS:
        masks, tokens = RandomMasks(0.5).draw(grid, 0, range(3)), normal(3, math.prod(grid), 2)
        masked = MaskedPatches.of(masks)
        flat = torch.from_numpy(masks).flatten(1)
        assert torch.equal(masked.tokens(tokens), tokens[flat])
        assert float(masked.weight_N.sum()) == pytest.approx(3)


def test_corruption_replaces_masked_cells_alone_and_a_shift_is_a_roll() -> None:
    for grid in GRIDS:
        x, patch = normal(4, 2, *sides(grid)).float(), PATCH[: len(grid)]
        masks = RandomMasks(0.5)
        for fill in ("noise", "zeros", "shifted"):
            found, drawn = GroupCorruption(masks, 0.5, fill, TubeMasks(0.5) if len(grid) > 1 else None)(  # type: ignore[arg-type]
                x, grid, torch.arange(4), 0
            )
            hidden = cells_to_pixels(torch.from_numpy(drawn), patch)[:, None].expand_as(x)
            assert torch.equal(found[~hidden], x[~hidden])
            assert (found != x)[hidden].any()
        whole = RandomMasks(0.999999)  # all but one cell
        found, drawn = GroupCorruption(whole, 0.0, "shifted")(x, grid, torch.arange(4), 0)
        seen = cells_to_pixels(torch.from_numpy(drawn), patch)[:, None]
        for row in range(4):
            axes = tuple(range(1, 1 + len(grid)))
            rolls = (x[row].roll(shift, axes) for shift in np.ndindex(sides(grid)))
            assert any(torch.equal(roll.where(seen[row], 0), found[row].where(seen[row], 0)) for roll in rolls)


def test_mixtures_show_each_source_at_its_places() -> None:
    for grid in GRIDS:
        x, patch = normal(4, 2, *sides(grid)), PATCH[: len(grid)]
        mixed = PatchMix(2)(x, patch, grid, torch.arange(4), 0)
        for rows, see in zip(mixed.rows_MR, mixed.see_MRK, strict=True):
            shown, own = (at_places(patchify(part, patch), see) for part in (mixed.image_RChw, x[rows]))
            assert torch.equal(shown, own)


def test_active_cells_are_gathered_and_put_back() -> None:
    for grid in GRIDS:
        x, (see, _) = normal(2, 3, *sides(grid)), seen_and_hidden(RandomMasks(0.5).draw(grid, 0, range(2)))
        active = ActiveCells(grid, see)
        mask = active.mask(tuple(x.shape[2:]))
        assert int(mask.sum()) == see.numel() * math.prod(PATCH[: len(grid)])
        assert torch.equal(active.scattered(active.gathered(x), tuple(x.shape[2:])), x.where(mask, 0))
        assert torch.equal(active.alone(x), x.where(mask, 0))


def test_fixed_positions_are_separable_and_those_of_pictures_stand_in_those_of_volumes() -> None:
    for grid in GRIDS:
        codes = [sincos((side,), 8) for side in grid]
        table = sincos(grid, 8 * len(grid)).view(*grid, -1)
        for place in np.ndindex(grid):
            assert torch.equal(table[place], torch.cat([code[at] for code, at in zip(codes, place, strict=True)][::-1]))
        assert torch.equal(sincos_by_axis(grid, [8] * len(grid)), table.flatten(0, -2))
    volume, picture = sincos((3, 4, 6), 24).view(3, 4, 6, 24), sincos((4, 6), 16).view(4, 6, 16)
    assert torch.equal(volume[..., :16], picture.expand(3, 4, 6, 16))


def test_learned_positions_are_interpolated_along_each_axis() -> None:
    others = (5,), (7, 3), (4, 3, 2)
    for grid, other in zip(GRIDS, others, strict=True):
        count, generator = math.prod(grid), torch.Generator().manual_seed(1)
        constant = torch.full((count, 3), 0.7)
        torch.testing.assert_close(resampled(constant, grid, other), constant.new_full((math.prod(other), 3), 0.7))
        lines = [torch.randn(side, generator=generator) for side in grid]
        product = reduce(lambda before, line: before[..., None] * line, lines).reshape(-1, 1)
        of_lines = [
            resampled(line[:, None], (side,), (to,))[:, 0] for line, side, to in zip(lines, grid, other, strict=True)
        ]
        expected = reduce(lambda before, line: before[..., None] * line, of_lines).reshape(-1, 1)
        torch.testing.assert_close(resampled(product, grid, other), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(resampled(product, (1, *grid), (1, *other)), resampled(product, grid, other))
        learned = LearnedPositions(grid, 4)
        assert torch.equal(learned(grid), learned.code_Tw)
        learned(other).sum().backward()
        assert learned.code_Tw.grad is not None
        for wrong in ((*grid, 2), [0] * len(grid)):
            with pytest.raises(UserError, match="positions, learned on a grid"):
                learned(wrong)


def test_learned_positions_of_pictures_are_interpolated_as_timm_does_it() -> None:
    for grid, other in (((4, 6), (7, 3)), ((14, 14), (16, 9)), ((3, 5), (3, 8))):
        for dtype in (torch.float32, torch.bfloat16):
            code = normal(math.prod(grid), 5).to(dtype)
            expected = resample_abs_pos_embed(code[None], [*other], [*grid], num_prefix_tokens=0)[0]
            torch.testing.assert_close(resampled(code, grid, other), expected)


def test_summed_positions_are_a_sum_over_axes() -> None:
    for grid in GRIDS:
        positions = SummedPositions(grid, 30)
        table = positions().view(*grid, 30)
        for place in np.ndindex(grid):
            codes = [code[at] for code, at in zip(positions.axes, place, strict=True)]
            torch.testing.assert_close(table[place], torch.stack(codes).sum(dim=0))
        assert int(torch.linalg.matrix_rank(positions())) <= 1 + sum(side - 1 for side in grid)
        for wrong in ((), (0, *grid)):
            with pytest.raises(UserError, match="positions of width 8 on a grid"):
                SummedPositions(wrong, 8)


class Net(nn.Module):
    output_fmt = "NCHW"


def test_maps_of_any_number_of_axes_are_tokens_row_by_row() -> None:
    for grid in GRIDS[1:]:
        first, last, net = normal(2, 5, *grid), Net(), Net()
        last.output_fmt = "NHWC"
        found = [
            arranged(net, first),
            arranged(last, first.movedim(1, -1)),
            arranged(net, first.movedim(1, -1), width=5, last=True),
            arranged(net, first.movedim(1, -1), width=5),
        ]
        for tokens in found:
            assert tokens.grid == grid
            assert torch.equal(tokens.tokens_BTD, first.flatten(2).mT)
            torch.testing.assert_close(tokens.pooled(), first.flatten(2).mean(dim=2))
    for wrong in (torch.zeros(3), [torch.zeros(3, 2)]):
        with pytest.raises(UserError, match=r"must be a tensor \[B D\]"):
            arranged(Net(), wrong)
    with pytest.raises(UserError, match="a grid of 2 x 1 x 3"):
        Tokens(torch.zeros(1, 6, 2), (2, 1, 3)).first()


def test_tokens_of_a_network_made_for_a_grid_lie_on_it() -> None:
    for grid in GRIDS:
        net: Any = Net()
        net.patch_embed = nn.Identity()
        net.patch_embed.grid_size, net.num_prefix_tokens = grid, 1
        count = math.prod(grid)
        assert arranged(net, torch.zeros(2, 1 + count, 3)).grid == grid
        assert arranged(net, torch.zeros(2, count, 3)).grid is None  # some were dropped
