"""PaCA: what trains is exactly some columns of the weight, drawn once, and of the input only theirs is kept."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lightspan.adapters.adapter import AdapterSpec
from lightspan.adapters.full import Full
from lightspan.adapters.inject import adapt, adapted_layers, fold, merge, unmerge
from lightspan.adapters.lora import LoRA
from lightspan.adapters.paca import PaCA, PaCAUpdate
from lightspan.adapters.state import load_adapter, save_adapter
from lightspan.core.errors import UserError

LAYERS = {
    "linear": (nn.Linear(9, 6), (5, 9)),
    "tokens": (nn.Linear(9, 6, bias=False), (2, 5, 9)),
    "transposed": (Conv1D(6, 9), (2, 5, 9)),
    "wide": (nn.Linear(9, 2), (5, 9)),
    "conv1d": (nn.Conv1d(6, 8, 3, padding=1, dilation=2), (2, 6, 11)),
    "grouped": (nn.Conv2d(8, 6, 3, stride=2, groups=2), (2, 8, 9, 9)),
    "reflected": (nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (2, 6, 9, 9)),
    "one image": (nn.Conv2d(6, 8, 3), (6, 9, 9)),
    "conv3d": (nn.Conv3d(4, 8, (2, 3, 1)), (2, 4, 5, 6, 4)),
}
EVERY = pytest.mark.parametrize("name", LAYERS)
RANK = 3


def drawn(name: str, **settings: float) -> tuple[nn.Module, PaCAUpdate, Tensor]:
    torch.manual_seed(0)
    layer, shape = copy.deepcopy(LAYERS[name])
    layer = layer.double()
    return layer, PaCA(RANK, **settings).build(layer, name), torch.randn(shape).double()


def columns(layer: nn.Module, adapter: PaCAUpdate, weight: Tensor) -> Tensor:
    """Those of a weight-shaped tensor that train [O M], by plain indexing."""
    if isinstance(layer, Conv1D):
        return weight[adapter.inputs_R].T
    return weight[:, adapter.inputs_R].flatten(1)


@EVERY
def test_the_gradient_is_that_of_the_whole_weight_at_the_columns(name: str) -> None:
    layer, adapter, x = drawn(name)
    y = layer(x)
    target = torch.randn_like(y)
    (y.detach() + adapter(x, y) - target).square().sum().backward()
    (layer(x) - target).square().sum().backward()
    expected = columns(layer, adapter, layer.weight.grad)
    torch.testing.assert_close(adapter.change_OM.grad, expected, rtol=1e-12, atol=1e-12)


@EVERY
def test_the_gradient_of_the_input_is_that_of_the_merged_weight(name: str) -> None:
    layer, adapter, x = drawn(name)
    nn.init.normal_(adapter.change_OM)
    apart, merged = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = layer(apart)
    (y + adapter(apart, y)).square().sum().backward()
    changed = {"weight": layer.weight + adapter.delta()}
    torch.func.functional_call(layer, changed, (merged,)).square().sum().backward()
    torch.testing.assert_close(apart.grad, merged.grad, rtol=1e-10, atol=1e-10)


@EVERY
def test_the_merged_weight_is_the_weight_with_these_columns_replaced(name: str) -> None:
    layer, _, _ = drawn(name)
    model = nn.Sequential(copy.deepcopy(layer))
    adapt(model, ["0"], PaCA(RANK, alpha=6.0), show=False)
    adapter = adapted_layers(model)["0"].adapters["default"]
    nn.init.normal_(adapter.change_OM)
    shape = columns(layer, adapter, layer.weight).shape
    new = columns(layer, adapter, layer.weight) + 2 * adapter.change_OM.view(shape)
    expected = layer.weight.detach().clone()
    if isinstance(layer, Conv1D):
        expected[adapter.inputs_R] = new.detach().T
    else:
        expected[:, adapter.inputs_R] = new.detach().view_as(expected[:, adapter.inputs_R])
    merge(model)
    assert torch.equal(model[0].weight, expected)
    unmerge(model)
    assert torch.equal(model[0].base.weight, layer.weight)
    fold(model)
    assert torch.equal(model[0].weight, expected)


def test_as_many_columns_as_there_are_train_what_full_fine_tuning_trains() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 4).double(), torch.randn(7, 5).double()
    changes = []
    for spec in (PaCA(rank=5), Full()):
        model = nn.Sequential(copy.deepcopy(layer))
        adapt(model, ["0"], spec, show=False)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        fold(model)
        changes.append(model[0].weight.detach())
    torch.testing.assert_close(*changes, rtol=1e-12, atol=1e-12)


def test_more_columns_than_there_are_are_refused_or_capped() -> None:
    for layer, most in ((nn.Linear(5, 40), 5), (nn.Conv2d(8, 8, 3, groups=4), 2), (nn.Conv2d(6, 6, 3, groups=6), 1)):
        with pytest.raises(UserError, match=f"rank={most + 1} is above {most}.*here"):
            PaCA(rank=most + 1).build(layer, "here")
        assert PaCA(rank=99, cap=True).build(layer, "here").inputs_R.tolist() == list(range(most))
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"alpha": float("nan")}, {"seed": -1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            PaCA(**wrong)


def test_columns_follow_from_seed_and_name_alone() -> None:
    def of(name: str, seed: int = 0, start: int = 0, rank: int = 5) -> list[int]:
        torch.manual_seed(start)
        return PaCA(rank, seed=seed).build(nn.Linear(50, 3), name).inputs_R.tolist()

    chosen = of("blocks.0.query")
    assert chosen == sorted(set(chosen))
    assert chosen == of("blocks.0.query", start=1)
    assert chosen != of("blocks.0.query", seed=1)
    assert chosen != of("blocks.0.value")
    assert set(chosen) < set(of("blocks.0.query", rank=6))


def test_every_column_is_drawn_alike() -> None:
    """Of 1,000 draws of 3 of 10 columns, each is in 300 up to 5 standard deviations."""
    layer = nn.Linear(10, 1)
    counts = torch.zeros(10)
    for seed in range(1000):
        counts[PaCA(3, seed=seed).build(layer, "layer").inputs_R] += 1
    assert counts.sum() == 3000
    assert (counts - 300).abs().max() < 5 * (1000 * 0.3 * 0.7) ** 0.5


@contextmanager
def kept_bytes(model: nn.Module) -> Iterator[list[int]]:
    """Sizes of what autograd keeps for the backward pass, without parameters and buffers, each memory once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            own.add(place)
            sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


