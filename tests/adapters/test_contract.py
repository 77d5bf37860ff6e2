"""What every adapter keeps: it starts at nothing, trains alone, merges exactly, switches off, travels and shards."""

import copy
import importlib
import pkgutil
from pathlib import Path

import pytest
import rank_processes
import torch
import torch.distributed as dist
from adapters.cases import CASES
from adapters.small_net import CLOSED, LAYERS, SmallNet, images, perturb
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import lightspan.adapters
from lightspan.adapters.adapter import Adapted, AdapterSpec
from lightspan.adapters.inject import (
    activate,
    adapt,
    adapted_layers,
    disable_adapters,
    fold,
    freeze_statistics,
    frozen_hash,
    merge,
    unmerge,
)
from lightspan.adapters.state import load_adapter, save_adapter
from lightspan.adapters.svfit import SVFit
from lightspan.core.errors import UserError
from lightspan.training.strategies import shard_blocks

EVERY = pytest.mark.parametrize("spec", CASES.values(), ids=CASES)
STEPS, ROWS = 3, 8


def adapted(spec: AdapterSpec, dtype: torch.dtype = torch.float64, train: tuple[str, ...] = ()) -> SmallNet:
    model = SmallNet().to(dtype)
    adapt(model, LAYERS, spec, train=train, show=False)
    return model


def moved(spec: AdapterSpec, dtype: torch.dtype = torch.float64) -> SmallNet:
    return perturb(adapted(spec, dtype))


def is_mergeable(model: nn.Module) -> bool:
    return all(a.mergeable for layer in adapted_layers(model).values() for a in layer.adapters.values())


def step(model: nn.Module, x: torch.Tensor, rate: float = 0.05) -> None:
    model(x).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
                parameter.grad = None


def test_every_adapter_of_the_package_is_in_the_suite():
    for module in pkgutil.iter_modules(lightspan.adapters.__path__):
        importlib.import_module(f"lightspan.adapters.{module.name}")
    found = {c.__name__ for c in AdapterSpec.__subclasses__() if c.__module__.startswith("lightspan.adapters.")}
    assert found
    assert found == {type(spec).__name__ for spec in CASES.values()}


@EVERY
def test_a_new_adapter_changes_no_bit(spec):
    model, plain = adapted(spec), SmallNet().double()
    freeze_statistics(plain.requires_grad_(False))
    assert torch.equal(model(images(dtype=torch.float64)), plain(images(dtype=torch.float64)))


@EVERY
def test_training_moves_adapters_and_the_named_parameters_and_nothing_else(spec):
    model = adapted(spec, train=("head.*",))
    before, frozen = copy.deepcopy(model.state_dict()), frozen_hash(model)
    for seed in range(STEPS):
        step(model, images(seed=seed, dtype=torch.float64))
    assert frozen_hash(model) == frozen
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"head.weight", "head.bias"} <= changed
    assert all(name.startswith("head.") or ".adapters." in name for name in changed)
    for layer in LAYERS:
        assert any(name.startswith(f"{layer}.adapters.") for name in changed), layer


@EVERY
def test_merging_keeps_the_function_and_twice_is_once(spec):
    model, x = moved(spec), images(dtype=torch.float64)
    if not is_mergeable(model):
        with pytest.raises(UserError, match="no plain layer can represent it"):
            merge(model)
        return
    y, base = model(x), frozen_hash(model)
    merge(model)
    once = model(x)
    merge(model)
    assert torch.equal(model(x), once)
    torch.testing.assert_close(once, y, rtol=1e-12, atol=1e-12)
    assert frozen_hash(model) == base
    unmerge(model)
    assert torch.equal(model(x), y)


@EVERY
def test_folding_gives_plain_layers_with_the_same_function(spec):
    model, x = moved(spec), images(dtype=torch.float64)
    y = model(x)
    if not is_mergeable(model):
        with pytest.raises(UserError, match="no plain layer can represent it"):
            fold(model)
        assert torch.equal(model(x), y)
        return
    fold(model)
    assert model.state_dict().keys() == SmallNet().state_dict().keys()
    assert not any(isinstance(module, Adapted) for module in model.modules())
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)


@EVERY
def test_switched_off_it_is_the_pretrained_model_also_while_merged(spec):
    model, x = moved(spec), images(dtype=torch.float64)
    plain = SmallNet().double()
    freeze_statistics(plain.requires_grad_(False))
    y = model(x)
    with disable_adapters(model):
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model(x), y)
    assert not torch.equal(y, plain(x))
    if is_mergeable(model):
        merge(model)
        with disable_adapters(model):
            assert torch.equal(model(x), plain(x))


@EVERY
def test_a_file_brings_it_back_bit_for_bit(spec, tmp_path):
    model, x = moved(spec), images(dtype=torch.float64)
    save_adapter(model, tmp_path / "a.safetensors")
    again = SmallNet().double()
    load_adapter(again, tmp_path / "a.safetensors", show=False)
    assert torch.equal(again(x), model(x))


@EVERY
def test_the_low_rank_form_is_the_change_of_the_weight(spec):
    for layer in adapted_layers(moved(spec)).values():
        adapter = layer.adapters["default"]
        if not adapter.mergeable:
            with pytest.raises(UserError):
                adapter.low_rank()
            continue
        up_OR, down_RI = adapter.low_rank()
        assert up_OR.shape[1] == down_RI.shape[0] <= adapter.layer.largest_rank
        torch.testing.assert_close(up_OR @ down_RI, adapter.layer.matrix(adapter.delta()), rtol=1e-12, atol=1e-12)


