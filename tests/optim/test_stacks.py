"""A parameter [E out in] that its group calls a stack is E matrices: experts train as if each stood alone."""

import pytest
import torch
from every_preset import of_rank
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.optim import muon
from lightspan.optim.low_rank import presets
from lightspan.optim.low_rank.gradients import attach
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.parameter_summary import parameter_summary

RULES = {
    "default": LowRank,
    "galore": presets.GaLore,
    "apollo": presets.APOLLO,
    "ldadam": presets.LDAdam,
    "dct": presets.DCTAdamW,
    "trion": presets.Trion,
    "normuon": muon.NorMuon,
    "factored_muon": muon.FactoredMuon,
    "dion2": muon.Dion2,
}


def stacked(*stacks: nn.Parameter) -> list[dict]:
    return [{"params": list(stacks), "stacks": True}]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def train(optimizer: LowRank, stacks: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for number, stack in enumerate(stacks):
            stack.grad = draw(*stack.shape, seed=10 * step + number)
        optimizer.step()


@pytest.mark.sample(12)
@pytest.mark.parametrize("shape", [(6, 9, 5), (6, 5, 9), (3, 7, 7), (1, 9, 5)])
@pytest.mark.parametrize("rule", RULES)
def test_experts_train_as_matrices_of_their_own(rule, shape) -> None:
    stacks = [nn.Parameter(draw(*shape, seed=seed)) for seed in (1, 2)]
    loose = [[nn.Parameter(slice.clone()) for slice in stack.detach()] for stack in stacks]
    options = {"lr": 0.05, **of_rank(RULES[rule], 2), "weight_decay": 0.1, "max_norm": 1.0}
    together = RULES[rule](stacked(*stacks), **options)
    alone = RULES[rule]([weight for part in loose for weight in part], **options)
    for step in range(6):
        for number, (stack, part) in enumerate(zip(stacks, loose, strict=True)):
            stack.grad = None if (number, step) in {(1, 1), (0, 3)} else draw(*shape, seed=10 * step + number)
            for i, weight in enumerate(part):
                weight.grad = None if stack.grad is None else stack.grad[i].clone()
        together.step()
        alone.step()
    for stack, part in zip(stacks, loose, strict=True):
        assert torch.equal(stack, torch.stack(part))
        state = together.state[stack]
        for key, value in state.items():
            if key != "step":
                assert torch.equal(value, torch.stack([alone.state[weight][key] for weight in part]))


def test_the_experts_axis_is_never_compressed_and_the_report_says_so() -> None:
    stack, kernel = nn.Parameter(draw(64, 12, 9)), nn.Parameter(draw(64, 12, 3))
    optimizer = LowRank([*stacked(stack), {"params": [kernel]}], rank=4)
    assert parameter_summary(optimizer, stack, optimizer.param_groups[0]).how == "rank 4 of 9, each of 64"
    assert parameter_summary(optimizer, kernel, optimizer.param_groups[1]).how == "rank 4 of 36"
    train(optimizer, [stack, kernel], range(1))
    assert optimizer.state[stack]["exp_avg"].shape == (64, 12, 4)
    assert optimizer.state[kernel]["exp_avg"].shape == (64, 4)


def test_a_run_resumes_bit_for_bit() -> None:
    stacks = [nn.Parameter(draw(5, 9, 6, seed=seed)) for seed in (1, 2)]
    twins = [nn.Parameter(stack.detach().clone()) for stack in stacks]
    optimizer = LowRank(stacked(*stacks), lr=0.05, rank=2, refresh=3)
    train(optimizer, stacks, range(5))
    resumed = LowRank(stacked(*twins), lr=0.05, rank=2, refresh=3)
    resumed.load_state_dict(optimizer.state_dict())
    for stack, twin in zip(stacks, twins, strict=True):
        twin.data.copy_(stack)
    train(optimizer, stacks, range(5, 10))
    train(resumed, twins, range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(stacks, twins, strict=True))
    other = LowRank(stacked(nn.Parameter(draw(4, 9, 6)), nn.Parameter(draw(4, 9, 6))), rank=2, refresh=3)
    with pytest.raises(UserError, match=r"has frame of shape \(5, 6, 2\), but this optimiser needs \(4, 6, 2\)"):
        other.load_state_dict(optimizer.state_dict())


def test_stacks_alone_that_cannot_be_projected_are_refused() -> None:
    options = {"rank": 64, "backward": "hooks", "residual": None}
    stack = nn.Parameter(draw(4, 128, 128))
    with pytest.raises(UserError, match=r"LowRank got no matrix to project except stacks .* set backward='whole'"):
        LowRank(stacked(stack), **options)
    with pytest.raises(UserError, match=r" is not below the shorter side of any matrix \(the largest is 2\)"):
        LowRank([*stacked(stack), {"params": [nn.Parameter(draw(9, 2))]}], **options)


def test_where_stacks_cannot_be_projected_they_get_adamw() -> None:
    model = nn.Linear(9, 7).double()
    model.experts, twin = nn.Parameter(draw(8, 9, 6)), nn.Parameter(draw(8, 9, 6))
    groups = [*stacked(model.experts), {"params": [model.weight, model.bias]}]
    optimizer = LowRank(groups, lr=0.05, rank=4, residual=None, backward="hooks")
    attach(model, optimizer)
    adamw = torch.optim.AdamW([twin], lr=0.05, weight_decay=0.0, fused=True)
    for step in range(3):
        optimizer.zero_grad()
        (model(draw(4, 9, seed=step)).square().sum() + (model.experts * draw(8, 9, 6, seed=step)).sum()).backward()
        twin.grad = model.experts.grad.clone()
        optimizer.step()
        adamw.step()
    assert torch.equal(model.experts, twin)
    assert parameter_summary(optimizer, model.experts, optimizer.param_groups[0]).how.startswith(
        "AdamW: a stack of matrices"
    )
