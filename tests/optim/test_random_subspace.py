"""RandomSubspace: exact limits against torch's optimisers, gradients of z and lambda, decay, and saved state."""

import copy
import pickle
from functools import partial

import pytest
import torch
from step_costs import step_costs
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR

from lightspan.core.errors import UserError
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.random_subspace import RandomSubspace
from lightspan.optim.schedules import WarmupCosine
from lightspan.optim.subspace_file import apply_subspace, save_subspace
from lightspan.subspaces.projections import Dense, Fastfood, PerTensor, Projection, Sparse

KINDS = [Dense, Sparse, Fastfood]


class Identity(Projection):
    def _push(self, z_d, start, stop):
        return z_d[start:stop].clone()

    def _pull(self, g, start):
        return nn.functional.pad(g, (start, self.size - start - len(g)))


class Orthonormal(Projection):
    def __init__(self, size, dim, seed):
        super().__init__(size, dim, seed)
        generator = torch.Generator().manual_seed(seed)
        self.frame_Dd = torch.linalg.qr(torch.randn(size, dim, generator=generator, dtype=torch.float64)).Q

    def _push(self, z_d, start, stop):
        return self.frame_Dd[start:stop].to(z_d.dtype) @ z_d

    def _pull(self, g, start):
        return g @ self.frame_Dd[start : start + len(g)].to(g.dtype)


