"""AdamW of what is not projected: in few kernels, whatever the precision, with noise that no two numbers share."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightspan.core.sharded import square_norms
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.matrices import elementwise
from lightspan.optim.matrices.moments import BFloat16Moments, Int8Moments


class Counted(TorchDispatchMode):
    """Counts operations on tensors; views cost nothing."""

    VIEWS = (
        "view",
        "split",
        "detach",
        "alias",
        "t.",
        "transpose",
        "as_strided",
        "reshape",
        "unbind",
        "select",
        "slice",
        "promote_types",
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::")
        if not any(view in name for view in self.VIEWS):
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


def vectors(count: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(7 + i % 5, generator=generator).to(dtype)) for i in range(count)]


def give(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def plain(parameters: list[nn.Parameter], **options) -> LowRank:
    return LowRank([{"params": parameters, "project": False}], **{"lr": 0.05, **options})


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_more_parameters_cost_no_more_kernels(dtype, max_norm) -> None:
    calls = []
    for count in (4, 40):
        parameters = vectors(count, dtype)
        optimizer = plain(parameters, max_norm=max_norm)
        for step in range(2):
            give(parameters, step)
            if step == 0:
                optimizer.step()
        with Counted() as counted:
            optimizer.step()
        calls.append(counted.calls)
    assert calls[0] == calls[1]
    assert sum(calls[0].values()) <= 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_step_together_as_they_step_alone_but_for_rounding(dtype, monkeypatch) -> None:
    sides = []
    for longest in (1 << 22, 20, 1):  # all at once, a few at a time, one by one
        monkeypatch.setattr(elementwise, "LONGEST_RUN", longest)
        parameters = [
            *vectors(6, dtype),
            nn.Parameter(torch.randn(3, 4).to(dtype)),
            nn.Parameter(torch.tensor(1.0, dtype=dtype)),
        ]
        with torch.no_grad():
            parameters[6].copy_(torch.arange(12).view(3, 4))
        optimizer = plain(parameters, max_norm=0.5, weight_decay=0.1)
        for step in range(4):
            give(parameters, step)
            optimizer.step()
        sides.append((parameters, [optimizer.state[p] for p in parameters]))
    for parameters, states in sides[1:]:
        for p, q, state, other in zip(parameters, sides[0][0], states, sides[0][1], strict=True):
            torch.testing.assert_close(p, q, atol=0.07, rtol=0.02)
            for key in ("exp_avg", "exp_avg_sq", "step"):  # roundings of weights are no part of them
                torch.testing.assert_close(state[key], other[key])


def test_gradients_are_clipped_in_float32_and_left_as_they_are() -> None:
    parameters = vectors(3, torch.bfloat16)
    wide = [nn.Parameter(p.detach().float()) for p in parameters]
    give(parameters, 0)
    for p, q in zip(parameters, wide, strict=True):
        q.grad = p.grad.float()
    before = [p.grad.clone() for p in parameters]
    optimizer = plain(parameters, max_norm=0.37)
    optimizer.step()
    plain(wide, max_norm=0.37).step()
    reference = plain(wide, max_norm=0.37)
    reference.step()
    for p, q, gradient in zip(parameters, wide, before, strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], reference.state[q]["exp_avg"])
        assert torch.equal(p.grad, gradient)


@pytest.mark.parametrize("moments", [None, BFloat16Moments(), Int8Moments()])
def test_no_two_parameters_or_steps_round_with_one_seed(moments, monkeypatch) -> None:
    seeds: list[int] = []
    kept: Callable = elementwise.stochastic_round
    monkeypatch.setattr(elementwise, "stochastic_round", lambda x, seed: (seeds.append(int(seed)), kept(x, seed))[1])
    monkeypatch.setattr(elementwise, "LONGEST_RUN", 1)
    monkeypatch.setattr(elementwise, "SMALLEST_QUANTISED", 9)
    parameters = vectors(12, torch.bfloat16)
    groups = [{"params": part, "project": False} for part in (parameters[:5], parameters[5:])]
    for seed in (0, 1):
        optimizer = LowRank(groups, **({"moments": moments} if moments else {}), seed=seed)
        for step in range(6):
            give(parameters, step)
            if step == 2:
                parameters[0].grad = None
            optimizer.step()
    assert len(seeds) == 2 * (12 * 6 - 1)
    assert len(set(seeds)) == len(seeds)


def test_one_number_of_each_parameter_is_rounded_up_as_often_as_chance_has_it() -> None:
    """Equal weights and updates: noise shared between parameters or steps would round them alike."""
    parameters = [nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(400)]
    optimizer = plain(parameters, lr=0.003, betas=(0.0, 0.999))  # a step of 3/4 of a unit below one
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = torch.stack([(p.detach() < 1).float() for p in parameters])
    assert 0.68 < moved.mean() < 0.86
    assert len({tuple(row.tolist()) for row in moved}) > 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_square_norms_of_many_tensors_are_those_of_each(dtype) -> None:
    tensors: list[Tensor] = [torch.randn(s).to(dtype) for s in ((5,), (3, 4), (), (0,))] + [
        torch.randn(3, dtype=torch.float64)
    ]
    wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    wanted = sorted(float(torch.linalg.vector_norm(t)) ** 2 for t in wide)
    assert sorted(square_norms(tensors).tolist()) == pytest.approx(wanted, rel=1e-5)
    assert square_norms([]).tolist() == []
