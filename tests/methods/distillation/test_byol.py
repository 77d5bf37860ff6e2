"""BYOL: the loss by hand and against lightly's, what reaches the teacher, and schedules."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import batch, fit
from torch import Tensor, nn

from lightspan.backbones.vision import SmallConvNet
from lightspan.core.errors import UserError
from lightspan.methods.distillation.byol import BYOL
from lightspan.nn.heads.projector import Projector
from lightspan.objectives.prediction import prediction_distance
from lightspan.optim.schedules import cosine_between

BATCHES = [batch(seed=seed, locals_=0) for seed in range(4)]


def method(norms: bool = True, **settings: Any) -> BYOL:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh())
    backbone = SmallConvNet(width=4, stages=2) if norms else plain
    projector, predictor = (Projector(8, [6], 8) if norms else nn.Linear(8, 8) for _ in range(2))
    given = {"momentum": 0.5, "optimizer": partial(torch.optim.SGD, lr=0.1)}
    return BYOL(backbone, projector, predictor, **given | settings)


def rows(seed: int) -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)).double()


def test_the_distance_is_the_squared_one_of_rows_at_unit_length_and_blind_to_their_length() -> None:
    guess, target = rows(0).requires_grad_(), rows(1)
    by_hand = (guess / guess.norm(dim=1, keepdim=True) - target / target.norm(dim=1, keepdim=True)).square().sum(dim=1)
    torch.testing.assert_close(prediction_distance(guess, target), by_hand.mean())
    torch.testing.assert_close(prediction_distance(3 * guess, target / 7), by_hand.mean())
    assert prediction_distance(target, target).item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.gradcheck(prediction_distance, (guess, target))


def test_the_distance_is_lightlys_negative_cosine_up_to_two_numbers() -> None:
    loss = pytest.importorskip("lightly.loss").NegativeCosineSimilarity()
    torch.testing.assert_close(prediction_distance(rows(0), rows(1)), 2 + 2 * loss(rows(0), rows(1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_zeros_and_no_rows_have_a_finite_distance_and_gradient(dtype: torch.dtype) -> None:
    for guess, expected in ((torch.zeros(3, 4), 2.0), (torch.zeros(0, 4), 0.0)):
        given = guess.to(dtype).requires_grad_()
        loss = prediction_distance(given, torch.ones_like(given))
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.item() == expected
        assert given.grad is not None
        assert given.grad.isfinite().all()


def test_the_loss_is_symmetric_and_put_together_from_both_views() -> None:
    model, given = method(norms=False), batch(locals_=0)
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(0.1)
    (first, second), teacher = given["views"], model.teacher.module
    expected = prediction_distance(model.predictor(model.student(first)), teacher(second))
    expected = expected + prediction_distance(model.predictor(model.student(second)), teacher(first))
    loss = model.training_step(given, 0)
    torch.testing.assert_close(loss, expected)
    swapped = given | {"views": [second, first]}
    torch.testing.assert_close(model.training_step(swapped, 0), loss)


def test_gradients_reach_the_student_and_not_the_teacher() -> None:
    model = method()
    model.training_step(batch(locals_=0), 0).backward()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert all(parameter.grad is not None for parameter in (*model.student.parameters(), *model.predictor.parameters()))


def test_the_teacher_normalises_by_its_own_batch() -> None:
    model, given = method(), batch(locals_=0)
    before = [buffer.clone() for buffer in model.teacher.buffers()]
    model.training_step(given, 0)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.teacher.buffers(), strict=True))
    model.eval()
    assert torch.equal(model.features({"image": given["views"][0]}), model.features(given))


def test_the_teacher_is_the_recursion_of_the_papers_momentum(tmp_path: Path) -> None:
    model = method(norms=False)
    expected, students = [p.detach().clone() for p in model.student.parameters()], []
    following = model.after_optimizer_step

    def watched() -> None:
        students.append([p.detach().clone() for p in model.student.parameters()])
        following()

    model.after_optimizer_step = watched  # type: ignore[method-assign]
    fit(model, BATCHES, tmp_path)
    for step, student in enumerate(students):
        tau = cosine_between(0.5, 1.0, step / 4)
        expected = [tau * mean + (1 - tau) * p for mean, p in zip(expected, student, strict=True)]
    assert len(students) == 4
    for mean, parameter in zip(expected, model.teacher.parameters(), strict=True):
        torch.testing.assert_close(parameter, mean)


def test_bad_settings_and_batches_are_refused() -> None:
    with pytest.raises(UserError, match=r"momentum=1.5 must lie in \[0, 1\]"):
        method(momentum=1.5)
    backbone = SmallConvNet(width=4, stages=2)
    with pytest.raises(UserError, match=r"projector.in_features=5, but SmallConvNet gives 8"):
        BYOL(backbone, nn.Linear(5, 8), nn.Linear(8, 8), optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match=r"predictor.out_features=7, but Linear gives 8"):
        BYOL(backbone, nn.Linear(8, 8), nn.Linear(8, 7), optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match=r"BYOL needs 2 views of each image, and this batch gives 5"):
        method().training_step(batch(), 0)
