"""Positions: the tables of MAE, and rotations whose products depend on distances alone."""

import math

import pytest
import torch
from timm.layers import apply_rot_embed_cat

from lightspan.core.errors import UserError
from lightspan.nn.sequences.patches import patchify
from lightspan.nn.sequences.positions import rotary, sincos


def test_a_table_of_one_axis_is_worked_by_hand() -> None:
    table = sincos((3,), 4, prefix=1, base=100.0)
    by_hand = [[math.sin(t), math.sin(t / 10), math.cos(t), math.cos(t / 10)] for t in range(3)]
    torch.testing.assert_close(table, torch.tensor([[0.0] * 4, *by_hand]))


@pytest.mark.sweep  # for the time that the import takes
def test_tables_and_patches_of_two_axes_are_those_of_maes_code() -> None:
    """lightly has them after the authors' code."""
    peer = pytest.importorskip("lightly.models.utils")
    expected = torch.as_tensor(peer.get_2d_sine_cosine_positional_embedding(48, 5, cls_token=True)).float()
    torch.testing.assert_close(sincos((5, 5), 48, prefix=1), expected, rtol=0, atol=1e-6)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(patchify(x, (4, 4)), peer.patchify(x, 4))


@pytest.mark.parametrize("grid", [(7,), (3, 5), (2, 3, 4)])
def test_every_axis_has_its_share_of_channels_the_last_axis_first(grid: tuple[int, ...]) -> None:
    table = sincos(grid, 24).view(*grid, 24)
    share = 24 // len(grid)
    for axis, side in enumerate(grid):
        own = table[..., share * (len(grid) - 1 - axis) :][..., :share]
        line = sincos((side,), share).view(*(side if other == axis else 1 for other in range(len(grid))), share)
        torch.testing.assert_close(own, line.expand_as(own))


@pytest.mark.parametrize("grid", [(9,), (3, 4), (2, 3, 3)])
def test_turned_queries_and_keys_know_only_how_far_apart_they_are(grid: tuple[int, ...]) -> None:
    table, places = rotary(grid, 12, base=100.0).double(), torch.cartesian_prod(*map(torch.arange, grid))
    places = places.view(-1, len(grid))
    q, k = torch.randn(2, 3, 12, dtype=torch.float64)  # three pairs: one may have two products that happen to be near
    turned_q, turned_k = (apply_rot_embed_cat(x[:, None].expand(-1, len(table), -1), table) for x in (q, k))
    torch.testing.assert_close(turned_q.norm(dim=2), q.norm(dim=1, keepdim=True).expand(-1, len(table)))
    products = (turned_q @ turned_k.mT).permute(1, 2, 0)
    seen: dict[tuple[int, ...], list[float]] = {}
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            apart = tuple((a - b).tolist())
            assert products[i, j].tolist() == pytest.approx(seen.setdefault(apart, products[i, j].tolist()), abs=1e-5)
    assert len({tuple(round(value, 4) for value in values) for values in seen.values()}) == len(seen)


@pytest.mark.parametrize(("grid", "width"), [((4, 4), 6), ((4,), 3), ((2, 2, 2), 8), ((), 4), ((0, 2), 4)])
def test_widths_that_axes_cannot_share_are_refused(grid: tuple[int, ...], width: int) -> None:
    for table in (sincos, rotary):
        with pytest.raises(UserError, match=f"positions of width {width} on a grid"):
            table(grid, width)
