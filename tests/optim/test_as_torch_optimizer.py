"""What holds for every torch.optim.Optimizer holds for LowRank: copies, pickles, hooks, loading, groups, gradients of
all kinds.
"""

import copy
import pickle
from functools import partial

import pytest
import torch
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lightspan.core.errors import UserError
from lightspan.optim.low_rank import presets
from lightspan.optim.low_rank.gradients import attach
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.matrices.moments import BFloat16Moments, Int8Moments


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 6, bias=False)

    def forward(self, x):
        return self.second(self.norm(self.first(x)).tanh())


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def make(model: nn.Module, **options) -> LowRank:
    return LowRank(model.named_parameters(), **{"lr": 0.05, "rank": 3, "refresh": 3, **options})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(4)) -> None:
    for step in steps:
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(5, 8, generator=generator).to(next(model.parameters()).dtype)
        model(x).square().mean().backward()
        optimizer.step()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def rate(step: int) -> float:
    return 1 / (1 + step)


# Copies


def copied(model, optimizer):
    return copy.deepcopy((model, optimizer))


def pickled(model, optimizer):
    return pickle.loads(pickle.dumps((model, optimizer)))


@pytest.mark.parametrize("way", [copied, pickled])
@pytest.mark.parametrize("when", ["before the first step", "after steps"])
def test_a_copy_steps_the_copied_model_and_leaves_the_original_alone(way, when) -> None:
    model = net()
    optimizer = make(model, weight_decay=0.1, max_norm=0.5, moments=BFloat16Moments())
    scheduler = LambdaLR(optimizer, rate)  # patches optimizer.step with a closure on the original
    optimizer.register_step_post_hook(lambda *_: None)  # cannot be pickled
    if when == "after steps":
        train(model, optimizer)
        scheduler.step()
    twin, other = way(model, optimizer)
    before = weights(model)
    train(twin, other, range(4, 8))
    assert equal(weights(model), before)
    train(model, optimizer, range(4, 8))
    assert equal(weights(model), weights(twin))
    assert not equal(weights(twin), before)


@pytest.mark.parametrize("backward", ["hooks", "projected"])
def test_a_copied_model_is_attached_to_no_optimiser_until_it_is(backward) -> None:
    model = net()
    optimizer = make(model, residual=None, backward=backward)
    attach(model, optimizer)
    train(model, optimizer)
    twin, other = copied(model, optimizer)
    with pytest.raises(UserError, match=r"gradients.attach"):
        train(twin, other, range(1))
    alone = copy.deepcopy(model)
    alone(torch.ones(1, 8)).sum().backward()
    assert all(p.grad is not None for p in alone.parameters())
    other.zero_grad()
    attach(twin, other)
    train(twin, other, range(4, 8))
    train(model, optimizer, range(4, 8))
    assert equal(weights(model), weights(twin))


# Loading


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.named_parameters(), lr=0.05)


@pytest.mark.parametrize(
    ("saved", "loading"),
    [
        (adamw, make),
        (lambda model: torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9), make),
        (make, lambda model: presets.GaLore(model.named_parameters(), rank=3)),
        (make, partial(make, residual=None)),
        (make, partial(make, moments=BFloat16Moments(), residual=None)),
        (partial(make, rank=7), lambda model: presets.DCTAdamW(model.named_parameters(), rank=3)),
    ],
)
def test_state_of_another_optimiser_is_refused_while_loading_and_changes_nothing(saved, loading) -> None:
    model, other = net(), net()
    first, second = saved(model), loading(other)
    train(model, first)
    train(other, second)
    before = copy.deepcopy(second.state_dict())
    with pytest.raises(
        UserError, match=r"state (of (first|second).weight contains .* keeps|was made with \w+=.* has) .*resume with"
    ):
        second.load_state_dict(first.state_dict())
    after = second.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for number, held in before["state"].items():
        assert all(torch.equal(held[key], after["state"][number][key]) for key in held)
    train(other, second, range(4, 6))


def test_state_of_other_groups_is_refused() -> None:
    named = list(net().named_parameters())
    optimizer, saved = LowRank([{"params": part} for part in (named[:1], named[1:])], rank=3), make(net()).state_dict()
    with pytest.raises(UserError, match=r"groups of \[5\] parameters, but this LowRank has groups of \[1, 4\]"):
        optimizer.load_state_dict(saved)