class Net(nn.Module):
    """A tied pair, a frozen layer, and a scalar, so that shapes of all kinds are there."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.frozen = nn.Linear(5, 5)
        self.tied, self.again = nn.Linear(5, 5), nn.Linear(5, 5)
        self.again.weight = self.tied.weight
        self.head = nn.Linear(5, 3)
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.frozen.requires_grad_(False)

    def forward(self, x_BI):
        x = self.again(self.tied(self.frozen(self.first(x_BI).tanh())).tanh())
        return self.head(x) * self.temperature


def net(dtype=torch.float64, seed=0) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def loss_of(model, step=0):
    generator = torch.Generator().manual_seed(step)
    x_BI = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    return nn.functional.cross_entropy(model(x_BI.to(model.head.weight.dtype)), x_BI[:, :3].argmax(1))


def train(model, optimizer, steps=range(6), scheduler=None) -> list[float]:
    losses = []
    for step in steps:
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


PLAIN = partial(SGD, lr=0.5)


def subspace(model, inner=PLAIN, dim=9, **options) -> RandomSubspace:
    return RandomSubspace(model.named_parameters(), inner, dim, **options)


# Limits


@pytest.mark.parametrize(
    "inner",
    [
        partial(SGD, lr=0.3),
        partial(SGD, lr=0.1, momentum=0.9, nesterov=True),
        partial(Adam, lr=0.02),
        partial(Adam, lr=0.02, weight_decay=0.1),
        partial(AdamW, lr=0.02, weight_decay=0.1),
        partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.05),
    ],
)
def test_with_the_identity_every_step_is_that_of_the_inner_optimiser(inner) -> None:
    direct, inside = net(), net()
    train(direct, inner([p for p in direct.parameters() if p.requires_grad]), range(12))
    train(inside, subspace(inside, inner, trained(inside), projection=Identity), range(12))
    torch.testing.assert_close(weights(inside), weights(direct), rtol=0, atol=2e-12 if inner.func is SGD else 1e-8)


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.05)])
def test_a_rotation_of_all_weights_leaves_sgd_with_momentum_as_it_is(momentum, decay) -> None:
    inner = partial(SGD, lr=0.1, momentum=momentum, weight_decay=decay)
    direct, inside = net(), net()
    train(direct, inner([p for p in direct.parameters() if p.requires_grad]), range(12))
    train(inside, subspace(inside, inner, trained(inside), projection=Orthonormal), range(12))
    torch.testing.assert_close(weights(inside), weights(direct), rtol=0, atol=1e-12)


def test_a_rotation_of_all_weights_changes_adam() -> None:
    direct, inside = net(), net()
    train(direct, Adam([p for p in direct.parameters() if p.requires_grad], lr=0.02))
    train(inside, subspace(inside, partial(Adam, lr=0.02), trained(inside), projection=Orthonormal))
    assert (weights(inside) - weights(direct)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"per_tensor": True}, {"layer_scales": True}, {"projection": Sparse}])
def test_at_zero_coordinates_the_network_is_untouched_bit_for_bit(dtype, options) -> None:
    model, untouched = net(dtype), net(dtype)
    optimizer = subspace(model, partial(SGD, lr=0.0), dim=20, **options)
    assert torch.equal(weights(model), weights(untouched))
    train(model, optimizer, range(1))
    assert torch.equal(weights(model), weights(untouched))


# The map


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_tensor", [False, True])
def test_weights_are_the_start_plus_the_map_of_the_coordinates(kind, per_tensor) -> None:
    model = net()
    start, optimizer = weights(model), subspace(model, projection=kind, per_tensor=per_tensor, seed=3)
    train(model, optimizer)
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    map_Dd = PerTensor(sizes, 9, 3, kind) if per_tensor else kind(sum(sizes), 9, 3)
    moves = torch.cat([torch.full((p.numel(),), p.requires_grad) for p in model.parameters()])
    expected = start.clone()
    expected[moves] += map_Dd.push(optimizer.z_d.detach())
    torch.testing.assert_close(weights(model), expected, rtol=0, atol=1e-14)
    assert torch.equal(weights(model)[~moves], start[~moves])
    assert (weights(model) - start)[moves].abs().min() > 0 or kind is Sparse


def numerical(model, optimizer, which: torch.Tensor, index: int, step=1e-6) -> float:
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            which[index] += sign * step
            optimizer.slice.write(optimizer.z_d, optimizer.scales_l)
            values.append(loss_of(model).item())
            which[index] -= sign * step
    optimizer.slice.write(optimizer.z_d, optimizer.scales_l)
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("per_tensor", [False, True])
def test_gradients_of_coordinates_and_scales_are_those_of_finite_differences(per_tensor) -> None:
    model = net()
    optimizer = subspace(model, dim=14, layer_scales=True, per_tensor=per_tensor)
    assert optimizer.scales_l.shape == (5,)  # first, tied, again (its bias), head, and the temperature
    assert optimizer.z_d.shape == (9,)
    train(model, optimizer)
    assert (optimizer.scales_l - 1).abs().min() > 0
    loss_of(model).backward()
    moved = optimizer.slice
    g_D = moved.flat([p.grad for p in moved.parameters])
    by_z_d, by_scale_l = moved.pull(g_D, optimizer.z_d.detach(), optimizer.scales_l.detach())
    for variable, found in ((optimizer.z_d, by_z_d), (optimizer.scales_l, by_scale_l)):
        wanted = [numerical(model, optimizer, variable, i) for i in range(len(variable))]
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-7)


def test_scales_wait_for_the_coordinates_and_at_one_are_not_there() -> None:
    plain, scaled = net(), net()
    first, second = subspace(plain, dim=9), subspace(scaled, dim=14, layer_scales=True)
    train(plain, first, range(1))
    train(scaled, second, range(1))
    assert torch.equal(second.scales_l.detach(), torch.ones(5, dtype=torch.float64))
    assert torch.equal(weights(plain), weights(scaled))
    train(scaled, second, range(1, 3))
    assert (second.scales_l - 1).abs().min() > 0


def test_unnamed_parameters_have_a_scale_each() -> None:
    model = net()
    assert RandomSubspace(model.parameters(), partial(SGD, lr=1.0), 15, layer_scales=True).scales_l.shape == (8,)


@pytest.mark.parametrize("inner", [partial(SGD, lr=1e-3, weight_decay=0.3), partial(AdamW, lr=1e-3, weight_decay=0.3)])
def test_decay_pulls_at_all_weights_and_not_at_the_coordinates(inner) -> None:
    model = net()
    optimizer = subspace(model, inner, dim=9)
    theta = optimizer.slice.flat(optimizer.slice.parameters)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    expected = -1e-3 * 0.3 * optimizer.slice.projection.pull(theta)
    torch.testing.assert_close(optimizer.z_d.detach(), expected, rtol=1e-12, atol=0)


def test_groups_without_decay_are_left_out_of_it() -> None:
    model = net()
    groups = [
        {"params": [("head.weight", model.head.weight)]},
        {"params": [("head.bias", model.head.bias)], "weight_decay": 0.0},
    ]
    optimizer = RandomSubspace(groups, partial(SGD, lr=1.0, weight_decay=0.5), 4)
    assert torch.equal(optimizer._decay()[:15], 0.5 * model.head.weight.detach().flatten())
    assert not optimizer._decay()[15:].any()


# How training goes on around it


def test_accumulated_micro_batches_are_one_batch() -> None:
    whole, parts = net(), net()
    for model, weight in ((whole, 1.0), (parts, 0.5)):
        optimizer = subspace(model, partial(Adam, lr=0.05))
        for _ in range(3):
            for _ in range(round(1 / weight)):
                (weight * loss_of(model)).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=1e-12)


def test_clipping_acts_on_the_gradients_of_the_parameters() -> None:
    model = net()
    optimizer = subspace(model, partial(SGD, lr=1.0))
    loss_of(model).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    expected = -optimizer.slice.projection.pull(optimizer.slice.flat([p.grad for p in optimizer.slice.parameters]))
    optimizer.step()
    torch.testing.assert_close(optimizer.z_d.detach(), expected)
    assert 0 < optimizer.z_d.detach().norm() < 1e-2


def test_a_schedule_moves_the_rate_of_the_coordinates() -> None:
    model = net()
    optimizer = subspace(model, partial(SGD, lr=1.0, momentum=0.5))
    rates = []
    scheduler = WarmupCosine(optimizer, total_steps=5, warmup=0.4)
    for step in range(5):
        train(model, optimizer, [step], scheduler)
        rates.append(optimizer.inner.param_groups[0]["lr"])
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[4] < rates[3] < 1
    torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=5
    )  # changes momentum too, where the optimiser has it
    train(model, optimizer, [5])
    assert optimizer.inner.param_groups[0]["momentum"] == optimizer.param_groups[0]["momentum"] == 0.95


def test_parameters_without_a_gradient_move_with_the_others_and_without_any_nothing_moves() -> None:
    model = net()
    optimizer, start = subspace(model), weights(model)
    optimizer.step()
    assert torch.equal(weights(model), start)
    before = model.first.weight.detach().clone()
    model.head.weight.square().sum().backward()
    optimizer.step()
    assert (model.first.weight - before).abs().min() > 0


def test_a_closure_is_called_and_its_loss_returned() -> None:
    model = net()
    optimizer = subspace(model)

    def closure():
        loss = loss_of(model)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    optimizer.zero_grad()
    assert optimizer.step(closure) < first


def test_sparse_gradients_are_taken_too() -> None:
    table, dense = (nn.Embedding(7, 3, sparse=sparse).double() for sparse in (True, False))
    dense.load_state_dict(table.state_dict())
    for model in (table, dense):
        optimizer = RandomSubspace(model.named_parameters(), partial(SGD, lr=1.0), 5)
        model(torch.tensor([1, 4, 1])).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(table.weight, dense.weight)


def test_half_precision_weights_are_the_rounded_sum_in_float32() -> None:
    model = net(torch.bfloat16)
    start, optimizer = [p.detach().clone() for p in model.parameters() if p.requires_grad], subspace(model)
    train(model, optimizer)
    assert optimizer.z_d.dtype == torch.float32
    assert optimizer.slice.start[0].dtype == torch.bfloat16
    moved_D = optimizer.slice.projection.push(optimizer.z_d.detach())
    for p, old, part in zip(optimizer.slice.parameters, start, moved_D.split(optimizer.slice.sizes), strict=True):
        assert torch.equal(p, (old.float() + part.view(p.shape)).bfloat16())


# State


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_saved_state_goes_on_bit_for_bit(scaled, dtype, tmp_path) -> None:
    options = {"dim": 14, "layer_scales": scaled, "inner": partial(Adam, lr=0.05)}
    straight, first, second = net(dtype), net(dtype), net(dtype)
    train(straight, subspace(straight, **options), range(10))
    optimizer = subspace(first, **options)
    train(first, optimizer, range(5))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    resumed = subspace(second, **options)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(weights(second), weights(first))
    train(second, resumed, range(5, 10))
    assert torch.equal(weights(second), weights(straight))


def test_the_state_is_d_numbers_and_those_of_the_inner_optimiser() -> None:
    model = net()
    optimizer = subspace(model, partial(Adam, lr=0.05), dim=14, layer_scales=True)
    train(model, optimizer)
    state, *others = optimizer.state_dict()["state"].values()
    assert not any(others)
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "coordinates": (9,), "coordinates_step": (), "coordinates_exp_avg": (9,), "coordinates_exp_avg_sq": (9,),
        "scales": (5,), "scales_step": (), "scales_exp_avg": (5,), "scales_exp_avg_sq": (5,), "start_sha256": (32,),
    }  # fmt: skip


def test_a_state_of_other_weights_or_another_subspace_is_refused() -> None:
    model = net()
    optimizer = subspace(model)
    train(model, optimizer)
    saved = optimizer.state_dict()
    with pytest.raises(UserError, match=r"belong to other initial weights.*same seed or pretrained weights"):
        subspace(net(seed=1)).load_state_dict(saved)
    with pytest.raises(UserError, match=r"coordinates of shape \(9,\), but this RandomSubspace has \(8,\)"):
        subspace(net(), dim=8).load_state_dict(saved)
    with pytest.raises(UserError, match=r"scales of shape \(0,\), but this RandomSubspace has \(5,\)"):
        subspace(net(), dim=14, layer_scales=True).load_state_dict(saved)


@pytest.mark.parametrize("options", [{}, {"per_tensor": True}, {"layer_scales": True, "projection": Sparse}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_of_d_numbers_makes_the_weights_bit_for_bit(options, dtype, tmp_path) -> None:
    model, fresh = net(dtype), net(dtype)
    optimizer = subspace(model, partial(Adam, lr=0.05), dim=14, seed=8, **options)
    train(model, optimizer)
    save_subspace(optimizer, tmp_path / "run.safetensors")
    apply_subspace(tmp_path / "run.safetensors", fresh)
    assert torch.equal(weights(fresh), weights(model))
    assert (tmp_path / "run.safetensors").stat().st_size < 1200


def test_a_file_is_refused_by_what_it_does_not_belong_to(tmp_path) -> None:
    model, path = net(), tmp_path / "run.safetensors"
    optimizer = subspace(model)
    train(model, optimizer)
    save_subspace(optimizer, path)
    with pytest.raises(UserError, match=r"are not those that the run of .* started from"):
        apply_subspace(path, net(seed=1))
    with pytest.raises(UserError, match=r"Linear has no parameter 'temperature'"):
        apply_subspace(path, nn.Linear(2, 2))
    (tmp_path / "text").write_text("no such thing")
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        apply_subspace(tmp_path / "text", model)
    with pytest.raises(UserError, match="got them without names"):
        save_subspace(RandomSubspace(net().parameters(), partial(SGD, lr=1.0), 4), path)


def test_a_projection_of_ones_own_is_passed_to_its_file(tmp_path) -> None:
    model, path = net(), tmp_path / "run.safetensors"
    optimizer = subspace(model, projection=Orthonormal)
    train(model, optimizer)
    save_subspace(optimizer, path)
    with pytest.raises(UserError, match="your own projection 'Orthonormal'; pass projection="):
        apply_subspace(path, net())
    fresh = net()
    apply_subspace(path, fresh, Orthonormal)
    assert torch.equal(weights(fresh), weights(model))


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copied", "pickled"]
)
@pytest.mark.parametrize("steps", [0, 4])
def test_a_copy_goes_on_in_the_copied_network_alone(way, steps) -> None:
    model = net()
    optimizer = subspace(model, partial(Adam, lr=0.05, weight_decay=0.1), dim=14, layer_scales=True)
    scheduler = LambdaLR(optimizer, rate)  # patches `step` with a closure on the original
    optimizer.register_step_post_hook(lambda *_: None)
    train(model, optimizer, range(steps), scheduler)
    twin, other = way((model, optimizer))
    before = weights(model)
    train(twin, other, range(steps, 9))
    assert torch.equal(weights(model), before)
    train(model, optimizer, range(steps, 9))
    assert torch.equal(weights(twin), weights(model))
    assert not torch.equal(weights(twin), before)


def rate(step: int) -> float:
    return 1 / (1 + step)


def test_a_decay_that_changes_after_loading_is_followed() -> None:
    straight, resumed = net(), net()
    first, second = subspace(straight), subspace(resumed)
    train(straight, first)
    second.load_state_dict(first.state_dict())
    for model, optimizer in ((straight, first), (resumed, second)):
        optimizer.param_groups[0]["weight_decay"] = 0.5
        train(model, optimizer, range(6, 9))
    assert torch.equal(weights(straight), weights(resumed))


def test_hooks_around_loading_see_and_change_what_is_loaded() -> None:
    model, other = net(), net()
    first, second = subspace(model), subspace(other)
    train(model, first)
    seen = []

    def halve(_, given):
        state = {
            n: {**held, "coordinates": held["coordinates"] / 2} if held else held for n, held in given["state"].items()
        }
        return {**given, "state": state}

    second.register_load_state_dict_pre_hook(halve)
    second.register_load_state_dict_post_hook(lambda optimizer: seen.append(optimizer.z_d.detach().clone()))
    second.load_state_dict(first.state_dict())
    assert torch.equal(seen[0], first.z_d.detach() / 2)


def test_before_the_first_step_the_file_gives_the_start(tmp_path) -> None:
    model, fresh = net(), net()
    save_subspace(subspace(model), tmp_path / "run.safetensors")
    apply_subspace(tmp_path / "run.safetensors", fresh)
    assert torch.equal(weights(fresh), weights(model))


# Bad input


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (partial(torch.optim.Muon, lr=0.1), "are a vector, and their optimiser refused one: Muon only supports 2D"),
        (partial(torch.optim.LBFGS, lr=0.1), "LBFGS evaluates the loss several times per step.*torch.optim.Adam"),
        (partial(torch.optim.Adafactor, lr=0.1), "Adafactor steps relative to the size of what it trains"),
        (partial(torch.optim.SparseAdam, lr=0.1), "SparseAdam needs sparse gradients"),
        (partial(LowRank, rank=2), "LowRank got no matrix to project"),
    ],
)
def test_an_inner_optimiser_that_cannot_step_coordinates_is_refused(inner, message) -> None:
    with pytest.raises(UserError, match=message):
        subspace(net(), inner)


def test_what_cannot_be_a_subspace_is_refused() -> None:
    model = net()
    total = trained(model)
    with pytest.raises(UserError, match=rf"dim={total + 1} must be at least 1 and at most the {total} weights"):
        subspace(model, dim=total + 1)
    with pytest.raises(UserError, match=r"dim=2\.5 must be a whole number"):
        subspace(model, dim=2.5)
    with pytest.raises(UserError, match="dim=0 must be at least 1"):
        subspace(model, dim=0)
    with pytest.raises(UserError, match="dim=5 must be more than its 5 layer scales"):
        subspace(model, dim=5, layer_scales=True)
    with pytest.raises(UserError, match="no parameter with requires_grad=True"):
        subspace(nn.Linear(2, 2).requires_grad_(False), dim=1)
    groups = [{"params": [model.head.weight]}, {"params": [model.head.bias], "lr": 2.0}]
    with pytest.raises(UserError, match=r"groups have lr=1.0 and 2.0, but one set of coordinates moves them all"):
        RandomSubspace(groups, partial(SGD, lr=1.0), 3)
    with pytest.raises(UserError, match="drawn for its first parameters"):
        subspace(model).add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_a_gradient_that_is_not_finite_stops_before_anything_moves() -> None:
    model = net()
    optimizer = subspace(model)
    train(model, optimizer)
    before = weights(model)
    loss_of(model).backward()
    model.head.bias.grad[0] = torch.inf
    with pytest.raises(UserError, match="not finite, which in a random subspace affects every weight"):
        optimizer.step()
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_one_push_one_pull_and_seven_kernels(kind) -> None:
    weights = [nn.Parameter(torch.ones(5, 3)) for _ in range(3)]
    optimizer = RandomSubspace(weights, partial(SGD, lr=0.1, foreach=False), dim=4, projection=kind)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()  # makes constants of the map
    with step_costs() as step:
        optimizer.step()
    z_d, g_D = optimizer.z_d.detach(), torch.ones(45)
    with step_costs() as mapped:
        optimizer.slice.projection.push(z_d)
        optimizer.slice.projection.pull(g_D)
    # gradients to one vector; no lambdas, their place after the coordinates, the largest number; SGD; the start to the
    # weights, what has moved
    assert step.kernels.total() == mapped.kernels.total() + 7


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tensors_are_read_and_written_by_as_many_kernels_however_many_there_are(dtype, decay) -> None:
    kernels = []
    for count in (2, 9):
        weights = [nn.Parameter(torch.ones(5, 3, dtype=dtype)) for _ in range(count)]
        groups, inner = [{"params": weights, "weight_decay": decay}], partial(SGD, lr=0.1, foreach=False)
        optimizer = RandomSubspace(groups, inner, dim=4, projection=Dense)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        with step_costs() as costs:
            optimizer.step()
        kernels.append(costs.kernels)
    few, many = kernels
    assert few == many
    # gradients to one vector, the start to the weights, what has moved; weights to a vector, times their decay
    assert sum(count for name, count in many.items() if "_foreach_" in name) == 3 + 2 * bool(decay)
