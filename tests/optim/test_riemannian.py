"""Riemannian SGD beside another optimiser: the published step, one state for both, resuming, and what it refuses."""

import copy
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rank_processes
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightspan.core.distributed import end_process_group
from lightspan.core.errors import UserError
from lightspan.nn.heads.grassmann_head import GrassmannHead
from lightspan.optim.groups import ParameterGroups, Rule
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.riemannian import RiemannianSGD
from lightspan.subspaces.grassmann import principal_angles

REST = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), GrassmannHead(6, 3, 2, scale=5.0)).double()


def made(model: nn.Module, groups: ParameterGroups | None = None, **settings: Any) -> RiemannianSGD:
    optimizer = (groups or ParameterGroups()).optimizer(model, partial(RiemannianSGD, **{"rest": REST} | settings))
    assert isinstance(optimizer, RiemannianSGD)
    return optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 5, generator=generator).double(), torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_a_step_is_the_published_one_by_svd_and_the_next_carries_the_projected_momentum() -> None:
    frame = nn.Parameter(torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64)).Q)
    optimizer, expected, momentum = RiemannianSGD([frame], lr=0.3), frame.detach().clone(), torch.zeros(6, 2).double()
    for seed in range(3):
        frame.grad = torch.randn(6, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        s = expected
        momentum = 0.9 * momentum + frame.grad
        momentum = momentum - s @ s.T @ momentum
        u, sigma, vt = torch.linalg.svd(momentum, full_matrices=False)
        expected = (s @ vt.T * (0.3 * sigma).cos() - u * (0.3 * sigma).sin()) @ vt
        optimizer.step()
        torch.testing.assert_close(frame.detach(), expected)


@pytest.mark.parametrize("retraction", ["geodesic", "qr"])
def test_frames_stay_orthonormal_the_loss_falls_and_the_rest_trains_as_by_itself(retraction: str) -> None:
    model = net()
    optimizer = made(model, lr=0.2, retraction=retraction)
    x, y = torch.randn(64, 5).double(), torch.arange(64) % 3
    before = nn.functional.cross_entropy(model(x), y)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    assert loss < before - 0.1
    frame = model[2].frame_KFR.detach()
    assert (frame.mT @ frame - torch.eye(2)).abs().max() < 1e-12
    # With frames that do not move, the other parameters take the steps of their own optimiser.
    fixed, alone = net(), net()
    alone[2].requires_grad_(False)
    train(fixed, made(fixed, lr=0.0), range(4))
    train(alone, ParameterGroups().optimizer(alone, REST), range(4))
    torch.testing.assert_close(fixed[0].weight, alone[0].weight, rtol=1e-12, atol=0)


def test_both_retractions_go_the_same_way_at_first() -> None:
    moved = []
    for retraction in ("geodesic", "qr"):
        model = net()
        train(model, made(model, lr=1e-4, retraction=retraction), range(3))
        moved.append(model[2].frame_KFR.detach())
    start = net()[2].frame_KFR.detach()
    assert principal_angles(moved[0], moved[1]).max() < 1e-3 * principal_angles(moved[0], start).max()


@pytest.mark.parametrize("rest", [REST, partial(torch.optim.AdamW, lr=0.01)])
def test_a_saved_run_continues_bit_for_bit_and_so_does_a_copy(rest: Any, tmp_path: Any) -> None:
    straight, halfway = net(), net()
    optimizer = made(straight, rest=rest)
    train(straight, optimizer, range(7))
    first = made(halfway, rest=rest)
    train(halfway, first, range(4))
    torch.save([halfway.state_dict(), first.state_dict()], tmp_path / "saved.pt")
    weights, state = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed = net(9)
    resumed.load_state_dict(weights)
    second = made(resumed, rest=rest)
    second.load_state_dict(state)
    train(resumed, second, range(4, 7))
    both = copy.deepcopy({"net": halfway, "optimizer": first})
    train(both["net"], both["optimizer"], range(4, 7))
    for other in (resumed, both["net"]):
        assert all(map(torch.equal, straight.parameters(), other.parameters()))


def test_schedules_and_rules_act_on_all_groups() -> None:
    model = net()
    rules = [Rule(match=["*frame*"], lr_scale=0.5), Rule(match=["0.bias"], lr_scale=0.1)]
    optimizer = made(model, ParameterGroups(rules=rules), lr=0.2)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"matrices": 0.1, "vectors-lr0.1": 0.01, "frames-lr0.5": 0.1})
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(2))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-15)
    assert optimizer.rest is not None
    assert all(group["lr"] == 0 for group in optimizer.rest.param_groups)