def test_what_saved_groups_lack_stays_and_numbers_become_tensors() -> None:
    model, other = net(), net()
    first, second = make(model), make(other, eps=1e-6)
    train(model, first)
    state = copy.deepcopy(first.state_dict())
    del state["param_groups"][0]["eps"], state["param_groups"][0]["project"]
    for held in state["state"].values():
        held["step"] = float(held["step"])
    second.load_state_dict(state)
    assert second.param_groups[0]["eps"] == 1e-6
    assert second.param_groups[0]["project"] is True
    second.param_groups[0]["eps"] = 1e-8
    other.load_state_dict(model.state_dict())
    train(model, first, range(4, 8))
    train(other, second, range(4, 8))
    assert equal(weights(model), weights(other))


def test_hooks_around_loading_see_and_change_what_is_loaded() -> None:
    model, other = net(dtype=torch.bfloat16), net(dtype=torch.bfloat16)
    first, second = make(model), make(other)
    train(model, first)
    seen = []

    def halve(_, state_dict):
        state = {n: {**held, "exp_avg": held["exp_avg"] / 2} for n, held in state_dict["state"].items()}
        return {**state_dict, "state": state}

    def look(optimizer):
        for held in optimizer.state.values():
            seen.append(held["exp_avg"].dtype)
            held["exp_avg_sq"] = torch.ones_like(held["exp_avg_sq"])

    second.register_load_state_dict_pre_hook(halve)
    second.register_load_state_dict_post_hook(look)
    second.load_state_dict(first.state_dict())
    assert seen == [torch.float32] * 5
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(second.state[theirs]["exp_avg"], first.state[ours]["exp_avg"] / 2)
        assert (second.state[theirs]["exp_avg_sq"] == 1).all()
    train(other, second, range(1))
    assert len(second._optimizer_load_state_dict_pre_hooks) == len(second._optimizer_load_state_dict_post_hooks) == 1


def test_after_loading_each_count_of_steps_is_where_its_step_reads_it() -> None:
    """The meta device in place of a GPU; Lightning moves all state to it but counts of steps."""
    model = net()
    optimizer = make(model)
    train(model, optimizer)
    there = net().to("meta")
    resumed = make(there)
    resumed.load_state_dict(optimizer.state_dict())
    _optimizer_to_device(resumed, torch.device("meta"))
    fresh = make(net().to("meta"))
    for name, parameter in there.named_parameters():
        (own,) = (p for p in fresh.param_groups[0]["params"] if fresh.name_of(p) == name)
        wanted = fresh.initial_state(own, fresh.param_groups[0])
        held = resumed.state[parameter]
        assert {key: value.device for key, value in held.items()} == {
            key: value.device for key, value in wanted.items()
        }
        assert held["step"].is_meta == (name not in ("first.weight", "second.weight"))


def test_state_that_is_replaced_inside_its_dictionaries_is_picked_up() -> None:
    """As Lightning does it when it moves state to another device."""
    model, other = net(), net()
    first, second = make(model), make(other)
    train(model, first)
    train(other, second)
    for held in second.state.values():
        for key in held:
            held[key] = held[key].clone()
    train(model, first, range(4, 8))
    train(other, second, range(4, 8))
    assert equal(weights(model), weights(other))
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert all(torch.equal(value, second.state[theirs][key]) for key, value in first.state[ours].items())


# Groups and settings