def kept(spec: AdapterSpec, inputs: int, outputs: int, x: Tensor) -> int:
    model = nn.Sequential(nn.Linear(inputs, outputs).to(x.dtype))
    adapt(model, ["0"], spec, show=False)
    with kept_bytes(model) as sizes:
        model(x)
    return sum(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_the_input_only_the_columns_are_kept(dtype: torch.dtype) -> None:
    """In bytes: R floats a token, the scaled change, and the numbers of the columns; LoRA keeps the input, in float32,
    and R floats a token."""
    tokens, inputs, outputs, rank = 2 * 7, 64, 48, 4
    x = torch.randn(2, 7, inputs, dtype=dtype, requires_grad=True)
    assert kept(PaCA(rank), inputs, outputs, x) == 4 * (tokens * rank + outputs * rank) + 8 * rank
    assert kept(LoRA(rank), inputs, outputs, x) == 4 * (tokens * inputs + tokens * rank + outputs * rank)


def two_layers(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5)).to(dtype)


def trained(model: nn.Module, x: Tensor, recomputed: bool = False, steps: int = 3) -> dict[str, Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    for _ in range(steps):
        y = checkpoint(model, x, use_reentrant=False) if recomputed else model(x)
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_recomputed_activations_change_no_bit() -> None:
    x, states = torch.randn(6, 8).double(), []
    for recomputed in (False, True):
        model = two_layers()
        adapt(model, ["0", "2"], PaCA(RANK), show=False)
        states.append(trained(model, x, recomputed))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_layer_used_twice_has_one_set_of_columns_and_both_gradients() -> None:
    torch.manual_seed(0)
    shared, x = nn.Linear(6, 6).double(), torch.randn(4, 6).double()
    model = nn.Sequential(shared, nn.Tanh(), shared)
    plain = copy.deepcopy(model)
    adapt(model, ["0"], PaCA(2), show=False)
    assert model[0] is model[2]
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    (adapter,) = model[0].adapters.values()
    expected = plain[0].weight.grad[:, adapter.inputs_R]
    torch.testing.assert_close(adapter.change_OM.grad, expected, rtol=1e-12, atol=1e-12)


def test_steps_below_the_resolution_of_bfloat16_are_not_lost() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).bfloat16()
    nn.init.ones_(model[0].weight)
    adapt(model, ["0"], PaCA(2), show=False)
    adapter = model[0].adapters["default"]
    change, moved_R = adapter.change_OM, adapter.inputs_R
    assert change.dtype == torch.float32
    with torch.no_grad():
        for _ in range(64):
            change += 2.0**-12  # 1 + 2^-12 is 1 in bfloat16
    fold(model)
    assert (model[0].weight[:, moved_R] == 1 + 2.0**-6).all()
    assert (model[0].weight != 1).sum() == 3 * 2


def test_the_columns_of_a_checkpoint_and_of_a_file_count_not_those_of_another_draw(tmp_path: Path) -> None:
    model, x = two_layers(), torch.randn(6, 8).double()
    adapt(model, ["0", "2"], PaCA(RANK, seed=1), show=False)
    state = trained(model, x)
    again = two_layers()
    adapt(again, ["0", "2"], PaCA(RANK, seed=2), show=False)
    again.load_state_dict(state)
    assert torch.equal(again(x), model(x))
    save_adapter(model, tmp_path / "a.safetensors")
    loaded = two_layers()
    load_adapter(loaded, tmp_path / "a.safetensors", show=False)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("wrong", [[0, 9], [-1, 2], [2, 1], [1, 1], [0.0, 1.0]])
def test_a_file_whose_columns_are_none_of_the_layer_is_refused(wrong: list[float]) -> None:
    adapter = PaCA(2).build(nn.Linear(9, 4), "layer")
    with pytest.raises(UserError, match="inputs_R"):
        adapter.restore({"change_OM": torch.zeros(4, 2), "inputs_R": torch.tensor(wrong)})
    adapter.restore({"change_OM": torch.ones(4, 2), "inputs_R": torch.tensor([0, 8])})
    assert adapter.inputs_R.tolist() == [0, 8]


def test_peft_reads_the_columns_as_a_lora_that_chooses_them(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from lightspan.adapters.peft import save_peft

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(3, 9)
    plain = copy.deepcopy(model)
    adapt(model, ["0", "2"], PaCA(RANK, alpha=5.0), show=False)
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.adapters["default"].change_OM)
    save_peft(model, tmp_path)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(plain, tmp_path)(x), model(x))