def test_degenerate_gradients() -> None:
    frame = nn.Parameter(torch.linalg.qr(torch.randn(4, 6, 2)).Q)
    start = frame.detach().clone()
    optimizer = RiemannianSGD([frame], lr=0.5, orthonormalise_every=1)
    optimizer.step()  # no gradient
    assert torch.equal(frame, start)
    assert not optimizer.state
    for gradient in (torch.zeros(4, 6, 2), start.clone(), torch.full((4, 6, 2), 1e-30), torch.full((4, 6, 2), 1e15)):
        frame.grad = gradient
        optimizer.step()
        assert frame.isfinite().all()
        assert (frame.mT @ frame - torch.eye(2)).abs().max() < 1e-5
    kept = frame.detach().clone()
    frame.grad = torch.full((4, 6, 2), torch.nan)
    with pytest.raises(UserError, match="gradient of a frame is not finite; nothing was changed"):
        optimizer.step()
    assert torch.equal(frame, kept)


def one_rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2)
    mesh, out = init_device_mesh("cpu", (2,)), {}
    for count in (3, 1):  # of one frame a rank has none
        frames, gradients = draws(count)
        frame = nn.Parameter(distribute_tensor(frames, mesh, [Shard(0)]))
        optimizer = RiemannianSGD([frame], lr=0.1)
        for gradient in gradients:
            frame.grad = distribute_tensor(gradient, mesh, [Shard(0)])
            optimizer.step()
        out[str(count)] = frame.detach().full_tensor()
        frame.grad = distribute_tensor(torch.full_like(frames, torch.nan), mesh, [Shard(0)])
        with pytest.raises(UserError, match="not finite"):
            optimizer.step()
    with pytest.raises(UserError, match="split over ranks along its columns"):
        RiemannianSGD([nn.Parameter(distribute_tensor(frames[0], mesh, [Shard(0)]))])
    with pytest.raises(UserError, match=r"frames \[1, 6, 2\] are split over ranks along axis 1, and a step needs"):
        RiemannianSGD([nn.Parameter(distribute_tensor(frames, mesh, [Shard(1)]))])
    torch.save(out, Path(folder, f"{index}.pt"))
    end_process_group()


def draws(count: int) -> tuple[Tensor, list[Tensor]]:
    drawn = [
        torch.randn(count, 6, 2, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in range(7)
    ]
    return torch.linalg.qr(drawn[0]).Q, drawn[1:]


@pytest.mark.ranks
def test_frames_that_are_sharded_step_where_they_are(tmp_path: Path) -> None:
    rank_processes.start(one_rank, 2, str(tmp_path))
    for count in (3, 1):
        frames, gradients = draws(count)
        frame = nn.Parameter(frames.clone())
        optimizer = RiemannianSGD([frame], lr=0.1)
        for gradient in gradients:
            frame.grad = gradient
            optimizer.step()
        for index in range(2):
            stepped = torch.load(tmp_path / f"{index}.pt", weights_only=True)[str(count)]
            torch.testing.assert_close(stepped, frame.detach(), rtol=1e-12, atol=1e-12)


def own(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [nn.Parameter(torch.ones(*shape, dtype=dtype))]


@pytest.mark.parametrize(
    ("params", "settings", "said"),
    [
        (own(6, 2), {"lr": -1.0}, "lr=-1.0 must be at least 0"),
        (own(6, 2), {"momentum": 1.0}, "momentum=1.0 in"),
        (own(6, 2), {"orthonormalise_every": 0}, "orthonormalise_every=0 at least 1"),
        (own(2, 6), {}, r"R of at most N, but one is \[2, 6\]"),
        (own(6), {}, r"one is \[6\]"),
        (own(6, 2, dtype=torch.bfloat16), {}, "bfloat16 is orthonormal to two digits.*bf16-mixed"),
        ([{"params": own(6, 2)}], {}, "got no frames"),
        ([{"params": own(6, 2), "frames": True}, {"params": own(3)}], {}, "name the optimiser of the other parameters"),
        (
            [{"params": own(6, 2), "frames": True}, {"params": own(9, 8)}],
            {"rest": partial(LowRank, rank=2)},
            "cannot keep the state of LowRank",
        ),
    ],
)
def test_what_it_cannot_step_is_refused(params: list[Any], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        RiemannianSGD(params, **settings)
