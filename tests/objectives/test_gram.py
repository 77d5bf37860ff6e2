"""Gram anchoring: by hand, invariances, and patches without a direction."""

import math

import pytest
import torch
from torch.nn import functional as F

from lightspan.objectives.gram import gram_loss


def test_worked_by_hand() -> None:
    patches = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]])  # cosine 0
    anchor = torch.tensor([[[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]])  # cosine of 45 degrees
    assert gram_loss(patches, anchor).item() == pytest.approx(2 * math.cos(math.pi / 4) ** 2 / 4)


def test_it_is_the_squared_norm_of_the_paper_over_its_entries_image_by_image() -> None:
    student, anchor = torch.randn(3, 5, 4), torch.randn(3, 5, 6)
    total = torch.zeros(())
    for x, g in zip(F.normalize(student, dim=2), F.normalize(anchor, dim=2), strict=True):
        total += torch.linalg.matrix_norm(x @ x.T - g @ g.T) ** 2
    torch.testing.assert_close(gram_loss(student, anchor), total / 75)


def test_it_is_blind_to_lengths_and_turns_of_features_and_zero_for_equal_ones() -> None:
    student, anchor = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    for same in (student @ turn, student * torch.rand(2, 5, 1).double().add(0.1)):
        torch.testing.assert_close(gram_loss(same, anchor), gram_loss(student, anchor))
    assert gram_loss(anchor @ turn, anchor) < 1e-20
    assert gram_loss(student, -anchor) == gram_loss(student, anchor)
    assert torch.autograd.gradcheck(lambda x: gram_loss(x, anchor), student.requires_grad_())


def test_opposite_cosines_give_the_most_and_no_gradient_reaches_the_anchor() -> None:
    student, anchor = torch.tensor([[[1.0], [1.0]]]), torch.tensor([[[1.0], [-1.0]]]).requires_grad_()
    loss = gram_loss(student.requires_grad_(), anchor)
    loss.backward()
    assert loss.item() == 2  # 4 between different patches, 0 of a patch with itself
    assert anchor.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_of_zeros_have_no_gradient_and_no_image_gives_zero(dtype: torch.dtype) -> None:
    student = torch.zeros(1, 3, 4, dtype=dtype).requires_grad_()
    loss = gram_loss(student, torch.ones(1, 3, 4, dtype=dtype))
    loss.backward()
    assert loss.item() == 1
    assert student.grad is not None
    assert student.grad.abs().max() == 0
    assert gram_loss(student[:0], student[:0]).item() == 0
