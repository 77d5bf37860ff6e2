"""The loss over a growing set of classes: worked by hand, and blind to what belongs to older tasks."""

import math

import pytest
import torch
from host_reads import HostReads
from torch.nn import functional as F

from lightspan.errors import UserError
from lightspan.experiments.class_text import current_class_text_loss


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


def by_definition(image, text, label, current, scale):
    logits = (scale * image @ text.mT)[:, current]
    target = F.one_hot(label, len(text))[:, current].to(logits)
    from_image = -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()
    return from_image - (target * logits.log_softmax(dim=0)).sum() / target.shape[1]


@pytest.mark.parametrize("scale", [1.0, 100.0, 1000.0])
def test_it_is_the_sum_of_both_cross_entropies_also_where_all_images_are_far_from_a_text(scale):
    image, text, label, current = batch()
    text[1] = -image.mean(dim=0) / image.mean(dim=0).norm()
    for of_one_class in (False, True):  # the other class has no image then
        label = torch.full_like(label, 3) if of_one_class else label
        expected = by_definition(image, text, label, current, scale)
        torch.testing.assert_close(current_class_text_loss(image, text, label, current, scale), expected)
        narrow = current_class_text_loss(image.float(), text.float(), label, current, scale)
        torch.testing.assert_close(narrow, expected.float(), rtol=1e-4, atol=1e-5)


def test_half_precision_and_autocast_do_not_narrow_the_logits():
    image, text, label, current = batch()
    image, text = image.bfloat16(), text.bfloat16()
    expected = current_class_text_loss(image.float(), text.float(), label, current, 100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(current_class_text_loss(image, text, label, current, 100.0), expected)
        assert torch.equal(current_class_text_loss(image.float(), text.float(), label, current, 100.0), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_degenerate_batches_give_finite_losses_and_gradients(dtype):
    image, text, label, current = batch()
    for rows in (image[:0], image[:1], image[:1].expand(6, -1), torch.zeros_like(image)):
        rows = rows.to(dtype, copy=True).requires_grad_()
        one = text.to(dtype, copy=True).requires_grad_()
        loss = current_class_text_loss(rows, one, label[: len(rows)], current, torch.tensor(100.0))
        loss.backward()
        assert loss.isfinite()
        assert rows.grad.isfinite().all()
        assert one.grad.isfinite().all()
        assert len(rows) or loss.item() == 0


def test_nothing_is_read_on_the_host_but_labels_that_are_there():
    image, text, label, current = batch()
    with HostReads() as reads:
        current_class_text_loss(image.requires_grad_(), text, label, current, 10.0).backward()
    assert reads.count == 1


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
    with pytest.raises(UserError, match="label 0 is not a class of the current task"):
        current_class_text_loss(image, text, label, current, 1.0)
