"""SimSiam: the loss by hand, its gradient and where there is none, and refusals."""

from functools import partial

import method_runs
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from lightspan.core.errors import UserError
from lightspan.methods.distillation.simsiam import SimSiam, negative_cosine
from lightspan.nn.heads.projector import Projector


def method(hidden_norm: bool = True) -> SimSiam:
    torch.manual_seed(0)
    projector = Projector(8, [8], 6, hidden_norm=hidden_norm, batch_norm=hidden_norm)
    predictor = Projector(6, [3], 6, hidden_norm=hidden_norm)
    return SimSiam(method_runs.Pooled(), projector, predictor, optimizer=partial(SGD, lr=0.1))


def views(rows: int = 6, seed: int = 1) -> list[torch.Tensor]:
    return method_runs.batch(rows, seed, locals_=0)["views"]


def two_views(rows: int = 6, seed: int = 1) -> dict[str, object]:
    return method_runs.batch(rows, seed, locals_=0)


def test_the_loss_of_two_rows_is_the_one_worked_out_by_hand() -> None:
    prediction, target = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    assert negative_cosine(prediction, target).item() == pytest.approx(-(3 / 5 + 0) / 2)


def test_the_gradient_is_that_of_the_loss() -> None:
    prediction, target = torch.randn(2, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(negative_cosine, (prediction.requires_grad_(), target.requires_grad_()))


def test_lengths_the_order_of_rows_and_the_order_of_views_do_not_matter() -> None:
    prediction, target = torch.randn(2, 5, 4, dtype=torch.float64)
    expected, order = -F.cosine_similarity(prediction, target).mean(), torch.randperm(5)
    torch.testing.assert_close(negative_cosine(7 * prediction[order], target[order] / 3), expected)
    net, (first, second) = method(hidden_norm=False), views()
    torch.testing.assert_close(net.loss([first, second]), net.loss([second, first]))


def test_only_predictions_pass_a_gradient() -> None:
    """The paper's algorithm 1: the gradient is that against embeddings that were computed before."""
    net, (first, second) = method(hidden_norm=False), views()
    with torch.no_grad():
        z1, z2 = (net.projector(net.backbone(view)) for view in (first, second))
    p1, p2 = (net.predictor(net.projector(net.backbone(view))) for view in (first, second))
    ((negative_cosine(p1, z2) + negative_cosine(p2, z1)) / 2).backward()
    expected = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    net.loss([first, second]).backward()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_rows_of_zeros_and_no_rows_have_a_loss_of_zero_and_no_gradient() -> None:
    for rows in (torch.zeros(3, 4), torch.zeros(0, 4)):
        rows.requires_grad_()
        loss = negative_cosine(rows, torch.ones_like(rows))
        loss.backward()
        assert loss == 0
        assert rows.grad.count_nonzero() == 0


def test_half_precision_is_widened() -> None:
    prediction, target = torch.randn(2, 5, 4).bfloat16()
    assert negative_cosine(prediction, target).dtype == torch.float32
    torch.testing.assert_close(negative_cosine(prediction, target), negative_cosine(prediction.float(), target.float()))


def test_features_are_those_before_the_projector_and_embeddings_those_after_it() -> None:
    net, batch = method(), two_views()
    assert (net.features(batch).shape, net.embeddings(batch).shape) == ((6, 8), (6, 6))


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(UserError, match=r"projector\.in_features=5, but Pooled gives 8 features"):
        SimSiam(method_runs.Pooled(), Projector(5, [8], 6), nn.Identity(), optimizer=SGD)
    with pytest.raises(UserError, match=r"predictor\.out_features=7, but Projector gives 6 features"):
        SimSiam(method_runs.Pooled(), Projector(8, [8], 6), nn.Linear(6, 7), optimizer=SGD)
    for found in ({"views": views()[:1]}, {"image": views()[0]}):
        with pytest.raises(UserError, match="SimSiam compares 2 views of each image, but the batch has"):
            method().training_step(found, 0)
