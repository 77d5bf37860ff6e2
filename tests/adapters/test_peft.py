"""PEFT folders, read by PEFT itself and read back, for every adapter that has a low-rank form."""

import copy
import json

import pytest
import torch
from adapters.cases import CASES
from adapters.small_net import images, perturb
from safetensors.torch import save_file
from torch import nn

from lightspan.adapters.inject import adapt, adapted_layers, freeze_statistics
from lightspan.adapters.lora import LoRA
from lightspan.adapters.peft import WEIGHTS, StoredChange, load_peft, save_peft
from lightspan.core.errors import UserError

peft = pytest.importorskip("peft")

BUILT = {name: spec.build(nn.Linear(4, 4), "layer") for name, spec in CASES.items()}
LOW_RANK = [name for name, adapter in BUILT.items() if adapter.mergeable and adapter.bias_delta() is None]
EVERY = pytest.mark.parametrize("name", LOW_RANK)


class Net(nn.Module):
    """Layers that PEFT's LoRA can run, two of whose names end alike."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2)
        self.depthwise = nn.Conv2d(12, 12, 3, padding="same", groups=12)
        self.dense = nn.Linear(12, 10)
        self.inner = nn.ModuleDict({"dense": nn.Linear(10, 8)})
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.depthwise(self.grouped(self.norm(self.stem(x)).tanh()).tanh()).tanh()
        return self.head(self.inner["dense"](self.dense(h.mean(dim=(2, 3))).tanh()).tanh())


MATCH = ["stem", "grouped", "depthwise", "dense", "inner.*"]


def trained(spec, match=MATCH, train=("head.*",)):
    model = Net().double().eval()
    adapt(model, match, spec, train=train, show=False)
    return perturb(model)


@EVERY
def test_peft_loads_the_folder_and_says_the_same(name, tmp_path, capsys):
    model, x = trained(CASES[name]), images(dtype=torch.float64)
    save_peft(model, tmp_path / "p")
    theirs = peft.PeftModel.from_pretrained(Net().double().eval(), str(tmp_path / "p"))
    difference = (theirs(x) - model(x)).abs().max().item()
    with capsys.disabled():
        print(f"\n{name}: largest difference under PEFT {difference:.2g}")
    assert difference < 1e-12


@EVERY
def test_the_folder_is_read_back_as_a_lora_with_the_same_function(name, tmp_path):
    model, x = trained(CASES[name]), images(dtype=torch.float64)
    save_peft(model, tmp_path / "p")
    again = Net().double().eval()
    injection = load_peft(again, tmp_path / "p", show=False)
    torch.testing.assert_close(again(x), model(x), rtol=1e-12, atol=1e-12)
    assert {row.module for row in injection.rows} == set(adapted_layers(model))
    assert {n for n, p in again.named_parameters() if p.requires_grad and ".adapters." not in n} == {
        "head.weight",
        "head.bias",
    }


def test_the_list_of_adapters_for_peft_is_not_empty_and_others_are_refused_by_layer(tmp_path):
    assert LOW_RANK
    for name in BUILT.keys() - set(LOW_RANK):
        with pytest.raises(UserError, match="stem"):
            save_peft(trained(CASES[name]), tmp_path)
    assert not any(tmp_path.iterdir())


def test_layers_of_different_rank_are_told_apart_although_their_names_end_alike(tmp_path):
    model, x = Net().double().eval(), images(dtype=torch.float64)
    adapt(model, ["dense"], LoRA(rank=3, alpha=1.5), show=False)
    adapt(model, ["inner.dense", "stem"], LoRA(rank=2), show=False)
    perturb(model)
    save_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (2, {"^dense": 3})
    theirs = peft.PeftModel.from_pretrained(Net().double().eval(), str(tmp_path))
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {
            "lora_alpha": 6,
            "rank_pattern": {"inner.dense": 2},
            "alpha_pattern": {"stem": 3},
            "modules_to_save": ["head"],
        },
        {"lora_alpha": 6, "use_rslora": True},
    ],
)
def test_a_folder_made_by_peft_loads_here(tmp_path, settings):
    config = peft.LoraConfig(r=4, target_modules=["stem", "dense"], **settings)
    theirs = perturb(peft.get_peft_model(Net().eval(), config)).eval()
    theirs.save_pretrained(tmp_path)
    ours, x = Net().eval(), images()
    load_peft(ours, tmp_path, show=False)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_transformers_conv1d_goes_there_and_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=11, n_positions=8)
    torch.manual_seed(0)
    pretrained = transformers.GPT2LMHeadModel(config).double().eval()
    model, tokens = copy.deepcopy(pretrained), torch.arange(8)[None]
    adapt(model, ["*.c_attn"], CASES["SVFit"], show=False)
    perturb(model)
    save_peft(model, tmp_path)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(pretrained), str(tmp_path))
    torch.testing.assert_close(theirs(tokens).logits, model(tokens).logits, rtol=1e-10, atol=1e-10)
    load_peft(pretrained, tmp_path, show=False)
    torch.testing.assert_close(pretrained(tokens).logits, model(tokens).logits, rtol=1e-10, atol=1e-10)


def test_what_a_folder_cannot_hold_is_named(tmp_path):
    with pytest.raises(UserError, match=r"norm.bias trained by itself, but PEFT saves whole modules"):
        save_peft(trained(LoRA(rank=2), train=["norm.bias"]), tmp_path)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, dilation=2))
    adapt(model, ["0"], LoRA(rank=2), show=False)
    with pytest.raises(UserError, match="0 cannot go into a PEFT LoRA folder: PEFT runs it without"):
        save_peft(model, tmp_path)
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    adapt(attention, ["*.out_proj"], LoRA(rank=2), show=False)
    with pytest.raises(UserError, match="it is part of an attention that reads its weight"):
        save_peft(attention, tmp_path)
    with pytest.raises(UserError, match="no layer has an adapter named 'default'"):
        save_peft(Net(), tmp_path)
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"is not a PEFT folder with adapter_config.json and adapter_model.safetensors"):
        load_peft(Net(), tmp_path)
    save_peft(trained(LoRA(rank=2)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    with pytest.raises(UserError, match=r"contains head.bias, for which Sequential has no place"):
        load_peft(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    for change, message in (({"peft_type": "IA3"}, "of type 'IA3'; only LORA"), ({"use_dora": True}, "uses use_dora")):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            load_peft(Net(), tmp_path)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"A.weight": torch.ones(2), "B.weight": torch.ones(10)}, "are not the factors of a weight"),
        ({"A.weight": torch.tensor(1.0), "B.weight": torch.tensor(1.0)}, "are not the factors of a weight"),
        ({"A.weight": torch.ones(2, 12), "B.weight": torch.ones(0, 2)}, "are not the factors of a weight"),
        ({"A.weight": torch.ones(2, 12) * 1j, "B.weight": torch.ones(10, 2)}, "torch.complex64 and lora_B"),
        ({"A.default.weight": torch.ones(2, 12), "B.default.weight": torch.ones(10, 2)}, "of a LoRA only NAME.lora_A"),
        ({"embedding_A": torch.ones(2, 12), "embedding_B": torch.ones(10, 2)}, "of a LoRA only NAME.lora_A"),
        ({"magnitude_vector": torch.ones(10)}, "of a LoRA only NAME.lora_A"),
    ],
)
def test_factors_that_are_none_are_named_with_their_layer(factors, message, tmp_path):
    save_peft(trained(LoRA(rank=2)), tmp_path)
    save_file({f"base_model.model.dense.lora_{n}": t for n, t in factors.items()}, tmp_path / WEIGHTS)
    for read in (lambda: load_peft(Net(), tmp_path), lambda: StoredChange(tmp_path)):
        with pytest.raises(UserError, match=message) as raised:
            read()
        assert "dense" in str(raised.value)


def test_running_statistics_travel_with_a_norm_that_trained(tmp_path):
    model, x = Net().eval(), images()
    adapt(model, ["stem"], LoRA(rank=2), train=["norm.*"], show=False)
    freeze_statistics(model)
    model.norm.running_mean += 0.5
    save_peft(perturb(model), tmp_path)
    theirs = peft.PeftModel.from_pretrained(Net().eval(), str(tmp_path))
    torch.testing.assert_close(theirs(x), model(x))


def llama(tied: bool = True):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    if not tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    return model


TOKENS = torch.arange(9)[None]


@pytest.mark.filterwarnings("ignore:Model has")
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_tied_weight_in_a_folder_of_peft_is_read_as_peft_reads_it_or_refused(tmp_path, saved, tie):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved, ensure_weight_tying=tie)
    theirs = perturb(peft.get_peft_model(llama(), config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = llama(tied=tie)
    load_peft(ours, tmp_path, show=False)
    torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits)
    if not tie:
        with pytest.raises(
            UserError, match=r"(same|one) tensor .*layer = model.get_submodule\('(lm_head|model.embed_tokens)'\)"
        ):
            load_peft(llama(), tmp_path, show=False)


@pytest.mark.filterwarnings("ignore:Model has")
def test_a_tied_weight_that_trained_says_the_same_under_peft_and_here(tmp_path):
    model = llama()
    adapt(model, ["*q_proj"], LoRA(rank=2), train=["*embed_tokens*"], show=False)
    save_peft(perturb(model), tmp_path)
    y = model(TOKENS).logits
    theirs = peft.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(TOKENS).logits, y)
    again = llama()
    load_peft(again, tmp_path, show=False)
    torch.testing.assert_close(again(TOKENS).logits, y)
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("start", ["pissa", "olora", "gaussian", "orthogonal", False])
def test_a_folder_whose_start_changed_the_base_weights_is_refused_and_others_load(tmp_path, start):
    config = peft.LoraConfig(r=2, target_modules=["stem", "dense"][start in ("pissa", "olora", "orthogonal") :],
                             init_lora_weights=start)  # fmt: skip
    theirs = perturb(peft.get_peft_model(Net().eval(), config)).eval()
    theirs.save_pretrained(tmp_path)
    ours, x = Net().eval(), images()
    if start in ("pissa", "olora"):
        with pytest.raises(UserError, match=f"made with init_lora_weights='{start}', which changes the base weights"):
            load_peft(ours, tmp_path, show=False)
        assert not adapted_layers(ours)
        return
    load_peft(ours, tmp_path, show=False)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_a_rank_above_what_a_layer_can_have_loads_with_the_same_function(tmp_path):
    config = peft.LoraConfig(r=6, target_modules=["head", "dense"], init_lora_weights=False)
    theirs = peft.get_peft_model(Net().eval(), config).eval()
    theirs.save_pretrained(tmp_path)
    ours, x = Net().eval(), images()
    load_peft(ours, tmp_path, show=False)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_a_refused_folder_leaves_the_model_as_it_was(tmp_path):
    save_peft(trained(LoRA(rank=2)).float(), tmp_path)
    model = Net()
    model.inner["dense"] = nn.Linear(10, 9)  # the last layer of the folder does not fit
    before, modules = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(
        UserError, match=r"inner.dense: lora_A \[2, 10\] and lora_B \[8, 2\] belong to a layer of other"
    ):
        load_peft(model, tmp_path, show=False)
    assert [type(m) for m in model.modules()] == modules
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_the_files_have_the_permissions_of_new_files(tmp_path):
    save_peft(trained(LoRA(rank=2)), tmp_path)
    (tmp_path / "new").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_a_model_that_asks_a_layer_for_what_peft_does_not_have_is_named(tmp_path):
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv1d(3, 4, 3, stride=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x) * self.first.stride[0]

    model = nn.Sequential(Encoder())
    adapt(model, ["0.first"], LoRA(rank=2), show=False)
    with pytest.warns(UserWarning, match="Encoder seems to read first.stride, which a layer of PEFT does not have"):
        save_peft(perturb(model), tmp_path)
    with pytest.raises(AttributeError, match="stride"):
        peft.PeftModel.from_pretrained(nn.Sequential(Encoder()), str(tmp_path))(torch.randn(1, 3, 9))


class Headless(nn.Module):
    """A backbone that keeps the name of the head that it was made without, as timm's networks do, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"qkv": nn.Linear(6, 5), "head": nn.Identity()})
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.backbone["head"](self.backbone["qkv"](x)))


def test_a_head_that_trained_goes_to_peft_beside_an_empty_place_of_its_name(tmp_path):
    peft = pytest.importorskip("peft")
    model = Headless()
    plain = copy.deepcopy(model)
    adapt(model, ["*.qkv"], LoRA(rank=2), train=["head.*"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
    save_peft(model, tmp_path / "tuned")
    x = torch.randn(4, 6)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "tuned"))
    torch.testing.assert_close(loaded(x), model(x))
    plain.backbone["head"] = nn.Linear(5, 5)
    adapt(plain, ["*.qkv"], LoRA(rank=2), train=["head.*"])
    with pytest.raises(UserError, match=r"mistake backbone\.head for head"):
        save_peft(plain, tmp_path / "refused")
