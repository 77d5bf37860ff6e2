"""Volume rendering: nerfacc's weights, closed forms, packed rays as dense ones, and rays of cameras."""

import math

import pytest
import torch
from torch import Tensor

from lightspan.nn.rendering import (
    Rays,
    along,
    camera_rays,
    composited,
    crossing,
    in_line,
    in_rows,
    opacity,
    seen_by_density,
    seen_by_opacity,
)


def samples(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    density, length = torch.rand(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return 8 * density, 0.3 * length


def test_weights_are_those_of_the_definition_sample_by_sample() -> None:
    density, length = samples(5, 7)
    seen = seen_by_density(density, length)
    for ray in range(5):
        left = 1.0
        for place in range(7):
            alpha = 1 - math.exp(-float(density[ray, place] * length[ray, place]))
            assert float(seen.weight[ray, place]) == pytest.approx(left * alpha, rel=1e-12)
            left *= 1 - alpha
        assert float(seen.passes[ray]) == pytest.approx(left, rel=1e-12)
    for found, wanted in zip(seen_by_opacity(opacity(density, length)), seen, strict=True):
        torch.testing.assert_close(found, wanted)


def test_what_lies_before_an_opaque_sample_is_not_lost_in_rounding() -> None:
    seen = seen_by_density(torch.tensor([0.5, 1e8, 1.0]), torch.ones(3))
    torch.testing.assert_close(seen.weight, torch.tensor([1 - math.exp(-0.5), math.exp(-0.5), 0.0]))


def test_weights_are_those_of_nerfacc() -> None:
    nerfacc = pytest.importorskip("nerfacc")
    density, length = (part.float() for part in samples(5, 7))
    ends = length.cumsum(dim=1)
    weight, before, alpha = nerfacc.render_weight_from_density(ends - length, ends, density)
    seen = seen_by_density(density, length)
    torch.testing.assert_close(seen.weight, weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(seen.passes, before[:, -1] * (1 - alpha[:, -1]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(seen_by_opacity(alpha).weight, nerfacc.render_weight_from_alpha(alpha)[0])


def test_a_constant_density_is_opaque_as_its_length_says_however_it_is_cut() -> None:
    near, far = torch.tensor([0.5, 0.0, 2.0]), torch.tensor([2.0, 3.0, 2.0])
    for count in (1, 10, 1000):
        for jitter in (None, torch.rand(3, count, generator=torch.Generator().manual_seed(1))):
            at, length = along(near, far, count, jitter)
            assert ((at >= near[:, None]) & (at <= far[:, None])).all()
            seen = seen_by_density(torch.full_like(length, 0.7), length)
            wanted = 1 - torch.exp(-0.7 * (far - near))
            torch.testing.assert_close(seen.weight.sum(dim=1), wanted, rtol=0, atol=1e-6)
            torch.testing.assert_close(seen.passes, 1 - wanted, rtol=0, atol=1e-6)


def test_weights_and_what_passes_sum_to_one_for_any_density() -> None:
    for scale in (0.0, 1e-6, 1.0, 1e3, 1e30):
        density, length = (part.float() for part in samples(4, 50))
        for seen in (seen_by_density(scale * density, length), seen_by_opacity(opacity(scale * density, length))):
            torch.testing.assert_close(seen.weight.sum(dim=1) + seen.passes, torch.ones(4), rtol=0, atol=1e-6)
            assert (seen.weight >= 0).all()
    nothing = seen_by_density(torch.zeros(3, 0), torch.zeros(3, 0))
    assert nothing.weight.shape == (3, 0)
    assert nothing.passes.tolist() == [1.0] * 3
    assert seen_by_opacity(torch.zeros(3, 0)).passes.tolist() == [1.0] * 3


def test_the_depth_of_a_thin_slab_is_where_it_is() -> None:
    at, length = along(torch.zeros(1), torch.full((1,), 4.0), 400)
    density = torch.where((at > 1.5) & (at < 1.52), 1e4, 0.0)
    seen = seen_by_density(density, length)
    depth = composited(seen.weight, at[..., None])[:, 0] / seen.weight.sum(dim=1)
    torch.testing.assert_close(depth, torch.tensor([1.51]), rtol=0, atol=0.01)
    colour = torch.where(at[..., None] < 2, torch.tensor([0.2, 0.4, 0.6]), torch.ones(3))
    torch.testing.assert_close(composited(seen.weight, colour), torch.tensor([[0.2, 0.4, 0.6]]))


def test_gradients_are_those_of_differences_and_finite_where_all_is_opaque() -> None:
    density, length = samples(3, 6)
    offsets = torch.tensor([0, 4, 4, 18])
    value = torch.rand(3, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    density.requires_grad_()

    def shown(density: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dense, packed = seen_by_density(density, length), seen_by_density(density.ravel(), length.ravel(), offsets)
        by_alpha = seen_by_opacity(opacity(density, length))
        colour = composited(packed.weight, value.flatten(0, 1), offsets)
        return composited(dense.weight, value) + dense.passes[:, None], colour, by_alpha.weight

    assert torch.autograd.gradcheck(shown, (density, value))
    alpha = torch.tensor([[0.5, 1.0, 0.3, 1.0, 0.2]], requires_grad=True)
    seen_by_opacity(alpha).weight[0, 1].backward()
    assert alpha.grad.tolist() == [[-1.0, 0.5, 0.0, 0.0, 0.0]]
    heavy = torch.full((1, 4), 1e20, requires_grad=True)
    composited(seen_by_density(heavy, torch.ones(1, 4)).weight, torch.rand(1, 4, 3)).sum().backward()
    assert heavy.grad.isfinite().all()


def test_packed_rays_are_dense_ones_also_without_samples() -> None:
    offsets = torch.tensor([0, 3, 3, 4, 9, 9])
    density, length = samples(9)
    value = torch.rand(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    packed = seen_by_density(density, length, offsets)
    by_alpha = seen_by_opacity(opacity(density, length), offsets)
    colour = composited(packed.weight, value, offsets)
    for ray in range(5):
        own = slice(int(offsets[ray]), int(offsets[ray + 1]))
        alone = seen_by_density(density[own], length[own])
        for seen in (packed, by_alpha):
            torch.testing.assert_close(seen.weight[own], alone.weight)
            torch.testing.assert_close(seen.passes[ray], alone.passes)
        torch.testing.assert_close(colour[ray], composited(alone.weight, value[own]))
    assert torch.equal(in_line(in_rows(value, offsets), offsets), value)
    empty = seen_by_density(torch.zeros(0), torch.zeros(0), torch.tensor([0]))
    assert empty.weight.shape == empty.passes.shape == (0,)


def test_half_precision_is_computed_wide() -> None:
    density, length = (part.bfloat16() for part in samples(2, 2000))
    seen = seen_by_density(0.01 * density, length)
    assert seen.weight.dtype == seen.passes.dtype == torch.float32
    torch.testing.assert_close(seen.weight.sum(dim=1) + seen.passes, torch.ones(2), rtol=0, atol=1e-6)


def test_rays_of_a_camera_lead_through_its_pixels() -> None:
    generator = torch.Generator().manual_seed(4)
    rotation = torch.linalg.qr(torch.randn(2, 3, 3, dtype=torch.float64, generator=generator))[0]
    place = torch.randn(2, 3, dtype=torch.float64, generator=generator)
    lens = torch.tensor([[20.0, 0.0, 7.5], [0.0, 22.0, 4.0], [0.0, 0.0, 1.0]], dtype=torch.float64).expand(2, 3, 3)
    rays = camera_rays(place, rotation, lens, 9, 16)
    assert rays.direction.shape == (2, 9, 16, 3)
    torch.testing.assert_close(rays.direction.norm(dim=-1), torch.ones(2, 9, 16, dtype=torch.float64))
    points = rays.origin + 3 * rays.direction
    own = torch.einsum("bij,bhwj->bhwi", rotation, points - place[:, None, None])
    assert (own[..., 2] > 0).all()
    pixel = torch.einsum("bij,bhwj->bhwi", lens, own / own[..., 2:])
    for y, x in ((0, 0), (8, 15), (3, 7)):
        torch.testing.assert_close(pixel[:, y, x, :2], torch.tensor([[x, y]], dtype=torch.float64).expand(2, 2))


def test_rays_cross_a_box_where_its_sides_are() -> None:
    low, high = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([1.0, 2.0, 3.0])
    origin = torch.tensor([[-3.0, 0, 0], [0, 0, 0], [0, 1, 1], [-3, 2.5, 0], [0, 0, 5]])
    direction = torch.tensor([[1.0, 0, 0], [0, -1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 1]])
    near, far = crossing(Rays(origin, direction), low, high)
    assert near[:3].tolist() == [2.0, 0.0, 0.0]
    assert far[:3].tolist() == [4.0, 2.0, 2.0]
    assert torch.equal(near[3:], far[3:])  # beside it, and behind
    at, length = along(near, far, 4)
    assert length[3:].sum() == 0
    assert at.isfinite().all()
