"""Structural similarity: torchmetrics', its range, borders and gradient."""

import pytest
import torch
from torch.autograd import gradcheck
from torchmetrics.functional.image import structural_similarity_index_measure

from lightspan.objectives.similarity import structural_similarity


def pictures(*sides: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(2, 3, *sides, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x, (x + 0.2 * torch.rand_like(x)).clamp(0, 1)


def test_it_is_that_of_torchmetrics_away_from_the_border() -> None:
    x, y = pictures(20, 23)
    inside = (..., slice(5, -5), slice(5, -5))
    _, wanted = structural_similarity_index_measure(x, y, data_range=1.0, return_full_image=True)
    torch.testing.assert_close(structural_similarity(x, y)[inside], wanted[inside], rtol=1e-6, atol=1e-8)


def test_equal_pictures_are_alike_everywhere_and_constant_ones_as_their_brightness() -> None:
    x, _ = pictures(4, 7)
    torch.testing.assert_close(structural_similarity(x, x), torch.ones_like(x))
    flat = structural_similarity(torch.full((1, 1, 3, 2), 0.2), torch.full((1, 1, 3, 2), 0.6))
    assert flat.flatten().tolist() == pytest.approx([(2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4)] * 6, rel=1e-3)


def test_its_gradient_is_right_and_half_types_are_computed_wide() -> None:
    x, y = (part[:1, :1] for part in pictures(3, 4))
    assert gradcheck(structural_similarity, (x.clone().requires_grad_(), y.clone().requires_grad_()))
    with torch.autocast("cpu", torch.bfloat16):
        found = structural_similarity(x.bfloat16(), y.bfloat16())
    assert found.dtype == torch.float32
    assert found.isfinite().all()
