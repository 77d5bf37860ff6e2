"""Surfaces of signed distances: closed forms of a plane and a sphere, finer pieces, and the field of a grid."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightspan.nn.rendering import Rays, composited, cut_at, finer_ends, seen_by_opacity, surface_opacity
from lightspan.nn.signed_fields import SignedField, WidePerceptron


def test_opacity_is_the_change_of_the_sigmoid_over_a_piece() -> None:
    for distance, slope, length in ((0.1, -0.5, 0.2), (0.0, -1.0, 0.1), (-0.3, -0.2, 0.5), (0.2, 0.7, 0.3)):
        ends = [1 / (1 + math.exp(-20 * (distance + side * min(slope, 0) * length / 2))) for side in (-1, 1)]
        found = surface_opacity(*(torch.tensor(x, dtype=torch.float64) for x in (distance, slope, length)), 20.0)
        assert float(found) == pytest.approx(min(max((ends[0] - ends[1] + 1e-5) / (ends[0] + 1e-5), 0), 1), rel=1e-9)


def shown(distance: Tensor, slope: Tensor, end: Tensor, sharpness: float) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, what passes, depth)"""
    seen = seen_by_opacity(surface_opacity(distance, slope, end.diff(dim=-1), sharpness))
    middle = (end[..., 1:] + end[..., :-1]) / 2
    depth = composited(seen.weight, middle[..., None])[..., 0] / seen.weight.sum(-1).clamp_min(1e-6)
    return seen.weight, seen.passes, depth


def test_a_sharp_plane_and_a_sharp_sphere_are_seen_where_they_are() -> None:
    end = torch.linspace(0, 1, 129, dtype=torch.float64).expand(5, 129)
    at = (end[:, 1:] + end[:, :-1]) / 2
    steep = torch.linspace(0.3, 1, 5, dtype=torch.float64)[:, None]
    plane = steep * (0.4 - at)  # of rays that meet it under several angles
    weight, passes, depth = shown(plane, -steep.expand_as(at), end, 2000.0)
    torch.testing.assert_close(weight.sum(1) + passes, torch.ones(5, dtype=torch.float64))
    assert passes.max() < 1e-3
    assert (depth - 0.4).abs().max() < 1 / 128
    # Towards a sphere of radius 0.2 around (0.6, 0, 0), from the origin, aside of its middle by a little.
    aside = torch.linspace(0, 0.15, 5, dtype=torch.float64)[:, None]
    from_middle = ((at - 0.6).square() + aside.square()).sqrt()
    weight, passes, depth = shown(from_middle - 0.2, (at - 0.6) / from_middle, end, 2000.0)
    torch.testing.assert_close(weight.sum(1) + passes, torch.ones(5, dtype=torch.float64))
    truth = 0.6 - (0.04 - aside[:, 0].square()).sqrt()
    assert (depth - truth).abs().max() < 1 / 128


def test_most_is_seen_at_the_crossing_and_nothing_where_rays_go_away() -> None:
    end = torch.linspace(0, 1, 201)[None]
    at = (end[:, 1:] + end[:, :-1]) / 2
    for crossing in (0.201, 0.5, 0.873):
        weight, _, _ = shown(crossing - at, -torch.ones_like(at), end, 50.0)
        assert abs(float(at[0, weight[0].argmax()]) - crossing) <= 1 / 200
    weight, passes, _ = shown(0.2 + at, torch.ones_like(at), end, 50.0)
    assert passes > 0.99
    inside, passes, _ = shown(at - 0.5, torch.ones_like(at), end, 50.0)
    assert inside[0, 0] > 0.99  # a ray that begins deep inside sees what it is in


