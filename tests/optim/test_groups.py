"""Parameter groups: who is in which of them, on models of three libraries, and what the printed table says."""

import copy

import pytest
import torch
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.metaformer import MetaFormer, SepConv
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ViTConfig,
    ViTModel,
)

from lightspan.backbones.diffusion import DiT
from lightspan.backbones.language import llama
from lightspan.core.errors import UserError
from lightspan.optim.groups import ParameterGroups
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.parameter_summary import parameter_summary
from lightspan.training.wiring.report import print_report


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.hidden, self.norm = nn.Embedding(10, 8), nn.Linear(8, 12), nn.LayerNorm(12)
        self.conv, self.frozen, self.lm_head = nn.Conv2d(3, 9, 3), nn.Linear(8, 8), nn.Linear(12, 10, bias=False)
        self.frozen.requires_grad_(False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))


def names(groups):
    return {group["name"]: [name for name, _ in group["params"]] for group in groups}


def test_every_trainable_parameter_is_in_the_group_its_kind_asks_for():
    assert names(ParameterGroups().build(Model())) == {
        "matrices": ["hidden.weight", "conv.weight"],
        "embeddings": ["cls_token", "wte.weight", "lm_head.weight"],
        "vectors": ["hidden.bias", "norm.weight", "norm.bias", "conv.bias"],
    }


def of_kind(model, kind):
    return {name for group in ParameterGroups().build(model) if group["name"] == kind for name, _ in group["params"]}


SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_classes": 0}
MIXERS = {
    "MLP-Mixer": lambda: MlpMixer(num_blocks=1, **SMALL),
    "ResMLP": lambda: MlpMixer(num_blocks=1, mlp_ratio=4, block_layer=ResBlock, norm_layer=Affine, **SMALL),
    "CaiT": lambda: Cait(depth=1, depth_token_only=1, num_heads=2, **SMALL),
    "MetaFormer": lambda: MetaFormer(depths=(1, 1), dims=(8, 16), token_mixers=SepConv, num_classes=0),
}


@pytest.mark.parametrize("name", MIXERS)
def test_layers_that_mix_tokens_are_matrices(name):
    model = MIXERS[name]()
    layers = {f"{n}.weight" for n, part in model.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}
    assert any("token" in layer for layer in layers)
    assert layers <= of_kind(model, "matrices")


TABLES_OF = {
    "ViT": (
        lambda: VisionTransformer(depth=1, num_heads=2, reg_tokens=2, **SMALL),
        {"cls_token", "reg_token", "pos_embed"},
    ),
    "Swin": (
        lambda: SwinTransformer(16, 2, window_size=4, embed_dim=8, depths=(1,), num_heads=(2,), num_classes=0),
        {"layers.0.blocks.0.attn.relative_position_bias_table"},
    ),
    "BEiT": (
        lambda: Beit(depth=1, num_heads=2, use_abs_pos_emb=True, use_rel_pos_bias=True, **SMALL),
        {"cls_token", "pos_embed", "blocks.0.attn.relative_position_bias_table"},
    ),
    "Hugging Face ViT": (
        lambda: ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                   image_size=16, patch_size=8), use_mask_token=True),
        {"embeddings.cls_token", "embeddings.mask_token", "embeddings.position_embeddings"},
    ),
    "Hugging Face Llama": (
        lambda: llama(vocab_size=11, width=8, depth=1, heads=2, mlp_width=8),
        {"model.embed_tokens.weight", "lm_head.weight"},
    ),
    "Hugging Face BERT": (
        lambda: BertForMaskedLM(BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                           intermediate_size=8, tie_word_embeddings=False)),
        {"cls.predictions.decoder.weight", *(f"bert.embeddings.{n}_embeddings.weight"
                                             for n in ("word", "position", "token_type"))},
    ),
    "DiT": (lambda: DiT(4, 2, width=8, depth=1, heads=2, num_classes=10), {"label.weight"}),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES_OF)
def test_tables_and_tokens_are_embeddings_also_inside_another_module_and_in_a_copy(name):
    make, expected = TABLES_OF[name]
    model = make()
    assert of_kind(model, "embeddings") == expected
    assert of_kind(copy.deepcopy(nn.ModuleDict({"net": model})), "embeddings") == {f"net.{n}" for n in expected}
    assert len(of_kind(model, "matrices")) >= 4


def test_tokens_that_peft_trains_beside_a_frozen_table_are_embeddings():
    adapter = nn.ModuleDict({"base_layer": nn.Embedding(10, 4).requires_grad_(False)})
    adapter["trainable_tokens_delta"] = nn.ParameterDict({"default": torch.zeros(2, 4)})
    model = nn.ModuleDict({"embed_tokens": adapter, "hidden": nn.Linear(4, 4)})
    assert of_kind(model, "embeddings") == {"embed_tokens.trainable_tokens_delta.default"}
    assert of_kind(model, "matrices") == {"hidden.weight"}


class Scan(nn.Module):
    """A state-space layer in the usual style: a table of rates that must not decay, marked on the parameter."""

    def __init__(self):
        super().__init__()
        self.A_log, self.mix = nn.Parameter(torch.zeros(8, 4)), nn.Linear(8, 8)
        self.A_log._no_weight_decay = True


