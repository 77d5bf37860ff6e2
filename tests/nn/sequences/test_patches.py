"""Patches: their order, the way back, and tokens picked by place."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.nn.sequences.patches import at_places, kept, patchify, places, unpatchify

SHAPES = [((12,), (3,)), ((6, 8), (3, 2)), ((4, 6, 2), (2, 3, 1)), ((5, 5), (5, 5)), ((2, 3), (1, 1))]


@pytest.mark.parametrize(("sides", "patch"), SHAPES)
def test_patches_come_row_by_row_with_channels_last_and_go_back(sides: tuple[int, ...], patch: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *sides)
    patches = patchify(x, patch)
    grid = tuple(side // p for side, p in zip(sides, patch, strict=True))
    for number, place in enumerate(np.ndindex(grid)):
        cut = x[(..., *(slice(i * p, (i + 1) * p) for i, p in zip(place, patch, strict=True)))]
        assert torch.equal(patches[:, number], cut.movedim(1, -1).flatten(1))
    assert torch.equal(unpatchify(patches, patch, grid), x)


def test_sides_that_patches_do_not_fill_are_refused() -> None:
    with pytest.raises(UserError, match="6 x 7 cannot be cut into patches of 3 x 3"):
        patchify(torch.zeros(1, 1, 6, 7), (3, 3))
    with pytest.raises(UserError, match="6 x 6 cannot be cut into patches of 3;"):
        patchify(torch.zeros(1, 1, 6, 6), (3,))
    with pytest.raises(UserError, match="4 patches of 9 numbers are not a grid of 2 x 3 patches"):
        unpatchify(torch.zeros(1, 4, 9), (3, 3), (2, 3))


def test_places_number_the_grid_row_by_row() -> None:
    masks = np.zeros((2, 2, 3), dtype=bool)
    masks[0, 1, 0] = masks[0, 0, 2] = masks[1, 1] = True
    with pytest.raises(UserError, match="hold 2 to 3 patches"):
        places(masks)
    masks[1, 1, 1] = False
    assert places(masks).tolist() == [[2, 3], [3, 5]]
    assert places(masks[:0]).shape == (0, 0)
    assert places(masks & False).shape == (2, 0)


def test_tokens_are_picked_in_the_order_of_their_places() -> None:
    tokens, where = torch.arange(10.0).view(2, 5, 1), torch.tensor([[2, 0], [1, 1]])
    assert at_places(tokens, where).flatten().tolist() == [2, 0, 6, 6]
    assert kept(tokens, where, 2).flatten().tolist() == [0, 1, 4, 2, 5, 6, 8, 8]
    nothing: Tensor = kept(tokens, where[:, :0], 1)
    assert nothing.flatten().tolist() == [0, 5]
