"""Sparse Gaussian layers in models of any kind, and what they cost."""

import copy

import pytest
import timm
import torch
from torch import nn

from lightspan.adapters.sparse_gaussian.costs import costs
from lightspan.adapters.sparse_gaussian.inject import Start, drawing, gaussian_layers, plain_means, sparsify
from lightspan.adapters.sparse_gaussian.layer import OneDraw, Outputs
from lightspan.core.errors import UserError
from lightspan.subspaces.masks.allocation import ErdosRenyi


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 20), nn.Linear(20, 3)
    )


def test_matched_layers_become_sparse_at_their_density_and_others_stay() -> None:
    model = convnet()
    made = sparsify(model, ["*"], 0.1, dense=["0"])
    assert {name: len(layer.mu) for name, layer in made.items()} == {"0": 36, "4": 288, "5": 6}
    assert isinstance(model[1], nn.BatchNorm2d)
    assert gaussian_layers(model) == made
    assert list(sparsify(convnet(), ["4"], 0.1)) == ["4"]
    shared = sparsify(convnet(), ["*"], 0.1, allocation=ErdosRenyi())
    assert sum(len(layer.mu) for layer in shared.values()) == pytest.approx(0.1 * 2976, abs=2)
    assert len(shared["5"].mu) > 6


def test_places_and_starts_are_functions_of_seed_and_name() -> None:
    one, same, other = (sparsify(convnet(), ["*"], 0.1, seed=seed) for seed in (1, 1, 2))
    alone = sparsify(convnet(), ["4"], 0.1, seed=1)
    for name, layer in one.items():
        for key, value in layer.state_dict().items():
            assert torch.equal(value, same[name].state_dict()[key])
        assert not torch.equal(layer.places, other[name].places)
    assert torch.equal(alone["4"].mu, one["4"].mu)


def test_posteriors_start_as_they_are_told() -> None:
    layer = sparsify(convnet(), ["4"], 1.0, start=Start(mean_std=0.01, std=6e-4, std_spread=5e-4))["4"]
    assert layer.mu.std().item() == pytest.approx(0.01, rel=0.05)
    draws = (6e-4 + 5e-4 * torch.randn(100_000)).abs()
    assert layer.std.mean().item() == pytest.approx(draws.mean().item(), rel=0.05)
    model = convnet()
    weight = model[4].weight.detach().clone()
    kept = sparsify(model, ["4"], 0.2, start=Start(mean_std=None))["4"]
    assert torch.equal(kept.mu, kept.subspace.pull(weight))


def test_a_sampled_network_is_one_of_its_seed_and_number() -> None:
    model, x = convnet(), torch.randn(2, 1, 8, 8)
    sparsify(model, ["*"], 0.3, start=Start(mean_std=None, std=0.1))
    model.eval()

    def sampled(seed: int, number: int) -> torch.Tensor:
        with drawing(model, OneDraw(seed, number)):
            return model(x)

    assert torch.equal(sampled(0, 1), sampled(0, 1))
    assert not torch.allclose(sampled(0, 1), sampled(0, 2))
    assert not torch.allclose(sampled(0, 1), sampled(1, 1))
    plain_means(model)
    assert not gaussian_layers(model)
    assert [type(part) for part in model] == [type(part) for part in convnet()]


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_networks_of_timm_train_and_become_plain_again(name: str) -> None:
    sizes = {"img_size": 32} if "vit" in name else {}
    model = timm.create_model(name, num_classes=3, **sizes)
    sparsify(model, ["*"], 0.1, start=Start(mean_std=None))
    x, index_B = torch.randn(2, 3, 32, 32), torch.arange(2)
    with drawing(model, Outputs(0, 0, index_B)):
        model(x).sum().backward()
    assert all(layer.mu.grad is not None and layer.rho.grad is not None for layer in gaussian_layers(model).values())
    model.eval()
    given = model(x)
    plain_means(model)
    # A plain layer adds its bias inside the product, which some processors round otherwise.
    torch.testing.assert_close(model(x), given, rtol=1e-5, atol=1e-6)
    timm.create_model(name, num_classes=3, **sizes).load_state_dict(model.state_dict())


def test_copies_and_state_dicts_carry_places() -> None:
    model, other = convnet(), convnet()
    sparsify(model, ["*"], 0.1, seed=1)
    sparsify(other, ["*"], 0.1, seed=2)
    other.load_state_dict(copy.deepcopy(model).state_dict())
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(other.eval()(x), model.eval()(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight


@pytest.mark.parametrize(
    ("model", "match", "density", "message"),
    [
        (convnet(), ["*"], 0.0, r"density=0.0 must be above 0 and at most 1"),
        (convnet(), ["*"], 1.5, r"density=1.5 must be above 0 and at most 1"),
        (convnet(), ["1"], 0.1, r"pattern '1' matches no linear layer or convolution of Sequential; names look like 0"),
        (nn.Sequential(nn.MultiheadAttention(4, 2)), ["*out_proj"], 0.1, "0.out_proj is part of MultiheadAttention"),
        (Tied(), ["first"], 0.1, "the weight of first is shared with second"),
        (nn.Sequential(nn.LazyLinear(3)), ["0"], 0.1, "0 is a LazyLinear, which cannot be made sparse and Gaussian"),
        (nn.Sequential(nn.Linear(3, 3, device="meta")), ["0"], 0.1, "0 is on the meta device"),
    ],
)
def test_what_cannot_be_sparse_is_refused_and_left_as_it_was(model, match, density, message) -> None:
    before = [type(module) for module in model.modules()]
    with pytest.raises(UserError, match=message):
        sparsify(model, match, density)
    assert [type(module) for module in model.modules()] == before
    assert all(p is not None for p in model.parameters())


def test_a_start_below_zero_is_refused() -> None:
    with pytest.raises(UserError, match="std=-1"):
        Start(std=-1)


def test_costs_are_counted_by_storage_and_by_use() -> None:
    model = convnet()
    sparsify(model, ["*"], 0.1)
    found = costs(model, torch.zeros(1, 1, 8, 8))
    k, n = (4, 288, 6), (36, 2880, 60)
    assert (found.weights, found.active) == (sum(n), sum(k))
    assert found.stored_bytes == 12 * sum(k)
    assert found.dense_bytes == 8 * sum(n)
    positions = (36, 1, 1)
    assert found.sparse_flops == 12 * sum(p * one for p, one in zip(positions, k, strict=True))
    assert found.dense_flops == 12 * sum(p * one for p, one in zip(positions, n, strict=True))
    assert model.training
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.zeros(2, 1, 8, 8)).sum().backward()
    for layer in gaussian_layers(model).values():
        layer.rho.grad = torch.zeros_like(layer.rho)
    optimizer.step()
    again = costs(model, torch.zeros(1, 1, 8, 8), optimizer, watched=0.0075)
    assert again.optimizer_bytes == 16 * sum(k)
    assert again.sparse_flops > found.sparse_flops
    assert again == type(again).from_json(again.to_json())
