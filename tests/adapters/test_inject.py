"""Injection into layers that models use in unusual ways, and what it refuses."""

import copy
import dataclasses
import re

import pytest
import torch
from adapters.small_net import LAYERS, SmallNet, images, perturb
from torch import nn
from transformers import BertConfig, BertModel, MambaConfig, MambaForCausalLM
from transformers.pytorch_utils import Conv1D

from lightspan.adapters.adapter import Adapted, Adapter, AdapterSpec
from lightspan.adapters.codyra import GatedLoRA
from lightspan.adapters.flora import FLoRA
from lightspan.adapters.inject import (
    activate,
    adapt,
    adapted_layers,
    disable_adapters,
    fold,
    frozen_hash,
    merge,
    remove,
)
from lightspan.adapters.lora import LoRA
from lightspan.adapters.state import load_adapter, save_adapter
from lightspan.adapters.svfit import SVFit
from lightspan.cli.config.signatures import Signature, signature
from lightspan.core.errors import UserError


class Squared(AdapterSpec):
    """A change that no weight can hold."""

    def build(self, layer: nn.Module, name: str) -> Adapter:
        return SquaredUpdate(layer)


class SquaredUpdate(Adapter):
    mergeable = False

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.scale = nn.Parameter(torch.zeros(self.layer.out_features))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.scale * y.square()

    def delta(self) -> torch.Tensor:
        raise UserError("a square is no change of the weight")


def test_the_table_shows_whole_names_on_a_narrow_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    name = f"a_{'long' * 20}_projection"
    adapt(nn.ModuleDict({name: nn.Linear(4, 4)}), ["*"], LoRA(rank=2))
    said = capsys.readouterr().out
    assert "projection" in re.sub(r"\W", "", said)
    assert "…" not in said


def test_the_table_counts_numbers_and_shares(capsys):
    injection = adapt(SmallNet(), ["stem", "dense"], LoRA(rank=2), train=["head.*"])
    assert {row.module: row.trainable for row in injection.rows} == {"stem": 2 * (8 + 27), "dense": 2 * (10 + 4)}
    assert injection.others == {"head.weight": 40, "head.bias": 4}
    assert injection.trainable == 70 + 28 + 44
    assert injection.total == sum(p.numel() for p in SmallNet().parameters())
    said = capsys.readouterr().out
    assert "8 x 3 x 3 x 3" in said
    assert "142 trained numbers" in said


def test_layers_that_differ_by_their_number_share_a_line(capsys):
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)))
    adapt(model, ["*.0"], LoRA(rank=1))
    assert "│     3 │ *.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("match", "train", "message"),
    [
        (["stemm"], [], "pattern 'stemm' matches no module of SmallNet; names look like stem"),
        (["stem", "norm"], [], "pattern 'norm' matches only BatchNorm2d; adapters take nn.Linear, nn.Conv1d"),
        (["stem"], ["haed.*"], r"pattern 'haed.\*' matches no parameter of SmallNet; names look like head"),
    ],
)
def test_a_pattern_that_chooses_nothing_is_named_and_nothing_changes(match, train, message):
    model = SmallNet()
    with pytest.raises(UserError, match=message):
        adapt(model, match, LoRA(rank=2), train=train)
    assert not adapted_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_rank_that_one_layer_cannot_hold_leaves_the_model_as_it_was():
    model = SmallNet()
    with pytest.raises(UserError, match="rank=5 is above 4, the largest for dense of shape 10 x 4; lower it"):
        adapt(model, ["stem", "dense"], LoRA(rank=5))
    assert not adapted_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_one_name_goes_once_on_a_layer():
    model = SmallNet()
    adapt(model, ["stem"], LoRA(rank=2), show=False)
    with pytest.raises(UserError, match="stem already has an adapter named 'default'; choose another name"):
        adapt(model, ["stem"], LoRA(rank=2), show=False)
    adapt(model, ["dense"], LoRA(rank=2), show=False)
    adapt(model, ["stem"], LoRA(rank=1), name="second", show=False)
    assert {n: list(layer.adapters) for n, layer in adapted_layers(model).items()} == {
        "stem": ["default", "second"],
        "dense": ["default"],
    }
    with pytest.raises(UserError, match="no layer has an adapter named 'third'; there are default, second"):
        activate(model, "third")


def test_a_second_call_leaves_what_trains_training():
    model = SmallNet()
    adapt(model, ["stem"], LoRA(rank=2), train=["head.*"], show=False)
    adapt(model, ["dense"], LoRA(rank=2), show=False)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias", "stem.adapters.default.up_OR", "dense.adapters.default.up_OR"} <= trained