def test_pieces_are_between_near_and_far_whatever_the_jitter() -> None:
    near, far = torch.tensor([0.0, 1, 2]), torch.tensor([1.0, 4, 2])
    even = cut_at(near, far, 4)
    torch.testing.assert_close(even[1], torch.tensor([1, 1.75, 2.5, 3.25, 4]))
    uneven = cut_at(near, far, 4, torch.rand(3, 4, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(uneven[:, [0, -1]], torch.stack([near, far], dim=1))
    assert (uneven.diff(dim=1) >= 0).all()
    assert (uneven[:2].diff(dim=1) > 0).all()


def test_finer_ends_lie_around_the_first_surface() -> None:
    end = cut_at(torch.zeros(2), torch.ones(2), 16)
    crossing = torch.tensor([[0.3], [0.71]])
    share = (torch.arange(12) + 0.5).expand(2, 12) / 12
    found = finer_ends(end, crossing - end, share, 64.0)
    assert found.shape == (2, 29)
    assert (found.diff(dim=1) >= 0).all()
    new = torch.stack([row[~torch.isin(row, old)] for row, old in zip(found, end, strict=True)])
    assert ((new - crossing).abs() < 0.15).double().mean() > 0.9
    # A wall at 0.3 hides one at 0.7.
    walls = torch.minimum((0.3 - end).abs(), (0.7 - end).abs()) - 0.05
    hidden = finer_ends(end, walls, share, 500.0)
    assert ((hidden > 0.4).sum(dim=1) <= (end > 0.4).sum(dim=1) + 1).all()
    assert torch.equal(finer_ends(end, crossing - end, share[:, :0], 64.0), end)


def sphere() -> SignedField:
    """A field whose distance is the first channel of its grid."""
    field = SignedField(1, 2, hidden=4).double()
    first, last = field.shape.layers
    with torch.no_grad():
        for layer in (first, last):
            layer.weight.zero_()
            layer.bias.zero_()
        first.weight[:2, 0] = torch.tensor([1.0, -1])  # softplus(x) - softplus(-x) = x
        last.weight[0, :2] = torch.tensor([1.0, -1])
    return field


def sphere_grid(side: int = 64, radius: float = 0.3) -> Tensor:
    line = (torch.arange(side, dtype=torch.float64) + 0.5) / side - 0.5
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    distance = (x.square() + y.square() + z.square()).sqrt() - radius
    return torch.stack([distance, x, y])[None]


def towards(count: int = 30) -> Rays:
    generator = torch.Generator().manual_seed(0)
    target = 0.2 * torch.randn(1, count, 3, generator=generator, dtype=torch.float64).clamp(-0.8, 0.8)
    origin = torch.nn.functional.normalize(torch.randn(1, count, 3, generator=generator, dtype=torch.float64), dim=-1)
    return Rays(origin, torch.nn.functional.normalize(target - origin, dim=-1))


def test_a_sphere_in_a_grid_has_its_depth_and_its_normals() -> None:
    field, grid, half = sphere(), sphere_grid(), torch.full((1, 3), 0.5, dtype=torch.float64)
    with torch.no_grad():
        field.log_sharpness.fill_(0.8)
    rays = towards()
    share = (torch.arange(32, dtype=torch.float64) + 0.5).expand(1, 30, 32) / 32
    seen = field(grid, half, rays, 64, torch.full((1, 30, 64), 0.5, dtype=torch.float64), share)
    ahead = -(rays.origin * rays.direction).sum(-1)
    under = 0.09 - (1 - ahead.square())
    meets = (under > 0.01) & seen.crosses
    truth = ahead - under.clamp_min(0).sqrt()
    assert meets.sum() > 10
    assert (seen.depth - truth)[meets].abs().max() < 1 / 64
    at_surface = rays.origin + truth[..., None] * rays.direction
    _, slope, _, _ = field.slopes(grid, half, at_surface)
    assert (slope.norm(dim=-1)[meets] - 1).abs().max() < 0.03
    cosine = torch.nn.functional.cosine_similarity(slope, at_surface, dim=-1)[meets]
    assert torch.rad2deg(cosine.clamp(max=1).acos()).max() < 2


def test_finer_ends_are_those_of_a_loop_along_a_wavy_distance() -> None:
    end = torch.linspace(0, 1, 9, dtype=torch.float64)
    distance = 0.05 + 0.2 * torch.cos(9 * end)
    share = (torch.arange(5, dtype=torch.float64) + 0.3) / 5
    light, before, weights = 1.0, 0.0, []
    for piece in range(8):
        length = float(end[piece + 1] - end[piece])
        own = float(distance[piece + 1] - distance[piece]) / (length + 1e-5)
        slope, before = min(own, before, 0.0), own
        middle = float(distance[piece] + distance[piece + 1]) / 2
        first, last = (1 / (1 + math.exp(-20 * (middle + side * slope * length / 2))) for side in (-1, 1))
        alpha = min(max((first - last + 1e-5) / (first + 1e-5), 0), 1)
        weights.append(light * alpha + 1e-5)
        light *= 1 - alpha
    sums = np.cumsum([0, *weights]) / sum(weights)
    expected = torch.from_numpy(np.sort([*end.tolist(), *np.interp(share.numpy(), sums, end.numpy())]))
    torch.testing.assert_close(finer_ends(end[None], distance[None], share[None], 20.0)[0], expected)


def test_a_smooth_perceptron_has_the_published_softplus_between_its_layers() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3)
    for smooth in (True, False):
        first, last = (net := WidePerceptron((3, 4, 2), smooth)).layers
        inner = first(x)
        told = (100 * inner.double()).exp().log1p().div(100).float() if smooth else inner.clamp_min(0)
        torch.testing.assert_close(net(x), last(told))


def test_slopes_have_gradients_and_are_the_same_without_them() -> None:
    torch.manual_seed(0)
    field = SignedField(2, 2, hidden=3).double()
    grid = torch.randn(2, 4, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    at, half = 0.1 * torch.randn(2, 3, 3, dtype=torch.float64), torch.full((2, 3), 0.5, dtype=torch.float64)

    def steepness(grid: Tensor) -> Tensor:
        return field.slopes(grid, half, at)[1].square().sum()

    assert torch.autograd.gradcheck(steepness, (grid,))
    steepness(grid).backward()
    assert field.shape.layers[0].weight.grad.abs().sum() > 0
    with_gradients = field.slopes(grid, half, at)[1]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            inside = field.slopes(grid * 1, half * 1, at * 1)
            assert not any(part.requires_grad for part in inside)
            torch.testing.assert_close(inside[1], with_gradients.detach())


def test_rays_that_miss_the_box_are_told_and_nothing_is_nan() -> None:
    field = SignedField(1, 1, hidden=2)
    origin = torch.tensor([[[2.0, 2, 2], [0, 0, 0], [0.5, 0.5, 0.5]]])
    rays = Rays(origin, torch.tensor([[[1.0, 0, 0], [0, 0, 1], [0, 1, 0]]]))
    grid = torch.zeros(1, 2, 2, 2, 2, requires_grad=True)
    seen = field(grid, torch.full((1, 3), 0.4), rays, 4, torch.rand(1, 3, 4), torch.rand(1, 3, 2))
    assert seen.crosses.tolist() == [[False, True, False]]
    assert all(torch.isfinite(part).all() for part in seen)
    (seen.colour.sum() + seen.depth.sum() + seen.slope.square().sum()).backward()
    assert torch.isfinite(grid.grad).all()
    empty = field(
        grid[:0], torch.zeros(0, 3), Rays(*(part[:0] for part in rays)), 4, torch.rand(0, 3, 4), torch.rand(0, 3, 2)
    )
    assert empty.colour.shape == (0, 3, 3)
