"""Which rows belong to the queries and keys of a head: in the layers of several libraries."""

from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.models.efficientformer import Attention as EfficientFormerAttention
from timm.models.gcvit import WindowAttentionGlobal
from timm.models.maxxvit import AttentionCl
from timm.models.swin_transformer import SwinTransformer
from timm.models.tiny_vit import Attention as TinyViTAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import (
    BertConfig,
    BertModel,
    CodeGenConfig,
    CodeGenModel,
    DeepseekV3Config,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXModel,
    LlamaConfig,
    LlamaModel,
    ModernBertConfig,
    ModernBertModel,
    Phi3Config,
    Phi3Model,
    Qwen3NextConfig,
    T5Config,
    T5EncoderModel,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.minimax.configuration_minimax import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention

from lightspan.backbones.language import llama
from lightspan.nn.sequences.self_attention import SelfAttention
from lightspan.optim.groups import ParameterGroups, Rule
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.matrices.heads import query_key_heads
from lightspan.optim.muon import FactoredMuon, Muon
from lightspan.optim.parameter_summary import parameter_summary
from lightspan.training.wiring.report import print_report

SMALL = {"num_hidden_layers": 1, "vocab_size": 11, "hidden_size": 32, "intermediate_size": 16}
FEW_KEYS = SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
MODELS = {
    "our Llama": (
        lambda: llama(11, 32, 1, 4, 16, 8),
        {"self_attn.q_proj.weight": [8] * 4, "self_attn.k_proj.weight": [8] * 4},
    ),
    "fewer keys than queries": (
        lambda: LlamaModel(LlamaConfig(**FEW_KEYS)),
        {"self_attn.q_proj.weight": [8] * 4, "self_attn.k_proj.weight": [8] * 2},
    ),
    "the same in one layer": (
        lambda: Phi3Model(Phi3Config(**FEW_KEYS, **TOKENS)),
        {"self_attn.qkv_proj.weight": [8] * 6 + [16]},
    ),
    "BERT": (
        lambda: BertModel(BertConfig(**SMALL, num_attention_heads=2)),
        {"self.query.weight": [16] * 2, "self.key.weight": [16] * 2},
    ),
    "ModernBERT": (
        lambda: ModernBertModel(ModernBertConfig(**SMALL, num_attention_heads=4, **TOKENS)),
        {"attn.Wqkv.weight": [8] * 8 + [32]},
    ),
    "DistilBERT": (
        lambda: DistilBertModel(DistilBertConfig(vocab_size=11, dim=16, n_layers=1, n_heads=2, hidden_dim=16)),
        {"attention.q_lin.weight": [8, 8], "attention.k_lin.weight": [8, 8]},
    ),
    "T5, whose heads are not its width in all": (
        lambda: T5EncoderModel(T5Config(vocab_size=11, d_model=12, d_kv=8, num_layers=1, num_heads=4, d_ff=16)),
        {"SelfAttention.q.weight": [8] * 4, "SelfAttention.k.weight": [8] * 4},
    ),
    "ViT of timm": (
        lambda: VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2),
        {"attn.qkv.weight": [8] * 4 + [16]},
    ),
    "Swin of timm": (
        lambda: SwinTransformer(img_size=32, patch_size=2, embed_dim=16, depths=(1,), num_heads=(2,), window_size=4),
        {"attn.qkv.weight": [8] * 4 + [16]},
    ),
    "torch": (
        lambda: nn.TransformerEncoderLayer(16, 2),
        {"self_attn.in_proj_weight": [8] * 4 + [16]},
    ),
    "torch, other keys": (
        lambda: nn.MultiheadAttention(16, 2, kdim=8, vdim=8),
        {"q_proj_weight": [8, 8], "k_proj_weight": [8, 8]},
    ),
    "our sequences": (lambda: SelfAttention(16, 2), {"qkv.weight": [8] * 4 + [16]}),
    "one head, which is all": (lambda: nn.MultiheadAttention(16, 1, kdim=8, vdim=8), {}),
    "GPT-2, transposed": (lambda: GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=11)), {}),
    "GPT-NeoX, interleaved": (lambda: GPTNeoXModel(GPTNeoXConfig(**SMALL, num_attention_heads=2)), {}),
    "latent attention, whose head_dim is a part of a head": (
        lambda: DeepseekV3Attention(
            DeepseekV3Config(
                hidden_size=32,
                num_attention_heads=2,
                q_lora_rank=None,
                kv_lora_rank=8,
                qk_nope_head_dim=8,
                qk_rope_head_dim=4,
                v_head_dim=8,
            ),
            0,
        ),
        {"q_proj.weight": [12] * 2},
    ),
    "gated attention, whose queries come with their gates": (
        lambda: Qwen3NextAttention(Qwen3NextConfig(**FEW_KEYS, head_dim=4), 0),
        {"q_proj.weight": [8] * 4, "k_proj.weight": [4] * 2},
    ),
    "MaxViT of timm, interleaved": (lambda: AttentionCl(32, dim_head=8), {}),
    "EfficientFormer of timm, interleaved": (lambda: EfficientFormerAttention(32, key_dim=8, num_heads=4), {}),
    "TinyViT of timm, interleaved": (lambda: TinyViTAttention(32, key_dim=8, num_heads=4), {}),
    "CodeGen, interleaved": (
        lambda: CodeGenModel(CodeGenConfig(vocab_size=11, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)),
        {},
    ),
    "lightning attention of MiniMax, interleaved": (
        lambda: MiniMaxLightningAttention(MiniMaxConfig(**FEW_KEYS, head_dim=8), 0),
        {},
    ),
    "no attention": (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_heads_of_every_library_are_found(name) -> None:
    make, expected = MODELS[name]
    model = make()
    heads = query_key_heads(model)
    found = {path: heads[id(p)] for path, p in model.named_parameters() if id(p) in heads}
    assert len(found) == len(expected)
    for path, rows in found.items():
        assert [rows] == [expected[end] for end in expected if path.endswith(end)], path
        assert sum(rows) == len(model.get_parameter(path))


def test_what_names_a_layer_wrongly_or_has_odd_sizes_has_no_heads() -> None:
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.qkv, self.num_heads = nn.Linear(4, 10), nn.Identity(), nn.Linear(4, 10), 4
            self.head_dim = None

    assert query_key_heads(Odd()) == {}


def rows_of(said: dict[str, int], **layers: int) -> list[list[int] | None]:
    """The heads of linear layers, by their names and numbers of rows, in a part of which something is said."""
    part = nn.ModuleDict({name: nn.Linear(4, rows) for name, rows in layers.items()})
    vars(part).update(said)
    heads = query_key_heads(part)
    return [heads.get(id(layer.weight)) for layer in part.values()]


@pytest.mark.parametrize("count", ["num_heads", "num_attention_heads", "n_heads", "n_head", "heads"])
@pytest.mark.parametrize("size", ["head_dim", "attention_head_size", "key_value_proj_dim", "dim_head"])
def test_every_name_of_layers_is_known_with_every_name_of_the_number_and_size_of_heads(count, size) -> None:
    for query, key in (("q_proj", "k_proj"), ("query", "key"), ("to_q", "to_k"), ("q_lin", "k_lin"), ("q", "k")):
        assert rows_of({count: 4, size: 3}, **{query: 12, key: 6}) == [[3] * 4, [3] * 2]
    for together in ("qkv", "Wqkv", "qkv_proj", "to_qkv"):
        assert rows_of({count: 4, size: 3}, **{together: 36}) == [[3] * 8 + [12]]


def test_what_is_no_linear_layer_or_said_by_a_property_has_no_heads() -> None:
    """A property may work only where its own library calls it."""

    class Convolutional(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.num_heads = nn.Conv2d(4, 36, 1), 4

    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(4, 12)

        @property
        def num_heads(self) -> int:
            raise RuntimeError("not initialised")

    assert query_key_heads(nn.Sequential(Convolutional(), Lazy())) == {}


def test_a_fused_layer_of_other_rows_than_its_heads_would_have_has_none() -> None:
    """The global attention of GCViT has keys and values alone, which divide by three here."""
    assert rows_of({"num_heads": 2, "head_dim": 6}, qkv=24) == [None]
    assert query_key_heads(WindowAttentionGlobal(12, 2, (7, 7))) == {}
    assert query_key_heads(WindowAttentionGlobal(12, 2, (7, 7), use_global=False)) != {}


def test_a_class_made_from_one_that_interleaves_is_taken_to_interleave_too() -> None:
    class Own(AttentionCl):
        pass

    assert query_key_heads(Own(32, dim_head=8)) == {}


class Attention(nn.Module):
    """Queries, keys and a fused layer, and what is said of the heads."""

    def __init__(self, **said):
        super().__init__()
        self.q, self.k, self.qkv = nn.Linear(4, 12), nn.Linear(4, 12), nn.Linear(4, 36)
        vars(self).update(said)


def test_looking_for_heads_computes_no_weight() -> None:
    """Computing that of spectral_norm changes its buffers."""
    parts = nn.ModuleList([Attention(num_heads=2), nn.MultiheadAttention(4, 2)])
    spectral_norm(parts[0].q)
    spectral_norm(parts[1], "in_proj_weight")
    before = deepcopy(parts.state_dict())
    found = query_key_heads(parts)
    assert found.keys() == {id(parts[0].k.weight), id(parts[0].qkv.weight)}
    assert all(torch.equal(value, before[name]) for name, value in parts.state_dict().items())


@pytest.mark.parametrize("count", [None, 0, -2, 2.0, True, "2", [2]])
def test_what_is_no_number_of_heads_says_nothing(count) -> None:
    assert query_key_heads(Attention(num_heads=count, head_dim=6)) == {}


def test_a_layer_knows_its_heads_better_than_its_configuration() -> None:
    part = Attention(num_heads=2, config=SimpleNamespace(num_heads=3, num_attention_heads=3))
    heads = query_key_heads(part)
    assert [heads[id(layer.weight)] for layer in (part.q, part.k, part.qkv)] == [[6, 6], [6, 6], [6, 6, 6, 6, 12]]


@pytest.mark.parametrize("said", [{"num_key_value_heads": 2}, {"num_kv_heads": 2}, {"head_dim": 6}])
def test_fewer_keys_than_queries_are_known_by_their_number_or_their_size(said) -> None:
    part = Attention(num_heads=4, **said)
    heads = query_key_heads(part)
    assert (heads[id(part.q.weight)], heads[id(part.k.weight)]) == ([3] * 4, [6] * 2)


def test_groups_of_matrices_name_their_heads_and_no_others_do() -> None:
    model = llama(11, 32, 2, 4, 16, 8)
    model.get_parameter("model.layers.1.self_attn.k_proj.weight").requires_grad_(False)
    rules = [Rule(match=["*layers.1.self_attn.q_proj.weight"], weight_decay=0.5)]
    heads = {group["name"]: group.get("heads") for group in ParameterGroups(rules=rules).build(model)}
    first = {f"model.layers.0.self_attn.{name}_proj.weight": [8] * 4 for name in "qk"}
    assert heads == {
        "matrices": first,
        "matrices-wd0.5": {"model.layers.1.self_attn.q_proj.weight": [8] * 4},
        "embeddings": None,
        "vectors": None,
    }


def test_the_printed_table_tells_which_weights_are_taken_by_heads() -> None:
    optimizer = FactoredMuon(ParameterGroups().build(VisionTransformer(embed_dim=16, depth=1, num_heads=2)))
    group = optimizer.param_groups[0]
    how = {
        name: parameter_summary(optimizer, parameter, group).how
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }
    assert how["blocks.0.attn.qkv.weight"] == "by heads, 5 parts"
    assert how["blocks.0.attn.proj.weight"] == "whole"


@pytest.mark.parametrize("named", [True, False])
def test_the_printed_table_has_the_optimisers_name_and_says_when_no_heads_are_known(named, capsys) -> None:
    model = llama(11, 32, 1, 4, 16, 8)
    print_report(FactoredMuon(ParameterGroups().build(model) if named else model.parameters()))
    printed = capsys.readouterr().out
    assert printed.startswith("FactoredMuon: what each parameter gets")
    assert ("no group names attention heads" in printed) != named
    print_report(FactoredMuon(model.parameters(), by_heads=False))
    assert "attention heads" not in capsys.readouterr().out


def test_a_state_of_an_optimiser_with_heads_loads_as_plain_tensors(tmp_path) -> None:
    model = llama(11, 32, 1, 4, 16, 8)
    optimizer = FactoredMuon(ParameterGroups().build(model))
    model(input_ids=torch.arange(8)[None]).logits.square().mean().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again = FactoredMuon(ParameterGroups().build(model))
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [again.heads_of(p) for p in model.parameters()] == [optimizer.heads_of(p) for p in model.parameters()]


def built() -> tuple[nn.Module, FactoredMuon]:
    torch.manual_seed(0)
    model = llama(11, 32, 1, 4, 16, 8)
    return model, FactoredMuon(ParameterGroups().build(model), lr=0.1)


def stepped(model: nn.Module, optimizer: FactoredMuon) -> list[Tensor]:
    optimizer.zero_grad()
    model(input_ids=torch.arange(8)[None]).logits.square().mean().backward()
    optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def wrapped(group: dict[str, Any]) -> dict[str, Any]:
    """The group of a run whose model was in DistributedDataParallel, which gives parameters longer names."""
    names = {name: f"module.{name}" for name in group["param_names"]}
    return {**group, "param_names": list(names.values())}


def before_names(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "param_names"}


@pytest.mark.parametrize("kind", [FactoredMuon, Muon, torch.optim.AdamW], ids=lambda kind: kind.__name__)
def test_checkpoints_say_nothing_of_heads(kind) -> None:
    optimizer = ParameterGroups().optimizer(llama(11, 32, 1, 4, 16, 8), partial(kind, lr=0.1))
    assert all("heads" not in group for group in optimizer.state_dict()["param_groups"])


@pytest.mark.parametrize("of", [wrapped, before_names])
def test_heads_are_those_of_the_model_whatever_names_a_checkpoint_has(of) -> None:
    model, optimizer = built()
    stepped(model, optimizer)
    weights, saved = deepcopy(model.state_dict()), deepcopy(optimizer.state_dict())
    expected = stepped(model, optimizer)
    resumed, again = built()
    resumed.load_state_dict(weights)
    again.load_state_dict({**saved, "param_groups": [of(group) for group in saved["param_groups"]]})
    assert all(torch.equal(*pair) for pair in zip(stepped(resumed, again), expected, strict=True))


@pytest.mark.parametrize("steps_before", [0, 1])
def test_names_and_heads_are_those_of_the_place_that_another_parameter_takes(steps_before) -> None:
    """As when accelerate shards a model whose optimiser exists already."""
    (first, replaced), (second, fresh) = built(), built()
    for _ in range(steps_before):
        stepped(first, replaced)
    moved = {id(p): other for p, other in zip(first.parameters(), second.parameters(), strict=True)}
    for group in replaced.param_groups:
        group["params"] = [moved[id(p)] for p in group["params"]]
    known = [(replaced.name_of(p), replaced.heads_of(p)) for p in second.parameters()]
    assert known == [(fresh.name_of(p), fresh.heads_of(p)) for p in second.parameters()]
    start = deepcopy(second.state_dict())
    found = stepped(second, replaced)
    second.load_state_dict(start)
    assert all(torch.equal(*pair) for pair in zip(found, stepped(second, fresh), strict=True))


def test_a_parameter_that_takes_a_place_is_known_also_among_groups_in_another_order() -> None:
    model, optimizer = built()
    optimizer.param_groups.reverse()
    known = {name: (name, optimizer.heads_of(p)) for name, p in model.named_parameters()}
    place = optimizer.param_groups[-1]["params"]
    name = optimizer.name_of(place[1])
    place[1] = new = nn.Parameter(place[1].detach().clone())
    assert (optimizer.name_of(new), optimizer.heads_of(new)) == known[name]
    others = [(n, p) for n, p in model.named_parameters() if n != name]
    assert all((optimizer.name_of(p), optimizer.heads_of(p)) == known[n] for n, p in others)


def test_patterns_of_names_choose_the_same_places_when_other_parameters_come() -> None:
    """Also where vectors, which have a group of their own, stood between the matrices."""
    first, second = (nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2))
    optimizer = Muon([{"params": first.named_parameters(), "project": ["linear1.*", "*in_proj_weight"]}])
    moved = {id(p): other for p, other in zip(first.parameters(), second.parameters(), strict=True)}
    for group in optimizer.param_groups:
        group["params"] = [moved[id(p)] for p in group["params"]]
    pairs = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    chosen = {name for name, p in second.named_parameters() for q, g in pairs if q is p and optimizer.projected(p, g)}
    assert chosen == {"linear1.weight", "self_attn.in_proj_weight"}


def test_a_parameter_of_other_rows_has_no_heads_in_the_place_of_one_that_had() -> None:
    weight = nn.Parameter(torch.randn(8, 4))
    optimizer = FactoredMuon([{"params": [("q", weight)], "heads": {"q": [4, 4]}}])
    for shape in ((6, 4), (8, 4)):
        pruned = optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.randn(shape))
        pruned.grad = torch.randn(shape)
        optimizer.step()
        assert optimizer.heads_of(pruned) == ((4, 4) if shape == (8, 4) else ())


def test_low_rank_takes_groups_with_heads_and_treats_them_as_any_other() -> None:
    """Coordinates are no rows of the parameter."""
    weight = nn.Parameter(torch.ones(12, 40))
    optimizer = LowRank([{"params": [("q", weight)], "heads": {"q": [4] * 3}}], rank=4)
    assert optimizer.heads_of(weight) == ()