def test_attention_reads_its_output_projection_past_forward_and_gets_the_adapted_one():
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}).double()
    adapt(model, ["*.out_proj"], LoRA(rank=2), show=False)
    x = torch.randn(5, 3, 8).double()
    perturb(model)
    y, _ = model["attention"](x, x, x)
    y.sum().backward()
    adapter = model["attention"].out_proj.adapters["default"]
    assert adapter.up_OR.grad.any()
    fold(model)
    torch.testing.assert_close(model["attention"](x, x, x)[0], y, rtol=1e-12, atol=1e-12)


def test_the_fast_path_of_an_encoder_layer_gets_the_adapted_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).double().eval()
    adapt(model, ["*.linear1", "*.linear2"], LoRA(rank=2), show=False)
    perturb(model)
    x = torch.randn(3, 5, 8).double()
    slow = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), slow, rtol=1e-10, atol=1e-10)


def test_a_change_that_is_none_of_the_weight_is_refused_where_only_the_weight_is_read():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(UserError, match=r"attention.out_proj is part of MultiheadAttention, which reads its weight"):
        adapt(model, ["*.out_proj"], Squared())


def test_a_change_that_is_none_of_the_weight_is_neither_merged_nor_folded():
    model = SmallNet()
    adapt(model, ["dense"], Squared(), show=False)
    for undo in (merge, fold):
        with pytest.raises(UserError, match="adapter 'default' of dense is not a change of the weight alone"):
            undo(model)
    activate(model)
    fold(model)
    assert isinstance(model.dense, nn.Linear)


def test_a_tied_weight_is_changed_for_the_adapted_layer_alone_and_not_folded():
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    adapt(model, ["head"], LoRA(rank=2), show=False)
    perturb(model)
    tokens, embedded = torch.arange(7), model["embed"](torch.arange(7))
    logits = model["head"](embedded)
    merge(model)
    torch.testing.assert_close(model["head"](embedded), logits)
    assert torch.equal(model["embed"](tokens), embedded)
    with pytest.raises(UserError, match="the weight of head is shared with embed, which would change too"):
        fold(model)


def test_a_layer_used_in_two_places_is_adapted_in_both():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": nn.Sequential(shared, nn.ReLU(), shared), "second": nn.Sequential(shared)})
    adapt(model, ["first.0"], LoRA(rank=1), show=False)
    assert isinstance(model["first"][0], Adapted)
    assert model["first"][0] is model["first"][2] is model["second"][0]
    fold(model)
    assert model["first"][0] is model["first"][2] is model["second"][0] is shared


def test_transformers_conv1d_is_a_linear_layer_the_other_way_round():
    torch.manual_seed(0)
    layer = Conv1D(6, 4)
    model = nn.Sequential(layer).double()
    adapt(model, ["0"], LoRA(rank=2), show=False)
    perturb(model)
    x = torch.randn(3, 4).double()
    y = model(x)
    assert adapted_layers(model)["0"].weight.shape == (4, 6)
    merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    fold(model)
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)


def test_a_base_of_integers_is_not_adapted():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        UserError, match=r"0 \(Linear\) cannot have an adapter: its weight is torch.int8; adapters take"
    ):
        adapt(model, ["0"], LoRA(rank=1))


def test_the_frozen_hash_sees_one_bit_and_not_the_adapters():
    model = SmallNet()
    adapt(model, LAYERS, LoRA(rank=1), show=False)
    before = frozen_hash(model)
    perturb(model)
    assert frozen_hash(model) == before
    assert frozen_hash(model.double()) != before
    model.float().norm.running_mean[0] += 1e-7
    assert frozen_hash(model) != before


def test_what_a_layer_knows_is_read_through():
    model = SmallNet()
    adapt(model, LAYERS, LoRA(rank=1), show=False)
    assert (model.stem.out_channels, model.dense.in_features, model.grouped.groups) == (8, 4, 2)
    with pytest.raises(AttributeError, match="nothing"):
        _ = model.stem.nothing


