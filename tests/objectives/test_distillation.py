import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.objectives.distillation import feature_distillation, mean_squared, weight_perturbation


def tensors(*shapes: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def test_feature_distillation_worked_by_hand() -> None:
    student = [torch.tensor([1.0, 3.0]), torch.tensor([[2.0]])]
    teacher = [torch.tensor([0.0, 1.0]), torch.tensor([[5.0]])]
    assert feature_distillation(student, teacher).item() == pytest.approx(((1 + 4) / 2 + 9) / 2)


def test_every_layer_weighs_the_same_whatever_its_size() -> None:
    student, teacher = tensors((2, 3), (50, 4), seed=0), tensors((2, 3), (50, 4), seed=1)
    swapped = feature_distillation(student[::-1], teacher[::-1])
    torch.testing.assert_close(feature_distillation(student, teacher), swapped, rtol=1e-14, atol=0)
    parts = [feature_distillation([s], [t]) for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(feature_distillation(student, teacher), sum(parts) / 2, rtol=1e-14, atol=0)


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = tensors((3, 4), (4, 4), seed=0), tensors((3, 4), (4, 4), seed=1)
    total = feature_distillation(student, teacher) + weight_perturbation(student, teacher, 1e-3)
    (total + mean_squared(student[0], teacher[0])).backward()
    assert all(x.grad is None for x in teacher)
    assert all(x.grad is not None for x in student)


def test_half_precision_is_widened() -> None:
    student, teacher = torch.full((4,), 300.0).half(), torch.zeros(4).half()  # 300^2 overflows float16
    assert mean_squared(student, teacher).item() == 90_000
    assert feature_distillation([student], [teacher]).item() == 90_000
    assert weight_perturbation([student], [teacher], 1e-3).item() == pytest.approx((300 - 1e-3) ** 2, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_student_that_equals_its_teacher_owes_nothing_and_has_finite_gradients(dtype: torch.dtype) -> None:
    student, teacher = torch.ones(3, 4, dtype=dtype).requires_grad_(), torch.ones(3, 4, dtype=dtype)
    loss = feature_distillation([student], [teacher]) + weight_perturbation([student], [teacher], 0.0)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_perturbation_worked_by_hand() -> None:
    student = [torch.tensor([[1.0, -4.0]]), torch.tensor([[0.0]])]
    teacher = [torch.tensor([[1.5, -1.0]]), torch.tensor([[0.0]])]
    assert weight_perturbation(student, teacher, 0.5).item() == pytest.approx(((3 - 0.5) ** 2 + 0.5**2) / 2)


def test_perturbation_pulls_one_entry_a_layer_towards_eps_from_both_sides() -> None:
    teacher = [torch.zeros(3, 4, dtype=torch.float64)]
    for scale, sign in ((1.0, 1), (1e-3, -1)):
        (student,) = tensors((3, 4), seed=2)
        student = (student.detach() * scale).requires_grad_()
        weight_perturbation([student], teacher, 0.1).backward()
        assert student.grad is not None
        (at,) = student.grad.nonzero().tolist()
        assert at == [*divmod(int(student.abs().argmax()), 4)]
        assert torch.sign(student.grad[*at] * student[*at]) == sign


def test_gradients_are_those_of_the_formulas() -> None:
    student, teacher = tensors((3, 4), (2, 2), seed=0), [x.detach() for x in tensors((3, 4), (2, 2), seed=1)]
    assert torch.autograd.gradcheck(lambda *s: feature_distillation(s, teacher), student)
    assert torch.autograd.gradcheck(lambda *s: weight_perturbation(s, teacher, 0.1), student)


@pytest.mark.parametrize("teacher", [[], [torch.zeros(2)], [torch.zeros(2), torch.zeros(2)]])
def test_features_that_do_not_pair_are_refused(teacher: list[torch.Tensor]) -> None:
    with pytest.raises(
        UserError, match=r"student features .* and teacher features .* must be equal in number and shape"
    ):
        feature_distillation([torch.zeros(3)] if teacher else [], teacher)
