"""Active coordinates that move: how many, which, and what they and their moments start with."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from lightspan.adapters.sparse_gaussian.inject import Start, drawing, gaussian_layers, sparsify
from lightspan.adapters.sparse_gaussian.layer import Outputs, SparseGaussian
from lightspan.adapters.sparse_gaussian.topology import Topology, move
from lightspan.core.errors import UserError
from lightspan.optim.masks.reindex import reindex
from lightspan.subspaces.sparse_gaussian.criteria import SizeOfMean, SizeSNR

START = Start(mean_std=0.5, std=0.1, std_spread=0.05)


def net(density: float = 0.3) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    sparsify(model, ["*"], density, start=START)
    return model


def watched_pass(model: nn.Module, seed: int = 0) -> None:
    for layer in gaussian_layers(model).values():
        layer.watching = True
    x = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    with drawing(model, Outputs(0, seed, torch.arange(3))):
        model(x).square().sum().backward()


def moved(model: nn.Module, share: float) -> dict[str, torch.Tensor]:
    layers = gaussian_layers(model)
    return move(layers, {name: math.floor(share * len(one.mu)) for name, one in layers.items()}, SizeSNR())


@pytest.mark.parametrize("make", [partial(torch.optim.SGD, lr=1e-3, momentum=0.9), torch.optim.AdamW])
def test_counts_stay_and_moments_follow_their_coordinates(make) -> None:
    model = net()
    optimizer = make(model.parameters())
    counts = {name: len(layer.mu) for name, layer in gaussian_layers(model).items()}
    changed = 0
    for update in range(4):
        optimizer.zero_grad()
        watched_pass(model, update)
        optimizer.step()
        for layer in gaussian_layers(model).values():
            layer.gradient_S = None
        optimizer.zero_grad()
        watched_pass(model, 10 + update)
        layers = gaussian_layers(model)
        before = {
            name: (one.places.clone(), one.mu.detach().clone(), one.rho.detach().clone())
            for name, one in layers.items()
        }
        dense = {name: dense_state(optimizer, one) for name, one in layers.items()}
        for name, source_k in moved(model, 0.3).items():
            layer, (places, mu, rho) = layers[name], before[name]
            for parameter in (layer.mu, layer.rho):
                reindex(optimizer, parameter, source_k)
            fresh = ~torch.isin(layer.places, places)
            changed += int(fresh.sum())
            assert torch.equal(fresh, source_k < 0)
            assert torch.equal(layer.places, layer.places.sort().values)
            assert len(layer.places.unique()) == len(layer.mu) == counts[name]
            assert not layer.mu[fresh].any()
            torch.testing.assert_close(layer.rho[fresh], rho.mean().expand(int(fresh.sum())))
            assert torch.equal(layer.mu[~fresh], mu[source_k[~fresh]])
            assert torch.equal(layer.rho[~fresh], rho[source_k[~fresh]])
            state = dense_state(optimizer, layer)
            assert state
            for key, moments_S in state.items():
                active = layer.subspace.push(torch.ones(len(fresh))) > 0
                old = layer.subspace.push((~fresh).float()) > 0
                assert not moments_S[~active].any()
                assert not moments_S[active & ~old].any()
                assert torch.equal(moments_S[old], dense[name][key][old])
    assert changed > 0


def dense_state(optimizer: torch.optim.Optimizer, layer: SparseGaussian) -> dict[str, torch.Tensor]:
    """What the optimiser keeps, put where its coordinates are."""
    return {
        f"{which} {key}": layer.subspace.push(value)
        for which, parameter in (("mu", layer.mu), ("rho", layer.rho))
        for key, value in optimizer.state[parameter].items()
        if torch.is_tensor(value) and value.ndim
    }


def test_the_lowest_scores_leave_and_the_steepest_others_come() -> None:
    model = net()
    layer = gaussian_layers(model)["2"]
    watched_pass(model)
    gradient, before = layer.gradient_S.flatten().abs(), layer.places.long()
    scores = SizeSNR().of(layer.mu, layer.std)
    count, dropped = len(before), 9
    moved_from = move({"2": layer}, {"2": dropped}, SizeSNR())
    kept = set(before[scores.argsort(descending=True)[: count - dropped]].tolist())
    others = sorted((p for p in range(layer.count) if p not in kept), key=lambda p: -gradient[p].item())
    assert set(layer.places.tolist()) == kept | set(others[:dropped])
    assert not layer.watching
    assert layer.gradient_S is None
    assert list(moved_from) == ["2"]


def test_a_coordinate_that_left_and_comes_at_once_is_as_if_it_had_stayed() -> None:
    layer = sparsify(nn.Sequential(nn.Linear(4, 4)), ["0"], 0.5, start=START)["0"]
    weakest = layer.mu.abs().argmin()
    layer.watching = True
    layer.gradient_S = torch.zeros(16)
    layer.gradient_S[layer.places[weakest].long()] = 1.0
    layer.gradient_S = layer.gradient_S.view(4, 4)
    before = layer.places.clone(), layer.mu.detach().clone()
    (source_k,) = move({"0": layer}, {"0": 1}, SizeOfMean()).values()
    assert torch.equal(source_k, torch.arange(8))
    assert torch.equal(layer.places, before[0])
    assert torch.equal(layer.mu, before[1])


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_without_a_share_to_move_or_a_free_place_nothing_moves(density: float) -> None:
    model = net(density)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    watched_pass(model)
    moved(model, 0.3 if density == 1 else 0.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("broken", [None, torch.nan, torch.inf])
def test_a_layer_without_a_sound_gradient_keeps_its_coordinates(broken: float | None) -> None:
    model = net()
    watched_pass(model)
    layers = gaussian_layers(model)
    before = layers["2"].places.clone()
    if broken is None:
        layers["2"].gradient_S = None
    else:
        layers["2"].gradient_S[0, 0] = broken
    assert list(moved(model, 0.5)) == ["0"]
    assert torch.equal(layers["2"].places, before)


def test_gradients_of_micro_batches_add_up() -> None:
    model = net()
    watched_pass(model, 1)
    first = gaussian_layers(model)["2"].gradient_S
    watched_pass(model, 2)
    both = gaussian_layers(model)["2"].gradient_S
    gaussian_layers(model)["2"].gradient_S = None
    watched_pass(model, 2)
    torch.testing.assert_close(both, first + gaussian_layers(model)["2"].gradient_S)


def test_updates_are_due_every_so_many_steps_until_a_share_of_the_run() -> None:
    topology = Topology(alpha=0.3, every=100, until=0.75)
    assert [step for step in range(1000) if topology.due(step, 1000)] == [100, 200, 300, 400, 500, 600, 700]
    assert [topology.dropped(1000, step, 1000) for step in (0, 375, 750)] == [300, 150, 0]
    assert not any(Topology(alpha=0.0).due(step, 1000) for step in range(1000))


@pytest.mark.parametrize("wrong", [{"alpha": -0.1}, {"alpha": 1.1}, {"every": 0}, {"until": 0.0}, {"until": 1.5}])
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=f"{name}={value}"):
        Topology(**wrong)
