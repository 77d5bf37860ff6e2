"""Heads scan their routes as plain loops do; the attention over routes by its invariances and its range."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.nn.sequences.multi_head_scan import (
    GatedScan,
    MultiHeadScan,
    RouteScans,
    route_attention,
    route_places,
    scanned_patterns,
)
from lightspan.nn.sequences.scan_routes import PATTERNS, routes
from lightspan.nn.sequences.selective_scan import SelectiveScan


def test_each_head_scans_its_channels_along_its_routes_forth_and_back() -> None:
    torch.manual_seed(0)
    for grid, patterns, threshold in (
        ((3, 4), PATTERNS, 0.5),
        ((3, 4), ("raster",), None),
        ((2, 3, 2), PATTERNS[:2], 0.0),
    ):
        axes, length, width = len(grid), math.prod(grid), 3
        scans = RouteScans(width * len(patterns), patterns, axes, 2, threshold)
        x_BLD = torch.randn(2, length, width * len(patterns))
        expected = []
        for head, pattern in enumerate(patterns):
            forth = routes(pattern, grid)
            found = []
            for number, route in enumerate([*forth, *forth.flip(1)]):
                own = SelectiveScan(width, 1, 2)
                at = head * 2 * axes + number
                own.load_state_dict({name: one[at : at + 1] for name, one in scans.scan.state_dict().items()})
                y = torch.empty(2, length, width)
                y[:, route] = own(x_BLD[:, None, route, head * width : (head + 1) * width])[:, 0]
                found.append(y)
            stacked = torch.stack(found, dim=1)[:, None]
            expected.append((stacked.sum(2) if threshold is None else route_attention(stacked, threshold))[:, 0])
        found = scans(x_BLD, route_places(patterns, grid, x_BLD.device))
        torch.testing.assert_close(found, torch.cat(expected, dim=2), atol=1e-4, rtol=1e-4)


def test_attention_over_routes_by_hand() -> None:
    y_k = torch.tensor([1.0, 1.0, 1.0, 5.0], dtype=torch.float64).view(1, 1, 4, 1, 1)
    assert route_attention(y_k, 0.0).item() == pytest.approx(8 * 2, rel=1e-4)  # deviation 2, mean 1 above the least
    assert route_attention(y_k, 0.5).item() == pytest.approx(8 * 1.5, rel=1e-4)
    assert route_attention(y_k, 2.0).item() == 0


def test_attention_depends_on_differences_of_routes_alone() -> None:
    y = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)

    def weight(y: Tensor) -> Tensor:
        return route_attention(y, 0.0) / y.sum(dim=2)

    torch.testing.assert_close(weight(y + 3), weight(y))
    torch.testing.assert_close(weight(y * 7), weight(y), atol=1e-4, rtol=1e-4)  # but for the constant below the line
    torch.testing.assert_close(route_attention(y.flip(2), 0.5), route_attention(y, 0.5))
    low, high = (2 / 3, 2.0)  # of four routes
    assert weight(y).min() >= low - 1e-3
    assert weight(y).max() <= high
    for k in (2, 4, 6):
        one_above, one_below = torch.zeros(k, dtype=y.dtype), torch.ones(k, dtype=y.dtype)
        one_above[0], one_below[0] = 1, 0
        ends = [weight(each.view(1, 1, k, 1, 1) + 1).item() for each in (one_below, one_above)]
        assert ends == pytest.approx([math.sqrt(k) / (k - 1), math.sqrt(k)], rel=1e-4)


def test_routes_that_agree_are_left_out_with_a_gradient_of_zero() -> None:
    y = torch.full((1, 1, 4, 2, 2), 0.3, requires_grad=True)
    z = route_attention(y, 0.0)
    z.sum().backward()
    assert not z.any()
    assert torch.equal(y.grad, torch.zeros_like(y))
    assert torch.autograd.gradcheck(
        partial(route_attention, threshold=0.7), torch.randn(1, 2, 4, 2, 1).double().requires_grad_()
    )


def test_a_block_keeps_the_shape_of_any_grid_and_its_gradients_are_finite() -> None:
    torch.manual_seed(0)
    for grid in ((1, 1), (3, 5), (2, 3, 2)):
        for patterns in (PATTERNS, ["snake"], None):
            block = GatedScan(6, patterns, len(grid), states=2)
            places = route_places(scanned_patterns(patterns), grid, torch.device("cpu"))
            for x in (torch.randn(2, *grid, 6), torch.zeros(1, *grid, 6)):
                y = block(x.requires_grad_(), places)
                assert y.shape == x.shape
                y.sum().backward()
                assert x.grad.isfinite().all()
            low = block.bfloat16()(torch.randn(1, *grid, 6).bfloat16(), places)
            assert low.dtype == torch.bfloat16
            assert low.isfinite().all()


def test_its_heads_have_fewer_weights_than_one_scan_of_twice_the_width() -> None:
    def weights(patterns: list[str] | None) -> int:
        return sum(weight.numel() for weight in GatedScan(96, patterns).parameters())

    assert weights([*PATTERNS]) < weights(None) / 1.4
    assert weights([*PATTERNS]) == pytest.approx(weights(["raster"]), rel=0.1)


def test_a_width_that_heads_do_not_divide_loses_the_rest_between_the_maps() -> None:
    scan = MultiHeadScan(10, PATTERNS, 2, 2, 0.0)
    assert (scan.inward.out_features, scan.outward.in_features, scan.outward.out_features) == (8, 8, 10)


def test_settings_that_do_not_fit_are_named() -> None:
    for settings, said in (
        ({"patterns": []}, "patterns="),
        ({"patterns": ["zigzag"]}, "zigzag"),
        ({"width": 3}, "width=3"),
        ({"axes": 1}, "axes=1"),
        ({"threshold": -0.1}, "threshold=-0.1"),
    ):
        with pytest.raises(UserError, match=said):
            GatedScan(**{"width": 8, **settings})
    assert isinstance(GatedScan(4, None).outward, nn.Linear)
