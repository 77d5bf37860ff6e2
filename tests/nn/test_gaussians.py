"""Gaussians: closed form, a plain loop, what pictures may not depend on, gradients, and what no camera sees."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.autograd.functional import jacobian

from lightspan.nn import gaussians as parts
from lightspan.nn.gaussians import GaussianCameras, Gaussians, drawn, sound, splat_opacity, splatted, turns
from lightspan.nn.rendering import seen_by_opacity


def cloud(count: int, seed: int = 0, pictures: int = 1, dtype: torch.dtype = torch.float64) -> Gaussians:
    """Some ahead of `camera`, of any turn."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*sides: int) -> Tensor:
        return torch.rand(pictures, count, *sides, generator=generator, dtype=torch.float64).to(dtype)

    centre = 2 * draw(3) - 1 + torch.tensor([0, 0, 3.0], dtype=dtype)
    return Gaussians(centre, 0.1 + 0.3 * draw(3), draw(4) - 0.5, 0.2 + 0.6 * draw(), draw(3))


def camera(pictures: int = 1, dtype: torch.dtype = torch.float64) -> GaussianCameras:
    lens = torch.tensor([[7.0, 0.2, 3.5], [0, 8, 2.5], [0, 0, 1]], dtype=dtype)
    eye = torch.eye(3, dtype=dtype).repeat(pictures, 1, 1)
    return GaussianCameras(torch.zeros(pictures, 3, dtype=dtype), eye, lens.repeat(pictures, 1, 1))


def moved(
    given: Gaussians, seen: GaussianCameras, turn_4: Tensor, shift_3: Tensor
) -> tuple[Gaussians, GaussianCameras]:
    """Everything, by one rotation and one shift."""
    turn = turns(turn_4)
    by, own = turn_4 / turn_4.norm(), given.turn_BG4
    real = by[0] * own[..., 0] - (by[1:] * own[..., 1:]).sum(dim=-1)
    rest = (
        by[0] * own[..., 1:] + own[..., :1] * by[1:] + torch.linalg.cross(by[1:].expand_as(own[..., 1:]), own[..., 1:])
    )
    turned = torch.cat([real[..., None], rest], dim=-1)
    return (
        given._replace(centre_BG3=given.centre_BG3 @ turn.T + shift_3, turn_BG4=turned),
        seen._replace(place_B3=seen.place_B3 @ turn.T + shift_3, rotation_B33=seen.rotation_B33 @ turn.T),
    )


