"""What comes first in a forward and a backward pass is named first, with the numbers that it came from."""

from collections import UserDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightspan.cli.replay.findings import Findings, described


class Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.log()


class Root(nn.Module):
    """Its value at 0 is finite, its slope is not."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu().sqrt()


class Negative(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x.square() - 1


def found_in(net: nn.Module, x: Tensor, loss=lambda y: y.sum()) -> list:
    findings = Findings(net)
    findings.look_at_weights()
    findings.look_at_batch({"x": x})
    with torch.autograd.set_detect_anomaly(True, check_nan=False), findings:
        value = loss(net(x))
        findings.look_at_loss(value)
        value.backward()
    findings.look_at_gradients()
    return findings.found


def linear(*widths: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(*widths)


def test_the_innermost_module_whose_inputs_are_finite_is_first():
    net = nn.Sequential(linear(3, 4), nn.Sequential(Negative(), Log()), linear(4, 2))
    first, *later = found_in(net, torch.ones(2, 3))
    assert first.what == "the output of 1.1 (Log)"
    assert first.details[0].startswith("input [0][0]: float32 [2, 4] from -")
    assert first.details[-1] == "output: float32 [2, 4], 8 NaN of 8"
    # The one around it has finite inputs too; what comes after it has not.
    assert [one.what for one in later] == ["the output of 1 (Sequential)"]


def test_weights_come_before_everything():
    net = nn.Sequential(linear(3, 3), nn.BatchNorm1d(3))
    net[1].running_var[0] = torch.inf
    with torch.no_grad():
        net[0].weight[1, 2] = torch.nan
    parameter, buffer, *_ = found_in(net, torch.ones(2, 3))
    assert parameter.what == "parameter 0.weight, before the step,"
    assert parameter.details[0].endswith("1 NaN of 9")
    assert buffer.what == "buffer 1.running_var, before the step,"


def test_a_batch_comes_before_modules():
    x = torch.ones(2, 3)
    x[0, 0] = torch.inf
    first = found_in(linear(3, 3), x)[0]
    assert first.what == "the batch['x']"
    assert first.details == ["batch['x']: float32 [2, 3] from 1 to 1, 1 infinite of 6"]


def test_a_loss_alone_is_said_to_be_computed_after_the_modules():
    (first,) = found_in(linear(3, 2), torch.ones(2, 3), loss=lambda y: (y - y).sum().log())
    assert first.what == "the loss, though the outputs of all modules are finite,"


@dataclass
class Boxed:
    x: Tensor
    rest: Any = None


class Unboxed(nn.Linear):
    def forward(self, given: Any) -> Tensor:
        given = given[0] if isinstance(given, tuple) else given
        return super().forward(given.x if isinstance(given, Boxed) else given["x"])


class Glued(nn.Module):
    """What is computed between its modules gives NaN."""

    def __init__(self, glue, last: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b, self.glue = linear(3, 4), last or linear(4, 2), glue

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.glue(self.a(x)))


class Block(nn.Module):
    """Glue before its own first module, or with `late` after it: a residual sum that overflows."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.inner, self.late = linear(4, 2), late

    def forward(self, h: Tensor) -> Tensor:
        return self.inner(h) / 0 if self.late else self.inner(h - h.exp().log() / 0 * 0)


def zero(h: Tensor) -> Tensor:
    return h / (h.sum() - h.sum()) * 0


def test_numbers_that_break_between_two_modules_are_named_by_the_input_of_the_second():
    glues = [
        lambda h: zero(h),
        lambda h: h.mul_(torch.nan),  # in place
        lambda h: h.detach() * torch.nan,
        lambda h: h + h * torch.inf * 0,  # a residual sum
    ]
    boxes = [Boxed, lambda x: {"x": x}, lambda x: UserDict(x=x), lambda x: (Boxed(x),), lambda x: Boxed(x, {"y": [x]})]
    nets = [Glued(glue) for glue in glues]
    nets += [Glued(lambda h, box=box: box(zero(h)), Unboxed(4, 2)) for box in boxes]
    for net in nets:
        first, *later = found_in(net, torch.ones(2, 3))
        assert first.what.startswith("the input of b (")
        assert first.details[0] == "the output of a was finite: look between them"
        assert later == []  # what follows is explained
    lines = found_in(Glued(zero), torch.ones(2, 3))[0].details
    assert "test_findings.py" in lines[1]
    assert lines[1].endswith("return h / (h.sum() - h.sum()) * 0")
    assert lines[-1] == "input [0][0]: float32 [2, 4], 8 NaN of 8"


