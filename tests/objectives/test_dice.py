"""Dice of likely pixels: by hand, its gradients, and what is unknown, absent or in half precision."""

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.objectives.dice import dice_loss


def test_a_value_by_hand() -> None:
    p = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    logits = torch.stack([(1 - p).log(), p.log()])[None]
    for label, both, either in (([0, 1, 1], 1.25, 1.5 + 2), ([0, 0, 0], 0.0, 1.5), ([-1, 1, -1], 0.5, 0.5 + 1)):
        expected = 1 - (2 * both + 1) / (either + 1)
        assert dice_loss(logits, torch.tensor([label])).item() == pytest.approx(expected)
        square = logits.expand(1, 2, 3).unflatten(2, (3, 1)), torch.tensor([label]).view(1, 3, 1)
        assert dice_loss(*square).item() == pytest.approx(expected)


def test_it_is_the_mean_over_samples_and_classes_beside_the_ground() -> None:
    torch.manual_seed(0)
    logits, label = torch.randn(3, 4, 5, 6, dtype=torch.float64), torch.randint(-1, 4, (3, 5, 6))
    p, expected = logits.softmax(dim=1), []
    for row in range(3):
        for k in (1, 2, 3):
            true, known = label[row] == k, label[row] >= 0
            both, either = p[row, k][true].sum(), p[row, k][known].sum() + true.sum()
            expected.append(1 - (2 * both + 2.5) / (either + 2.5))
    torch.testing.assert_close(dice_loss(logits, label, smooth=2.5), torch.stack(expected).mean())
    assert torch.autograd.gradcheck(lambda x: dice_loss(x, label), logits.requires_grad_())


def test_what_is_unknown_absent_or_nothing_costs_nothing() -> None:
    logits = torch.tensor([[30.0, 30.0], [-30.0, -30.0]])[None].requires_grad_()
    for label in ([[0, 0]], [[-1, -1]]):
        loss = dice_loss(logits, torch.tensor(label))
        assert loss.item() == pytest.approx(0, abs=1e-6)
    empty = torch.zeros(0, 2, 4, requires_grad=True)
    loss = dice_loss(empty, torch.zeros(0, 4, dtype=torch.int64))
    assert loss.item() == 0
    loss.backward()
    assert dice_loss(torch.zeros(1, 2, 2).bfloat16(), torch.tensor([[0, 1]])).dtype == torch.float32
    with pytest.raises(UserError, match="at least 2"):
        dice_loss(torch.zeros(1, 1, 4), torch.zeros(1, 4, dtype=torch.int64))