BAD = [
    ({"rank": 0}, r"rank=0 must be at least 1"),
    ({"rank": 2.5}, r"rank=2.5 must be at least 1, a whole number"),
    ({"lr": -1.0}, r"lr=-1.0 must be at least 0"),
    ({"lr": torch.tensor([0.1, 0.2])}, r"lr=.* must be at least 0, a number or a tensor of one"),
    ({"lr": float("nan")}, r"lr=nan must be at least 0"),
    ({"betas": (2, 0.9)}, r"betas=\(2, 0.9\) must be in \[0, 1\)"),
    ({"betas": (0.9,)}, r"betas=\(0.9,\) must be in \[0, 1\), two numbers"),
    ({"eps": -1.0}, r"eps=-1.0 must be at least 0"),
    ({"weight_decay": -1.0}, r"weight_decay=-1.0 must be at least 0"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_settings_out_of_range_are_refused_wherever_they_are_given(options, message) -> None:
    model, extra = net(), nn.Parameter(torch.ones(5, 5))
    with pytest.raises(UserError, match=f"LowRank {message}"):
        make(model, **options)
    with pytest.raises(UserError, match=f"LowRank group 'heads': {message}"):
        LowRank([{"params": list(model.parameters()), "name": "heads", **options}], rank=3)
    optimizer = LowRank(model.parameters(), rank=3)
    with pytest.raises(UserError, match=f"LowRank group 1: {message}"):
        optimizer.add_param_group({"params": [extra], **options})
    assert len(optimizer.param_groups) == 1


def test_a_pattern_that_is_no_list_is_refused() -> None:
    with pytest.raises(UserError, match=r"project='first\*' must be True, False or a list of patterns"):
        LowRank([{"params": list(net().named_parameters()), "project": "first*"}], rank=3)


@pytest.mark.parametrize(("key", "value"), [("rank", 2), ("rank", 7), ("project", False)])
def test_a_rank_that_changes_in_the_middle_of_training_is_refused(key, value) -> None:
    model = net()
    optimizer = make(model)
    optimizer.buckets()
    optimizer.param_groups[0]["rank"] = 4  # before the first step it may
    train(model, optimizer)
    assert optimizer.state[model.first.weight]["exp_avg"].shape == (12, 4)
    before = weights(model)
    optimizer.param_groups[0][key] = value
    with pytest.raises(
        UserError,
        match=r"\(rank, project, stacks\) of a parameter group changed in the .* of training: \(4, True, False\) ->",
    ):
        train(model, optimizer)
    assert equal(weights(model), before)
    optimizer.param_groups[0].update(rank=4, project=True)
    train(model, optimizer)


def test_an_optimiser_without_any_matrix_is_made_when_asked_for() -> None:
    """As for one optimiser a parameter, stepped inside the backward pass."""
    ours, theirs = (nn.Parameter(torch.ones(5)) for _ in range(2))
    low = LowRank([{"params": [ours], "project": False}], lr=0.05)
    full = torch.optim.AdamW([theirs], lr=0.05, weight_decay=0.0, fused=True)
    for step in range(3):
        ours.grad = theirs.grad = torch.arange(5.0) - step
        low.step()
        full.step()
    assert torch.equal(ours, theirs)
    with pytest.raises(UserError, match=r"no matrix to project.*or set project=False in all groups"):
        LowRank([ours])


# Gradients


def test_a_sparse_gradient_is_refused_by_name_before_anything_is_changed() -> None:
    class Table(Net):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 8, sparse=True)

    for project in (True, ["first*", "second*"]):
        torch.manual_seed(0)
        model = Table()
        optimizer = LowRank([{"params": list(model.named_parameters()), "project": project}], rank=3)
        model(model.table(torch.tensor([1, 2, 1]))).sum().backward()
        before = weights(model)
        with pytest.raises(UserError, match=r"gradient of table.weight is sparse.*sparse=False.*SparseAdam"):
            optimizer.step()
        assert equal(weights(model), before)
        assert not any(int(held["step"]) for held in optimizer.state.values())


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_complex_parameters_train_as_with_torchs_adamw(max_norm) -> None:
    def parameters():
        torch.manual_seed(0)
        return [nn.Parameter(torch.randn(s, dtype=torch.complex128)) for s in ((5,), (6, 4), ())]

    ours, theirs, matrix = parameters(), parameters(), nn.Parameter(torch.ones(5, 4, dtype=torch.float64))
    low = LowRank([*ours, matrix], lr=0.05, rank=2, weight_decay=0.1, max_norm=max_norm)
    full = torch.optim.AdamW(theirs, lr=0.05, weight_decay=0.1)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator, dtype=a.dtype)
            b.grad = a.grad.conj().conj().clone()
            a.grad = b.grad.conj().resolve_conj().conj()  # conjugated lazily, as autograd may leave it
        if max_norm:
            nn.utils.clip_grad_norm_(theirs, max_norm)
        low.step()
        full.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7 if max_norm else 1e-12)
    ours[0].grad[1] = complex(0, torch.nan)
    with pytest.raises(UserError, match="not finite"):
        low.step()


