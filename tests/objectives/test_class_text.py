"""The loss over a growing set of classes: worked by hand, and blind to what belongs to older tasks."""

import math

import pytest
import torch
from torch.nn import functional as F

from lightspan.errors import UserError
from lightspan.objectives.class_text import current_class_text_loss


def batch() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(n, 5, generator=generator).double() for n in (6, 4))
    current = torch.tensor([False, True, False, True])
    return F.normalize(image, dim=1), F.normalize(text, dim=1), torch.tensor([1, 3, 3, 1, 3, 1]), current


def test_texts_of_older_classes_get_no_gradient():
    image, text, label, current = batch()
    text.requires_grad_()
    current_class_text_loss(image, text, label, current, 10.0).backward()
    assert not text.grad[~current].any()
    assert text.grad[current].all()


def test_two_images_of_two_classes_by_hand():
    image = text = torch.eye(2, dtype=torch.float64)
    # Either way each row has logits (1, 0) with the first as its target.
    expected = 2 * math.log(1 + math.exp(-1))
    loss = current_class_text_loss(image, text, torch.tensor([0, 1]), torch.tensor([True, True]), 1.0)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_the_order_of_the_batch_does_not_matter():
    image, text, label, current = batch()
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    expected = current_class_text_loss(image, text, label, current, 3.0)
    torch.testing.assert_close(current_class_text_loss(image[order], text, label[order], current, 3.0), expected)


def test_gradients_are_those_of_finite_differences():
    image, text, label, current = batch()
    image.requires_grad_()
    assert torch.autograd.gradcheck(lambda i: current_class_text_loss(i, text, label, current, 2.0), image)


def test_a_label_of_an_older_task_is_named():
    image, text, label, current = batch()
    label[2] = 0
    with pytest.raises(UserError, match="label 0 is no class of the current task"):
        current_class_text_loss(image, text, label, current, 1.0)
