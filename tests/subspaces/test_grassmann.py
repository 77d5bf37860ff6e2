"""Geodesics on the Grassmann manifold: orthonormal frames, angles, and retractions, in float64."""

import math

import pytest
import torch
from torch import Tensor

from lightspan.subspaces.frames import random_frame
from lightspan.subspaces.grassmann import Horizontal, geodesic, orthonormalised, principal_angles

WIDTH, RANK = 7, 3


def frames(count: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return random_frame(range(count), WIDTH, RANK, dtype=dtype, device=torch.device("cpu"))


def direction(frame: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return Horizontal(frame).push(torch.randn(frame.shape, generator=generator, dtype=frame.dtype))


def unorthonormal(frame: Tensor) -> float:
    return float((frame.mT @ frame - torch.eye(frame.shape[-1], dtype=frame.dtype)).norm(dim=(1, 2)).max())


def test_a_thousand_steps_without_qr_leave_frames_orthonormal() -> None:
    frame = frames()
    for step in range(1000):
        frame = geodesic(frame, direction(frame, step), 0.1)
    assert unorthonormal(frame) < 1e-10


def test_a_step_is_the_published_one_of_the_thin_svd() -> None:
    frame = frames()
    h = direction(frame)
    u, s, vt = torch.linalg.svd(h, full_matrices=False)
    cosine, sine = (0.3 * s).cos()[:, None], (0.3 * s).sin()[:, None]
    torch.testing.assert_close(geodesic(frame, h, 0.3), ((frame @ vt.mT) * cosine + u * sine) @ vt)


def test_a_subspace_turns_by_the_length_times_the_singular_values() -> None:
    frame = frames()
    h = direction(frame) / 10
    turned = geodesic(frame, h, -0.7)
    expected = (0.7 * torch.linalg.svdvals(h)).flip(-1)
    assert float(expected.max()) < math.pi / 2
    torch.testing.assert_close(principal_angles(frame, turned), expected, rtol=1e-9, atol=0)
    assert principal_angles(frame, frame).max() < 1e-12


@pytest.mark.parametrize("scale", [1e-200, 1e-20, 1.0])
def test_directions_of_any_size_and_rank_are_ordinary(scale: float) -> None:
    frame = frames()
    rank_one = direction(frame) * torch.tensor([scale, 0.0, 0.0], dtype=torch.float64)
    moved = geodesic(frame, rank_one)
    assert unorthonormal(moved) < 1e-13
    torch.testing.assert_close(moved[..., 1:], frame[..., 1:], rtol=0, atol=1e-14)
    assert torch.equal(geodesic(frame, torch.zeros_like(frame)), frame) or torch.allclose(
        geodesic(frame, torch.zeros_like(frame)), frame, rtol=0, atol=1e-15
    )


def test_a_frame_as_wide_as_its_space_has_nowhere_to_go() -> None:
    square = torch.linalg.qr(torch.randn(1, 4, 4, dtype=torch.float64)).Q
    assert direction(square).abs().max() < 1e-14


def test_qr_with_fixed_signs_leaves_an_orthonormal_frame_and_keeps_columns_from_turning_round() -> None:
    frame = frames()
    torch.testing.assert_close(orthonormalised(frame), frame, rtol=0, atol=1e-14)
    near = frame + 0.05 * direction(frame)
    assert ((orthonormalised(near) * frame).sum(dim=1) > 0.9).all()
    assert unorthonormal(orthonormalised(near)) < 1e-14


def test_half_frames_are_computed_in_float32_and_come_back_rounded() -> None:
    half = frames().bfloat16()
    moved = geodesic(half, direction(frames()).bfloat16(), 0.1)
    assert moved.dtype == torch.bfloat16
    torch.testing.assert_close(
        moved.float(), geodesic(half.float(), direction(frames()).bfloat16().float(), 0.1), rtol=2**-8, atol=2**-8
    )