def test_parameters_without_numbers_are_stepped_over() -> None:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((0,), (4, 0), (0, 4), (0, 0), (0, 9, 9), (6, 5))]
    optimizer = LowRank(parameters, rank=2, max_norm=1.0, weight_decay=0.1)
    for _ in range(2):
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in parameters] == [2] * 6
    fresh = LowRank([nn.Parameter(p.detach().clone()) for p in parameters], rank=2)
    fresh.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("preset", [LowRank, presets.LDAdam, presets.DCTAdamW, presets.GaLore])
@pytest.mark.parametrize("moments", [BFloat16Moments(), Int8Moments()])
def test_float64_weights_stay_float64_whatever_their_moments_are_stored_in(moments, preset) -> None:
    weights = [nn.Parameter(torch.ones(s, dtype=torch.float64)) for s in ((9, 6), (70, 60))]
    optimizer = preset([{"params": weights[:1]}, {"params": weights[1:], "project": False}], rank=2, moments=moments)
    for step in range(3):
        for number, p in enumerate(weights):
            generator = torch.Generator().manual_seed(2 * step + number)
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    assert all((p.detach().float().double() != p.detach()).any() for p in weights)


@pytest.mark.parametrize("backward", ["hooks", "projected"])
def test_loss_scaling_that_coordinates_cannot_undo_is_refused(backward) -> None:
    model = net()
    optimizer = make(model, residual=None, backward=backward)
    attach(model, optimizer)
    train(model, optimizer)
    for unscale in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        before = weights(model)
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 8)).square().mean()).backward()
        if unscale:
            scaler.unscale_(optimizer)
        with pytest.raises(UserError, match=r"GradScaler.*bfloat16.*backward='whole'"):
            scaler.step(optimizer)
        assert equal(weights(model), before)
        del optimizer.grad_scale, optimizer.found_inf


def test_loss_scaling_of_whole_gradients_changes_nothing() -> None:
    plain, scaled = net(), net()
    first, second = make(plain), make(scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(5):
        for side in (plain, scaled):
            side.zero_grad()
        x = torch.full((2, 8), 0.1 * step + 0.1)
        plain(x).square().mean().backward()
        scaler.scale(scaled(x).square().mean()).backward()
        first.step()
        scaler.step(second)
        scaler.update()
    assert equal(weights(plain), weights(scaled))


@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}, {"max_norm": 1.0, "check_finite": False}])
def test_a_step_without_any_gradient_does_nothing(options) -> None:
    model = net()
    optimizer = make(model, **options)
    before = weights(model)
    for step in range(2):
        optimizer.step()
        assert equal(weights(model), before)
        assert list(iter(lambda: optimizer.step() or "stepped", "stepped")) == []  # no StopIteration ends a loop
        train(model, optimizer, range(step, step + 1))
        optimizer.zero_grad()
        before = weights(model)


def test_replaced_groups_and_parameters_are_followed_as_adamw_follows_them():
    torch.manual_seed(0)
    first, second = (nn.Parameter(torch.randn(8, 6)) for _ in range(2))
    optimizer = LowRank([first, second], rank=2)

    def step(*parameters):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape)
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer.step()
        return [not torch.equal(old, new) for old, new in zip(before, parameters, strict=True)]

    assert step(first, second) == [True, True]
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    optimizer.param_groups[0]["lr"] = 0.0
    assert step(first, second) == [False, False]
    optimizer.param_groups[0]["lr"] = 0.1
    pruned = nn.Parameter(torch.randn(5, 6))
    optimizer.param_groups[0]["params"][0] = pruned
    assert step(pruned, second) == [True, True]
    assert optimizer.state[pruned]["step"] == 1
    assert optimizer.state[second]["step"] == 3


def test_a_group_without_names_joins_groups_with_names():
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    optimizer = LowRank(net[0].named_parameters(), rank=2)
    optimizer.add_param_group({"params": net[1].parameters()})
    assert optimizer.param_groups[1]["param_names"] == ["parameter 2", "parameter 3"]
    unnamed = LowRank(net[0].parameters(), rank=2)
    unnamed.add_param_group({"params": net[1].weight})
    assert "param_names" not in unnamed.param_groups[1]
