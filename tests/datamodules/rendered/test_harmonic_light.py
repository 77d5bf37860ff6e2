"""Light of nine coefficients: against integrals over the sphere, and back from what it shades."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.datamodules.rendered.harmonic_light import CONSTANT, LAMBERT, fitted_light, harmonics, shading


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sphere(rings: int) -> tuple[Tensor, Tensor]:
    """Directions [N 3] and their weights, whose sum is 4 pi: Gauss-Legendre in z, even steps around."""
    z, weight = (torch.from_numpy(of) for of in np.polynomial.legendre.leggauss(rings))
    around = torch.arange(2 * rings, dtype=torch.float64) * math.pi / rings
    r = (1 - z.square()).sqrt()[:, None]
    xyz = torch.stack([r * around.cos(), r * around.sin(), z[:, None].expand(rings, 2 * rings)], dim=-1)
    return xyz.flatten(0, 1), (weight[:, None] * (math.pi / rings)).expand(rings, 2 * rings).flatten()


def test_harmonics_are_orthonormal_over_the_sphere() -> None:
    at, weight = sphere(6)
    own = harmonics(at)
    torch.testing.assert_close(own.T @ (weight[:, None] * own), torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-12)


def test_coefficients_come_in_the_order_that_the_renderers_of_flame_have() -> None:
    x, y, z = at = F.normalize(torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64), dim=0)
    forms = torch.stack([x * 0 + 1, x, y, z, x * y, x * z, y * z, x * x - y * y, 3 * z * z - 1])
    assert (harmonics(at) / forms).min() > 0
    for degree in (slice(1, 4), slice(4, 7)):
        ratio = (harmonics(at) / forms)[degree]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_each_degree_is_a_constant_times_its_own_lambertian_integral() -> None:
    light, normals = draw(9, 3), F.normalize(draw(7, 3, seed=1), dim=1)
    at, weight = sphere(120)
    coming = harmonics(at) @ light
    for n, found in zip(normals, shading(light, normals), strict=True):
        sent = (weight * (at @ n).clamp_min(0)) @ coming / math.pi
        torch.testing.assert_close(found, sent, rtol=0, atol=1e-3)


def test_even_light_shades_evenly_and_by_itself() -> None:
    light = torch.zeros(9, 3, dtype=torch.float64)
    light[0] = 1 / CONSTANT
    torch.testing.assert_close(shading(light, F.normalize(draw(5, 3), dim=1)), torch.ones(5, 3, dtype=torch.float64))


def test_light_from_a_side_shades_by_two_thirds_of_the_cosine() -> None:
    light = torch.zeros(9, 3, dtype=torch.float64)
    light[2] = math.sqrt(4 * math.pi / 3)  # the light that is y in direction (x, y, z)
    normals = F.normalize(draw(5, 3), dim=1)
    torch.testing.assert_close(shading(light, normals), 2 / 3 * normals[:, 1:2].expand(5, 3))


def test_each_clip_has_its_own_light() -> None:
    light, normals = draw(2, 9, 3), F.normalize(draw(2, 4, 3, seed=1), dim=2)
    found = shading(light[:, None], normals)
    for row in range(2):
        torch.testing.assert_close(found[row], shading(light[row], normals[row]), rtol=0, atol=0)


def test_light_is_found_again_from_what_it_shades() -> None:
    light, normals = draw(9, 3), F.normalize(draw(40, 3, seed=1), dim=1)
    torch.testing.assert_close(fitted_light(shading(light, normals), normals), light, rtol=0, atol=1e-10)


def test_of_one_normal_the_shortest_light_is_found_and_of_none_no_light() -> None:
    normal = torch.tensor([[0.0, 0.0, 1.0]]).expand(6, 3)
    light = fitted_light(torch.full((6, 3), 0.5), normal)
    torch.testing.assert_close(shading(light, normal.double()), torch.full((6, 3), 0.5, dtype=torch.float64))
    assert (light[[1, 2, 4, 5, 6, 7]].abs() < 1e-12).all()  # it does not show on this normal
    assert torch.equal(fitted_light(torch.zeros(0, 3), torch.zeros(0, 3)), torch.zeros(9, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_light_keeps_its_type(dtype: torch.dtype) -> None:
    assert shading(draw(9, 3).to(dtype), draw(4, 3).to(dtype)).dtype == dtype
    assert len(LAMBERT) == harmonics(draw(4, 3)).shape[1]