def test_one_gaussian_ahead_is_its_closed_form_at_every_pixel() -> None:
    centre, scale = torch.tensor([[[0, 0, 2.0]]]).double(), torch.tensor([[[0.3, 0.5, 0.7]]]).double()
    opacity, colour = torch.tensor([[0.8]]).double(), torch.tensor([[[0.2, 0.5, 0.9]]]).double()
    turn = torch.tensor([[[1.0, 0, 0, 0]]]).double()
    lens = torch.tensor([[[6.0, 0, 2], [0, 4, 3], [0, 0, 1]]]).double()
    seen = camera()._replace(intrinsics_B33=lens)
    picture = drawn(Gaussians(centre, scale, turn, opacity, colour), seen, 7, 5, background_C=torch.tensor([1.0, 0, 0]))
    for y in range(7):
        for x in range(5):
            power = (x - 2) ** 2 / (0.3 * 0.3 * 9 + 0.3) + (y - 3) ** 2 / (0.5 * 0.5 * 4 + 0.3)
            alpha = 0.8 * torch.exp(torch.tensor(-power / 2).double())
            alpha = alpha if alpha >= 1 / 255 else alpha * 0
            wanted = alpha * colour[0, 0] + (1 - alpha) * torch.tensor([1.0, 0, 0])
            torch.testing.assert_close(picture.colour_BCHW[0, :, y, x], wanted, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(picture.passes_BHW[0, y, x], 1 - alpha, rtol=1e-6, atol=1e-9)


def test_many_are_a_loop_from_front_to_back_with_covariances_by_the_chain_rule() -> None:
    given, seen = cloud(9), camera()
    seen = moved(cloud(1), seen, torch.tensor([0.9, 0.05, -0.1, 0.02]).double(), torch.tensor([0.1, 0, 0.2]).double())[
        1
    ]

    def pixel_of(point_3: Tensor) -> Tensor:
        own = seen.intrinsics_B33[0] @ seen.rotation_B33[0] @ (point_3 - seen.place_B3[0])
        return own[:2] / own[2]

    left, wanted = torch.ones(6, 8).double(), torch.zeros(3, 6, 8).double()
    far = (seen.rotation_B33[0] @ (given.centre_BG3[0] - seen.place_B3[0]).T)[2]
    for one in far.argsort().tolist():
        turn, slope = turns(given.turn_BG4[0, one]), jacobian(pixel_of, given.centre_BG3[0, one])
        half = slope @ turn @ given.scale_BG3[0, one].diag()
        inverse = torch.linalg.inv(half @ half.T + 0.3 * torch.eye(2))
        for y in range(6):
            for x in range(8):
                apart = torch.tensor([x, y]).double() - pixel_of(given.centre_BG3[0, one])
                alpha = float((given.opacity_BG[0, one] * torch.exp(-apart @ inverse @ apart / 2)).clamp_max(0.99))
                if alpha >= 1 / 255:
                    wanted[:, y, x] += left[y, x] * alpha * given.colour_BGC[0, one]
                    left[y, x] *= 1 - alpha
    picture = drawn(given, seen, 6, 8)
    torch.testing.assert_close(picture.colour_BCHW[0], wanted)
    torch.testing.assert_close(picture.passes_BHW[0], left)


def test_weights_and_what_passes_sum_to_one_and_no_covariance_is_flat() -> None:
    given = cloud(20, pictures=2, dtype=torch.float32)
    thin = given._replace(scale_BG3=torch.tensor([1e-9, 1e-9, 40.0]).expand(2, 20, 3))
    pixels = torch.cartesian_prod(torch.arange(5.0), torch.arange(4.0))
    for some in (given, thin, given._replace(scale_BG3=torch.zeros(2, 20, 3))):
        alpha = splat_opacity(splatted(some, camera(2, torch.float32)), pixels)
        assert alpha.isfinite().all()
        assert float(alpha.min()) >= 0
        assert float(alpha.max()) <= 0.99
        weight, passes = seen_by_opacity(alpha)
        torch.testing.assert_close(weight.sum(dim=-1) + passes, torch.ones(2, 20))


def test_pictures_do_not_depend_on_order_on_signs_and_lengths_of_quaternions_or_on_where_all_is() -> None:
    given, seen = cloud(8), camera()
    before = drawn(given, seen, 6, 8).colour_BCHW
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    mixed = Gaussians(*(part[:, order] for part in given))
    turn, shift = torch.tensor([0.3, -0.8, 0.1, 0.5]).double(), torch.tensor([4.0, -7, 2]).double()
    for some, camera_there in (
        (mixed, seen),
        (given._replace(turn_BG4=-3 * given.turn_BG4), seen),
        moved(given, seen, turn, shift),
    ):
        torch.testing.assert_close(drawn(some, camera_there, 6, 8).colour_BCHW, before)


def test_the_nearer_hides_the_farther() -> None:
    centre = torch.tensor([[[0.0, 0, 4], [0, 0, 2]]]).double()
    colour = torch.eye(3)[None, :2].double()
    wide = torch.full((1, 2, 3), 9.0).double()
    given = Gaussians(centre, wide, torch.zeros(1, 2, 4).double(), torch.ones(1, 2).double(), colour)
    picture = drawn(given, camera(), 3, 3).colour_BCHW[0, :, 1, 1]
    torch.testing.assert_close(picture, torch.tensor([0.01 * 0.99, 0.99, 0]).double(), rtol=1e-2, atol=1e-3)


def test_gradients_are_right_of_all_that_a_gaussian_has() -> None:
    given, seen = cloud(4), camera()
    inputs = tuple(part.clone().requires_grad_() for part in given)
    assert gradcheck(lambda *some: tuple(drawn(Gaussians(*some), seen, 3, 4)), inputs)


def test_large_pictures_are_drawn_in_parts_with_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def picture_and_gradients() -> tuple[Tensor, ...]:
        some = Gaussians(*(part.requires_grad_() for part in cloud(5, pictures=2)))
        picture = drawn(some, camera(2), 6, 8).colour_BCHW
        return (picture.detach(), *torch.autograd.grad(picture.square().sum(), [*some]))

    whole = picture_and_gradients()
    monkeypatch.setattr(parts, "MOST_PAIRS", 70)
    for left, right in zip(picture_and_gradients(), whole, strict=True):
        torch.testing.assert_close(left, right)


def test_what_is_behind_or_before_a_broken_camera_is_not_seen_and_has_no_gradient() -> None:
    given = cloud(5, pictures=5)
    seen = camera(5)
    seen.place_B3[0, 2] = 9.0  # all is behind it
    seen.place_B3[1, 0] = torch.nan
    seen.rotation_B33[2] = 0
    seen.intrinsics_B33[3] = 0
    assert sound(seen).tolist() == [True, False, False, False, True]
    inputs = [part.requires_grad_() for part in given]
    picture = drawn(Gaussians(*inputs), seen, 4, 4)
    assert (picture.colour_BCHW[:4] == 0).all()
    assert (picture.passes_BHW[:4] == 1).all()
    assert (picture.colour_BCHW[4] > 0.1).any()
    for gradient in torch.autograd.grad(picture.colour_BCHW.sum(), inputs):
        assert gradient.isfinite().all()
        assert float(gradient[:4].abs().max()) == 0
        assert float(gradient[4].abs().max()) > 0


def test_none_at_all_and_half_types_are_drawn() -> None:
    nothing = drawn(cloud(0), camera(), 2, 3, background_C=torch.tensor([0.1, 0.2, 0.3]).double())
    torch.testing.assert_close(nothing.colour_BCHW[0, :, 1, 2], torch.tensor([0.1, 0.2, 0.3]).double())
    with torch.autocast("cpu", torch.bfloat16):
        picture = drawn(cloud(6, dtype=torch.bfloat16), camera(dtype=torch.bfloat16), 3, 4).colour_BCHW
    assert picture.dtype == torch.float32
    assert picture.isfinite().all()


def test_gaussians_are_found_again_from_their_picture() -> None:
    """By the gradient alone, from the right centres and the wrong all else."""
    true, seen = cloud(20, dtype=torch.float32), camera(dtype=torch.float32)
    seen = seen._replace(intrinsics_B33=torch.tensor([[[14.0, 0, 8], [0, 14, 8], [0, 0, 1]]]))
    wanted = drawn(true, seen, 16, 16).colour_BCHW
    start = (true.centre_BG3 + 0.05, torch.full((1, 20, 3), 0.2).log(), torch.ones(1, 20, 4), torch.zeros(1, 20),
             torch.zeros(1, 20, 3))  # fmt: skip
    raw = [part.clone().requires_grad_() for part in start]
    optimizer = torch.optim.Adam(raw, lr=0.03)

    def error() -> Any:
        centre, scale, turn, opacity, colour = raw
        given = Gaussians(centre, scale.exp(), turn, opacity.sigmoid(), colour.sigmoid())
        return (drawn(given, seen, 16, 16).colour_BCHW - wanted).square().mean()

    first = float(error())
    for _ in range(150):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert first > 1e-2
    assert float(error()) < 1e-3  # a PSNR of 30