def test_numbers_that_break_inside_a_module_between_its_parts_are_named_there():
    early, late = (found_in(Glued(lambda h: h, Block(late)), torch.ones(2, 3))[0] for late in (False, True))
    assert (early.what, early.details[0]) == (
        "the input of b.inner (Linear)", "the input of b was finite: look between them",
    )  # fmt: skip
    assert late.what == "the output of b (Block)"


def test_numbers_that_break_before_the_first_module_or_after_the_last_are_named_with_their_line():
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x * torch.nan)

    (before,) = found_in(Step(), torch.ones(2, 3))
    assert (before.what, before.details[0]) == (
        "the input of net (Linear)", "the batch was finite: look between them",
    )  # fmt: skip
    (after,) = found_in(nn.Sequential(linear(3, 2)), torch.ones(2, 3), lambda y: y.sum() / 0 * 0)
    assert after.details[0] == "the output of 0 was finite: look between them"
    assert after.details[1].endswith("y.sum() / 0 * 0)")


def test_a_module_that_changes_its_finite_input_in_place_is_named_itself():
    class InPlace(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h.log_()

    net = nn.Sequential(linear(3, 4), Negative(), InPlace())
    assert found_in(net, torch.ones(2, 3))[0].what == "the output of 2 (InPlace)"


def test_masks_of_minus_infinity_are_no_finding_and_hide_none():
    class Masked(nn.Module):
        def __init__(self, glue) -> None:
            super().__init__()
            self.attend, self.after, self.glue = Scores(), Scores(), glue

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.after(self.glue(self.attend(x, mask)), mask[None])

    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = linear(3, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return (self.score(x) + mask).softmax(dim=-1)

    class Whole(nn.Module):
        def __init__(self, glue) -> None:
            super().__init__()
            self.net = Masked(glue)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x, torch.tensor([0.0, 0.0, -torch.inf]))

    class Counts(nn.Module):
        def forward(self, h: Tensor) -> int:
            return len(h)

    counted = Glued(lambda h: zero(h))
    counted.counts = Counts()
    counted.glue = lambda h: (h := zero(h), counted.counts(h))[0]
    assert found_in(counted, torch.ones(2, 3))[0].what == "the input of b (Linear)"
    assert found_in(Whole(lambda h: h), torch.ones(2, 3)) == []
    assert found_in(Whole(zero), torch.ones(2, 3))[0].what == "the input of net.after (Scores)"


@pytest.mark.parametrize("depth", [1, 2])
def test_a_backward_pass_names_operation_module_and_line(depth):
    net = nn.Sequential(linear(3, 4), Negative(), *(nn.Sequential(Root()) for _ in range(depth)), linear(4, 2))
    first = found_in(net, torch.ones(2, 3))[0]
    assert first.what == f"the gradient behind SqrtBackward0 of {1 + depth}.0"
    assert "test_findings.py" in first.details[-1]
    assert "x.relu().sqrt()" in first.details[-1]


def test_a_gradient_whose_square_overflows_is_named():
    net = linear(1, 1)
    (first,) = found_in(net, torch.full((1, 1), 1e25), loss=lambda y: (y * 1e-3).sum())
    assert first.what == "the square of the gradient of weight"


def test_a_finite_step_has_no_finding_and_leaves_no_hook():
    net = nn.Sequential(linear(3, 4), nn.ReLU(), linear(4, 2))
    assert found_in(net, torch.ones(2, 3)) == []
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.tensor([1.0, -2.0]), "x: float32 [2] from -2 to 1"),
        (torch.tensor([torch.nan, torch.inf, 3.0]), "x: float32 [3] from 3 to 3, 1 NaN and 1 infinite of 3"),
        (torch.full((2,), torch.nan, dtype=torch.bfloat16), "x: bfloat16 [2], 2 NaN of 2"),
        (torch.tensor([3, -1]), "x: int64 [2] from -1 to 3"),
        (torch.tensor([1 - 2j, complex(torch.inf, 0)]), "x: complex64 [2] from -2 to 1, 1 infinite of 4"),
        (torch.tensor([True]), "x: bool [1] from 1 to 1"),
        (torch.zeros(0, 2), "x: float32 [0, 2], empty"),
    ],
)
def test_numbers_are_described_in_one_line(tensor, said):
    assert described("x", tensor) == said
