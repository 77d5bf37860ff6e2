"""The entropy of predictions, and losses on a network's own answers, by hand."""

import math

import torch

from lightspan.objectives.entropy import prediction_entropy
from lightspan.objectives.pseudo_labels import UNTRUSTED, pseudo_label_loss


def test_entropy_is_the_logarithm_of_equal_answers_and_zero_of_a_sure_one() -> None:
    assert math.isclose(float(prediction_entropy(torch.zeros(3, 5))), math.log(5), rel_tol=1e-6)
    assert float(prediction_entropy(torch.tensor([[200.0, 0.0, -torch.inf]]).nan_to_num(neginf=-1e30))) == 0
    p = torch.tensor([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]], dtype=torch.float64)
    by_hand = -(p * p.log()).sum(dim=1).mean()
    torch.testing.assert_close(prediction_entropy(p.log() + 3), by_hand)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(prediction_entropy, x)


def test_targets_are_trusted_labels_or_sharpened_sure_answers_and_nothing_else_counts() -> None:
    weak_p = torch.tensor([[0.6, 0.3, 0.1], [0.995, 0.004, 0.001], [0.2, 0.5, 0.3]], dtype=torch.float64)
    strong = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_q = strong.log_softmax(dim=1)
    sharp = weak_p[1].square() / weak_p[1].square().sum()
    by_hand = (-log_q[0, 2] - (sharp * log_q[1]).sum()) / 2
    loss = pseudo_label_loss(strong, weak_p.log(), torch.tensor([2, UNTRUSTED, UNTRUSTED]))
    torch.testing.assert_close(loss, by_hand)
    none = pseudo_label_loss(strong.requires_grad_(), weak_p.log()[2:].expand(3, 3), torch.full((3,), UNTRUSTED))
    none.backward()
    assert none.item() == 0
    assert not strong.grad.any()


def test_no_gradient_goes_through_the_weak_view() -> None:
    weak = torch.randn(3, 3, requires_grad=True)
    strong = torch.randn(3, 3, requires_grad=True)
    pseudo_label_loss(strong, weak, torch.full((3,), UNTRUSTED), confidence=0.0).backward()
    assert weak.grad is None
    assert strong.grad.any()
