"""What comes first in a forward and a backward pass is named first, with the numbers that it came from."""

import pytest
import torch
from torch import Tensor, nn

from lightspan.replay.findings import Findings, described


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
    assert not any(part._forward_hooks for part in net.modules())


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