def test_what_its_module_declares_goes_before_every_other_rule():
    model = nn.ModuleDict({"scan": Scan(), "table": nn.Embedding(4, 4), "cls_token": nn.Linear(4, 4)})
    assert of_kind(model, "embeddings") == {"scan.A_log", "table.weight"}
    model["table"].parameter_kinds = {"weight": "matrices"}
    model["cls_token"].parameter_kinds = {"weight": "vectors", "bias": "embeddings"}
    assert of_kind(model, "embeddings") == {"scan.A_log", "cls_token.bias"}
    assert of_kind(model, "matrices") == {"scan.mix.weight", "table.weight"}


@pytest.mark.parametrize("kinds", [{"wieght": "vectors"}, {"weight": "table"}])
def test_a_declaration_that_names_nothing_is_refused(kinds):
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].parameter_kinds = kinds
    with pytest.raises(UserError, match=r"0.parameter_kinds says .* parameters are weight, bias, the kinds matrices"):
        ParameterGroups().build(model)


def test_only_matrices_decay_and_only_they_are_projected():
    optimizer = LowRank(ParameterGroups(other_lr=0.5).build(Model()), lr=0.1, rank=4, weight_decay=0.2)
    rows = [(g["name"], g["lr"], g["weight_decay"], g["project"]) for g in optimizer.param_groups]
    assert rows == [("matrices", 0.1, 0.2, True), ("embeddings", 0.5, 0.0, False), ("vectors", 0.5, 0.0, False)]
    assert [optimizer.projected(p, g) for g in optimizer.param_groups for p in g["params"]] == [True, True] + [
        False
    ] * 7


def test_the_same_groups_fit_torchs_own_optimisers():
    optimizer = torch.optim.AdamW(ParameterGroups(other_lr=0.5).build(Model()), lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5, 0.5]


def test_a_module_with_nothing_to_train_and_a_rate_of_zero_are_refused():
    with pytest.raises(UserError, match="Linear has no parameter with requires_grad=True"):
        ParameterGroups().build(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(UserError, match=r"groups.other_lr=0.0 must be finite and above 0"):
        ParameterGroups(other_lr=0.0).build(Model())


@pytest.mark.parametrize("make", [ParameterGroups().build, lambda m: LowRank(m.parameters(), rank=2),
                                  lambda m: LowRank(m.named_parameters(), rank=2)])  # fmt: skip
def test_layers_without_a_shape_are_refused_and_fit_after_a_batch(make):
    """They would count as vectors for good."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(6))
    with pytest.raises(UserError, match=r"no shape is known yet of (1.weight, 1.bias|a parameter, ).* on one batch"):
        make(model)
    model(torch.ones(1, 4))
    make(model)


def test_the_report_counts_the_state_that_the_optimiser_really_keeps(capsys):
    model = Model()
    optimizer = LowRank(ParameterGroups().build(model), rank=4)
    planned = [parameter_summary(optimizer, p, g) for g in optimizer.param_groups for p in g["params"]]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for t, parameter in zip(planned, [p for g in optimizer.param_groups for p in g["params"]], strict=True):
        assert t.state_bytes == sum(v.nbytes for v in optimizer.state[parameter].values())
    print_report(optimizer)
    assert {t.how for t in planned} == {"rank 4 of 8", "rank 4 of 9", "AdamW: a vector", "AdamW: not selected"}
    printed = capsys.readouterr().out
    assert "of AdamW's" in printed
    rows = [line for line in printed.splitlines() if "rank 4 of" in line or "AdamW: " in line]
    assert sum(int(row.split()[0]) for row in rows) == len(planned)  # none is broken into two lines
    assert max(map(len, printed.splitlines())) <= 80


def test_the_report_names_the_rate_that_was_asked_for_and_not_that_of_a_warm_up():
    optimizer = LowRank(ParameterGroups().build(Model()), lr=0.25, rank=4)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    assert {parameter_summary(optimizer, p, g).rate for g in optimizer.param_groups for p in g["params"]} == {0.25}


class Declared(nn.Linear):
    parameter_kinds = {"weight": "embeddings"}  # noqa: RUF012 - read by lightspan.optim.groups


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_what_a_class_declares_of_a_weight_holds_for_its_parametrisation(norm):
    model = norm(Declared(4, 4))
    made = {name for name, _ in model.named_parameters() if name != "bias"}
    assert of_kind(model, "embeddings") == made
    assert of_kind(copy.deepcopy(model), "embeddings") == made


def test_a_module_may_declare_nothing():
    model = Declared(4, 4)
    model.parameter_kinds = None
    assert of_kind(model, "matrices") == {"weight"}


def test_modules_that_disagree_on_a_tied_weight_are_refused():
    model = nn.Sequential(Declared(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert of_kind(model, "embeddings") == {"0.weight"}
    model[1].parameter_kinds = {"weight": "matrices"}
    with pytest.raises(UserError, match=r"0\.weight and 1\.weight are one tied parameter.*embeddings.*and matrices in"):
        ParameterGroups().build(model)
