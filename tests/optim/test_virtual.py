"""Steps that are undone: what they restore, what they do not count as, and the mean of several networks."""

from functools import partial

import pytest
import torch
from torch import nn

from lightspan.optim.steps import steps_taken
from lightspan.optim.virtual import copies, copy_into, mean_weights, rolled_back, step_on, tensors_of, virtual_steps


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(torch.randn(6, 3, generator=torch.Generator().manual_seed(1))).square().mean()


@pytest.mark.parametrize("kind", [partial(torch.optim.SGD, lr=0.1, momentum=0.9), partial(torch.optim.AdamW, lr=0.1)])
def test_a_run_with_undone_steps_is_the_run_without_them(kind) -> None:
    ends = []
    for looks in (0, 3):
        model = network()
        optimizer = kind(model.parameters())
        for _ in range(3):
            with rolled_back(model), virtual_steps(optimizer):
                for _ in range(looks):
                    step_on(loss_of(model), optimizer)
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
        ends.append(copies(model))
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


def test_an_undone_step_is_the_optimisers_own() -> None:
    model, other = network(), network()
    optimizer, twin = (torch.optim.Adam(each.parameters(), lr=0.1) for each in (model, other))
    loss_of(other).backward()
    twin.step()
    before = copies(model)
    with rolled_back(model), virtual_steps(optimizer):
        step_on(loss_of(model), optimizer)
        assert all(torch.equal(*pair) for pair in zip(copies(model), copies(other), strict=True))
    assert all(torch.equal(*pair) for pair in zip(copies(model), before, strict=True))


def test_they_do_not_count_and_leave_gradients_alone() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    taken = steps_taken(optimizer)
    loss_of(model).backward()
    before = [p.grad for p in model.parameters()]
    with virtual_steps(optimizer):
        step_on(loss_of(model), optimizer)
    assert steps_taken(optimizer) == taken
    assert all(p.grad is old for p, old in zip(model.parameters(), before, strict=True))
    optimizer.step()
    assert steps_taken(optimizer) == taken + 1


def test_an_error_inside_undoes_too() -> None:
    model = network()
    before = copies(model)
    with pytest.raises(RuntimeError, match="stop"), rolled_back(model):  # noqa: PT012
        copy_into(tensors_of(model), [torch.zeros_like(tensor) for tensor in tensors_of(model)])
        raise RuntimeError("stop")
    assert all(torch.equal(*pair) for pair in zip(copies(model), before, strict=True))


def test_a_soup_of_equal_branches_is_the_branch_bit_for_bit_and_of_others_their_mean() -> None:
    one = [torch.randn(50), torch.randn(3, 4)]
    for count in (1, 3, 7):
        assert all(torch.equal(*pair) for pair in zip(mean_weights([one] * count), one, strict=True))
    others = [[torch.randn(50, dtype=torch.float64)] for _ in range(3)]
    torch.testing.assert_close(mean_weights(others)[0], torch.stack([branch[0] for branch in others]).mean(dim=0))
