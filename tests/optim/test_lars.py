"""LARS: the paper's algorithm by hand, what it leaves alone, its state, groups, shards, and degenerate weights."""

import copy
from pathlib import Path

import pytest
import rank_processes
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightspan.core.distributed import end_process_group
from lightspan.core.errors import UserError
from lightspan.optim.groups import ParameterGroups
from lightspan.optim.lars import LARS


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def give_gradients(model: nn.Module, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def by_hand(model: nn.Module, steps: int, lr: float, momentum: float, decay: float, trust: float) -> list[Tensor]:
    """One number after the other: vectors without decay and without a ratio."""
    weights = [p.detach().clone() for p in model.parameters()]
    held = [torch.zeros_like(w) for w in weights]
    for step in range(steps):
        give_gradients(model, step)
        for w, v, p in zip(weights, held, model.parameters(), strict=True):
            u = p.grad + decay * w if w.ndim > 1 else p.grad
            ratio = trust * w.norm() / u.norm() if w.ndim > 1 else 1.0
            v.copy_(momentum * v + lr * (1 + step) * ratio * u)  # a rate that rises: it stands inside the momentum
            w -= v
    return weights


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, lr: float = 0.3) -> None:
    for step in steps:
        give_gradients(model, step)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + step)
        optimizer.step()


def test_steps_are_those_of_the_paper_with_the_groups_of_a_method() -> None:
    model, reference = net(), net()
    optimizer = ParameterGroups().optimizer(model, lambda groups: LARS(groups, lr=0.3, weight_decay=0.1, trust=0.02))
    assert {group["name"]: group["weight_decay"] for group in optimizer.param_groups} == {"matrices": 0.1, "vectors": 0}
    train(model, optimizer, range(5))
    for p, expected in zip(model.parameters(), by_hand(reference, 5, 0.3, 0.9, 0.1, 0.02), strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)


def test_a_matrix_moves_by_the_same_share_of_its_length_whatever_the_scale_of_its_gradient() -> None:
    for scale in (1e-3, 1.0, 1e3):
        model = net()
        before = [p.detach().clone() for p in model.parameters()]
        give_gradients(model, 0, scale)
        LARS(model.parameters(), lr=1.0, trust=0.01).step()
        for p, old in zip(model.parameters(), before, strict=True):
            moved = (p.detach() - old).norm()
            expected = 0.01 * old.norm() if p.ndim > 1 else p.grad.norm()
            torch.testing.assert_close(moved, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_copy_and_a_loaded_state_go_on_as_the_original_does(dtype: torch.dtype) -> None:
    model = net(dtype)
    optimizer = LARS(model.parameters(), lr=0.3, weight_decay=0.1)
    train(model, optimizer, range(3))
    twin, other = copy.deepcopy((model, optimizer))
    third_model = copy.deepcopy(model)
    loaded = LARS(third_model.parameters(), lr=9.0)
    loaded.load_state_dict(optimizer.state_dict())
    for net_, steps in ((model, optimizer), (twin, other), (third_model, loaded)):
        train(net_, steps, range(3, 6))
    for a, b, c in zip(model.parameters(), twin.parameters(), third_model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_weights_or_gradients_of_zero_tiny_or_huge_numbers_stay_finite() -> None:
    for weight, gradient in (
        (0.0, 1.0),
        (1.0, 0.0),
        (0.0, 0.0),
        (1e-30, 1.0),
        (1.0, 1e-30),
        (1.0, 1e30),
        (1e-30, 1e-30),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            p = nn.Parameter(torch.full((4, 3), weight, dtype=dtype))
            optimizer = LARS([p], lr=0.5, trust=0.1)
            for _ in range(3):
                p.grad = torch.full_like(p, gradient)
                optimizer.step()
            assert p.isfinite().all()
            assert optimizer.state[p]["momentum_buffer"].dtype == torch.float32
            if weight and gradient:  # no leap: three steps of a tenth of 0.5, at most
                assert (p - weight).abs().max() <= weight
    still = nn.Parameter(torch.ones(2, 2))
    LARS([still], lr=1.0, weight_decay=0.1).step()
    assert torch.equal(still, torch.ones(2, 2))  # without a gradient


@pytest.mark.parametrize(
    "bad", [{"lr": -1.0}, {"lr": float("nan")}, {"momentum": 1.0}, {"weight_decay": -0.1}, {"trust": -1.0}]
)
def test_settings_out_of_range_are_refused_wherever_they_are_given(bad: dict[str, float]) -> None:
    (name,) = bad
    for make in (
        lambda: LARS(net().parameters(), **{"lr": 0.1} | bad),
        lambda: LARS([{"params": list(net().parameters()), **bad}], lr=0.1),
    ):
        with pytest.raises(UserError, match=rf"LARS {name}=.* must be in \[0, "):
            make()


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(UserError, match="sparse=False"):
        LARS(table.parameters(), lr=0.1).step()


def sharded(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model = net()
    whole = dict(model.named_parameters())
    parts = {name: nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for name, p in whole.items()}
    optimizer = LARS(parts.values(), lr=0.3, weight_decay=0.1, trust=0.02)
    for step in range(4):
        give_gradients(model, step)
        for name, p in parts.items():
            p.grad = distribute_tensor(whole[name].grad, mesh, [Shard(0)])
        optimizer.step()
    reference = net()
    train_plain = LARS(reference.parameters(), lr=0.3, weight_decay=0.1, trust=0.02)
    for step in range(4):
        give_gradients(reference, step)
        train_plain.step()
    for name, p in reference.named_parameters():
        torch.testing.assert_close(parts[name].detach().full_tensor(), p.detach(), rtol=1e-12, atol=1e-14)
        assert isinstance(optimizer.state[parts[name]]["momentum_buffer"], DTensor)
    end_process_group()


@pytest.mark.ranks
def test_sharded_parameters_take_the_steps_of_whole_ones(tmp_path: Path) -> None:
    rank_processes.start(sharded, 2, str(tmp_path))