@EVERY
def test_two_on_one_layer_add_up(spec):
    model = adapted(spec)
    adapt(model, LAYERS, spec, name="second", show=False)
    perturb(model)
    for name, layer in adapted_layers(model).items():
        shape = {"line": (2, 12, 9), "volume": (2, 1, 3, 3, 4), "dense": (2, 4)}
        x = torch.randn(shape.get(name, (2, layer.base.weight.shape[1] * getattr(layer, "groups", 1), 8, 8))).double()
        y = layer.base(x)
        both = layer(x) - y
        single = 0
        for only in ("default", "second"):
            activate(model, only)
            single = single + layer(x) - y
        activate(model, "default", "second")
        torch.testing.assert_close(both, single, rtol=1e-10, atol=1e-10)


@EVERY
def test_half_precision_layers_keep_their_adapters_in_float32(spec):
    model = moved(spec, torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    y = model(images(dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(model.float()(images()), y.float(), rtol=0.1, atol=0.1)
    assert model.bfloat16()(images(dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.sample(2)
@EVERY
def test_a_copy_is_independent_and_compiles_to_the_same(spec):
    model, x = moved(spec), images(dtype=torch.float64)
    y = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(torch.compile(twin, backend="eager", fullgraph=True)(x), y)
    perturb(twin)
    assert torch.equal(model(x), y)


@EVERY
@pytest.mark.parametrize("kind", CLOSED)
def test_beside_a_layer_whose_weight_cannot_be_read_it_works_without_it_or_is_refused(kind, spec, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(CLOSED[kind]()).requires_grad_(False)
    x, states = torch.randn(7, 6), {name: t.clone() for name, t in model.named_buffers()}
    plain = model(x)
    if isinstance(spec, SVFit):
        with pytest.raises(UserError, match="this adapter uses the weight"):
            adapt(model, ["0"], spec, show=False)
        assert not adapted_layers(model)
        return
    adapt(model, ["0"], spec, show=False)
    assert torch.equal(model(x), plain)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    frozen = frozen_hash(model)
    for _ in range(STEPS):
        step(perturb(model), x)
    y = model(x)
    assert not torch.equal(y, plain)
    assert frozen_hash(model) == frozen
    assert all(torch.equal(t, states[name]) for name, t in model[0].base.named_buffers(prefix="0"))
    with disable_adapters(model):
        assert torch.equal(model(x), plain)
    for undo in (merge, fold):
        with pytest.raises(UserError, match=r"0 is a \w+ whose weight is packed or recomputed each time"):
            undo(model)
    assert torch.equal(model(x), y)
    save_adapter(model, tmp_path / "a.safetensors")
    torch.manual_seed(0)
    again = nn.Sequential(CLOSED[kind]())
    load_adapter(again, tmp_path / "a.safetensors", show=False)
    assert torch.equal(again(x), y)


def zeros(weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(weight)


def rank_one(weight: torch.Tensor) -> torch.Tensor:
    flat = weight.flatten(1)
    return (flat[:, :1] * flat[:1]).view_as(weight)


def a_dead_unit(weight: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(weight[:1]), weight[1:]])


@pytest.mark.sample(16)
@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", [zeros, rank_one, a_dead_unit])
def test_degenerate_weights_are_ordinary_ones(spec, weights, dtype):
    plain = SmallNet().to(dtype)
    with torch.no_grad():
        for layer in LAYERS:
            plain.get_submodule(layer).weight.copy_(weights(plain.get_submodule(layer).weight))
    freeze_statistics(plain.requires_grad_(False))
    model, x = copy.deepcopy(plain), images(dtype=dtype)
    adapt(model, LAYERS, spec, show=False)
    assert torch.equal(model(x), plain(x))
    for seed in range(STEPS):
        step(model, images(seed=seed, dtype=dtype))
    assert all(p.isfinite().all() for p in model.parameters())
    y = model(x)
    assert y.isfinite().all()
    if is_mergeable(model):
        merge(model)
        near = 100 * torch.finfo(dtype).eps
        torch.testing.assert_close(model(x), y, rtol=near, atol=near)


def one_rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name, spec in CASES.items():
        plain = adapted(spec, train=("head.*",))
        shared = DistributedDataParallel(plain)
        sharded = adapted(spec, train=("head.*",))
        shard_blocks(sharded, mesh)
        for seed in range(STEPS):
            x = images(ROWS, seed, torch.float64).chunk(2)[index]
            step(shared, x)
            step(sharded, x)
        save_adapter(plain, f"{folder}/{name}-ddp.safetensors")
        save_adapter(sharded, f"{folder}/{name}-fsdp.safetensors")
        Path(folder, f"{name}-{index}.txt").write_text(f"{frozen_hash(plain)} {frozen_hash(sharded)}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    rank_processes.start(one_rank, 2, str(folder))
    return folder


@pytest.mark.ranks
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_ranks_train_what_one_process_trains(two_ranks, name, how):
    alone = adapted(CASES[name], train=("head.*",))
    for seed in range(STEPS):
        step(alone, images(ROWS, seed, torch.float64))
    x, again = images(dtype=torch.float64), SmallNet().double()
    load_adapter(again, two_ranks / f"{name}-{how}.safetensors", show=False)
    torch.testing.assert_close(again(x), alone(x), rtol=1e-9, atol=1e-9)
    for index in range(2):
        assert set((two_ranks / f"{name}-{index}.txt").read_text().split()) == {frozen_hash(alone)}