def test_a_file_refuses_other_weights_other_models_and_foreign_classes(tmp_path):
    model = SmallNet()
    adapt(model, ["dense"], LoRA(rank=2), train=["head.*"], show=False)
    perturb(model)
    path = tmp_path / "a.safetensors"
    save_adapter(model, path)
    with pytest.raises(UserError, match=r"was trained on other weights than this SmallNet has \(the SHA-256"):
        load_adapter(SmallNet(seed=1), path)
    other = SmallNet(seed=1)
    load_adapter(other, path, other_weights=True, name="guest", show=False)
    assert torch.equal(other.head.weight, model.head.weight)
    assert list(other.dense.adapters) == ["guest"]
    with pytest.raises(UserError, match="adapts dense, which Sequential does not have"):
        load_adapter(nn.Sequential(nn.Linear(2, 2)), path)
    with pytest.raises(UserError, match="no layer has an adapter named 'x'; there are default"):
        save_adapter(model, path, "x")
    (tmp_path / "b.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(UserError, match=r"b.safetensors is not a complete safetensors file"):
        load_adapter(SmallNet(), tmp_path / "b.safetensors")


def test_the_input_of_the_model_is_untouched():
    model, x = SmallNet(), images()
    adapt(model, LAYERS, LoRA(rank=1, dropout=0.5), show=False)
    perturb(model)
    before = x.clone()
    model(x)
    assert torch.equal(x, before)


def state_of(model: nn.Module) -> dict:
    """Everything that a refusal must leave: modules, flags and tensors."""
    return {
        "modules": {name: type(m) for name, m in model.named_modules()},
        "trains": {name: p.requires_grad for name, p in model.named_parameters()},
        "bits": frozen_hash(copy.deepcopy(model).requires_grad_(False)),
    }


def test_a_refused_file_leaves_the_model_as_it_was(tmp_path):
    model = SmallNet()
    adapt(model, ["stem", "dense"], LoRA(rank=2), train=["head.*"], show=False)
    save_adapter(perturb(model), tmp_path / "a.safetensors")
    fresh = SmallNet()
    fresh.head = nn.Linear(10, 5)  # the file's head does not fit, which is found after the layers
    before = state_of(fresh)
    with pytest.raises(UserError, match=r"head.bias is \[4\], not \[5\]"):
        load_adapter(fresh, tmp_path / "a.safetensors", show=False)
    assert state_of(fresh) == before


@pytest.mark.parametrize(
    ("change", "spec", "train", "message"),
    [
        (lambda m: m, LoRA, [], r"not the class LoRA; write LoRA\(\)"),
        (lambda m: m, "LoRA", [], "spec must be an adapter with its settings, such as LoRA"),
        (lambda m: m.to("meta"), LoRA(rank=2), [], "stem is on the meta device, which has no numbers; load"),
        (lambda m: m.stem, LoRA(rank=2), [], "the model is itself a Conv2d, which no name matches"),
        (lambda m: whole_numbers(m), LoRA(rank=2), ["head.weight"], "head.weight has torch.int32 numbers"),
        (lambda m: own_forward(m), LoRA(rank=2), [], r"stem \(SamePadding\) cannot have an adapter"),
    ],
)
def test_what_cannot_be_adapted_is_named_before_anything_changes(change, spec, train, message):
    model = change(SmallNet())
    before = {name: (type(m), m.training) for name, m in model.named_modules()}
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(UserError, match=message):
        adapt(model, ["stem", "dense"], spec, train=train, show=False)
    assert {name: (type(m), m.training) for name, m in model.named_modules()} == before
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains


class SamePadding(nn.Conv2d):
    """A convolution that pads in a way of its own, as several model libraries have it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


def own_forward(model: SmallNet) -> SmallNet:
    model.stem = SamePadding(3, 8, 2, bias=False)
    return model


def whole_numbers(model: SmallNet) -> SmallNet:
    model.head.weight = nn.Parameter(torch.zeros(4, 10, dtype=torch.int32), requires_grad=False)
    return model


@pytest.mark.parametrize(
    "spec", [LoRA(rank=6, cap=True), GatedLoRA(6, cap=True), SVFit(6, cap=True), FLoRA(6, cap=True)]
)
def test_a_capped_rank_is_the_largest_that_each_layer_can_hold(spec):
    model = SmallNet()
    adapt(model, ["stem", "head"], spec, show=False)
    ranks = {name: layer.adapters["default"].low_rank()[0].shape[1] for name, layer in adapted_layers(model).items()}
    assert ranks == {"stem": 6, "head": 4}
    with pytest.raises(UserError, match="rank=6 is above"):
        adapt(SmallNet(), ["stem", "head"], dataclasses.replace(spec, cap=False))


def test_merging_one_layer_that_cannot_be_merged_merges_none():
    model = SmallNet()
    adapt(model, ["stem"], LoRA(rank=2), show=False)
    adapt(model, ["dense"], Squared(), show=False)
    with pytest.raises(UserError, match="not a change of the weight alone"):
        merge(model)
    assert not model.stem.merged


def test_code_that_reads_a_weight_past_a_change_that_is_none_is_told_which_layer():
    model = SmallNet()
    adapt(model, ["dense"], Squared(), show=False)
    with pytest.raises(
        UserError, match=r"of dense is not a change of the weight alone, .* code that reads a weight would miss it"
    ):
        _ = model.dense.weight


def test_a_file_is_read_in_the_mode_of_the_model(tmp_path):
    model = SmallNet()
    adapt(model, ["dense"], LoRA(rank=2, dropout=0.9), show=False)
    save_adapter(perturb(model), tmp_path / "a.safetensors")
    again = SmallNet().eval()
    load_adapter(again, tmp_path / "a.safetensors", show=False)
    assert torch.equal(again(images()), again(images()))
    assert torch.equal(again(images()), model.eval()(images()))


def test_a_tensor_with_two_names_travels_under_both(tmp_path):
    def tied() -> nn.ModuleDict:
        torch.manual_seed(0)
        model = nn.ModuleDict(
            {"embed": nn.Embedding(7, 4), "mid": nn.Linear(4, 4), "head": nn.Linear(4, 7, bias=False)}
        )
        model["head"].weight = model["embed"].weight
        return model

    model = tied()
    adapt(model, ["mid"], LoRA(rank=2), train=["embed.*"], show=False)
    save_adapter(perturb(model), tmp_path / "a.safetensors")
    apart = tied()
    apart["head"].weight = nn.Parameter(apart["head"].weight.detach().clone())
    for again in (tied(), apart):
        load_adapter(again, tmp_path / "a.safetensors", show=False)
        assert torch.equal(again["embed"].weight, model["embed"].weight)
        assert torch.equal(again["head"].weight, model["embed"].weight)


def test_a_file_has_the_permissions_of_a_new_file(tmp_path):
    model = SmallNet()
    adapt(model, ["dense"], LoRA(rank=2), show=False)
    save_adapter(model, tmp_path / "a.safetensors")
    (tmp_path / "new").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_save_pretrained_of_a_model_with_adapters_says_so_and_of_a_folded_one_does_not(tmp_path, recwarn):
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = BertModel(config)
    adapt(model, ["*.query"], LoRA(rank=2), show=False)
    twin = perturb(copy.deepcopy(model))
    for adapted in (model, twin):
        with pytest.warns(UserWarning, match=r"BertModel.save_pretrained writes .* fold\(model\) first"):
            adapted.save_pretrained(tmp_path / "raw")
    fold(twin)
    recwarn.clear()
    twin.save_pretrained(tmp_path / "folded")
    assert not [w for w in recwarn if "adapters" in str(w.message)]
    assert "save_pretrained" not in vars(twin)
    again, tokens = BertModel.from_pretrained(tmp_path / "folded").eval(), torch.arange(5)[None]
    torch.testing.assert_close(again(tokens)[0], twin.eval()(tokens)[0])


def test_mamba_reads_weights_and_gives_what_the_frozen_model_gives():
    """torch.matmul picks its kernel by `requires_grad`, so it is the frozen model that the bits are those of."""
    config = MambaConfig(vocab_size=11, hidden_size=128, num_hidden_layers=1, state_size=16)
    torch.manual_seed(0)
    model, tokens = MambaForCausalLM(config).eval().requires_grad_(False), torch.arange(9)[None]
    y = model(tokens).logits
    adapt(model, ["*_proj"], LoRA(rank=2), show=False)
    with disable_adapters(model):
        assert torch.equal(model(tokens).logits, y)
    torch.testing.assert_close(model(tokens).logits, y)
    remove(model)
    assert torch.equal(model.requires_grad_(False)(tokens).logits, y)


def test_a_setting_that_an_adapter_does_not_have_is_refused_with_the_one_that_was_meant() -> None:
    for settings, meant in (
        ({"r": 4}, "did you mean rank"),
        ({"aplha": 2}, "did you mean alpha"),
        ({"x": 1}, "it has"),
    ):
        with pytest.raises(UserError, match=f"LoRA has no {next(iter(settings))}; {meant}"):
            LoRA(**settings)
    assert copy.copy(dataclasses.replace(LoRA(4), alpha=2.0)) == LoRA(4, 2.0)
    known = signature("lightspan.adapters.lora.LoRA")  # a recipe with such a setting is refused from source
    assert isinstance(known, Signature)
    assert not known.open
