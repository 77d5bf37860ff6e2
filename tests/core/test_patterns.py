"""Patterns that match nothing are refused with patterns that do; text is no list of patterns."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightspan.adapters.inject import adapt
from lightspan.adapters.lora import LoRA
from lightspan.adapters.sparse_gaussian.inject import sparsify
from lightspan.callbacks.training.mask_learning import MaskLearning
from lightspan.callbacks.training.subspace_projection import SubspaceProjection
from lightspan.core.errors import UserError
from lightspan.core.patterns import matches, require_matches, suggestions
from lightspan.optim.groups import ParameterGroups, Rule
from lightspan.optim.masks.by_score import ByScore

VIT = {
    "net.patch_embed.proj.weight": 9_000,
    **{f"net.blocks.{at}.attn.qkv.weight": 3_000 for at in range(4)},
    **{f"net.blocks.{at}.mlp.fc1.weight": 8_000 for at in range(4)},
    "net.head.weight": 50,
}
LLAMA = {
    f"model.layers.{at}.{part}": 10
    for at in range(2)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
}


def test_the_stacks_and_layers_that_hold_most_numbers_are_suggested() -> None:
    assert suggestions("*layers*", VIT) == ["*blocks.*", "*fc1.weight", "*qkv.weight"]
    assert suggestions("*", {}) == []


def test_the_pattern_that_was_meant_comes_first() -> None:
    assert suggestions("q_proj", LLAMA)[0] == "*q_proj"  # PEFT's own form
    assert suggestions("*.q_porj", LLAMA)[0] == "*q_proj"
    assert suggestions("self_attn", LLAMA)[0] == "*self_attn*"
    assert suggestions("*bloks*", VIT)[0] == "*blocks.*"
    assert suggestions("qvk", VIT)[0] == "*blocks.*"  # nothing is near enough


def test_whatever_is_suggested_matches() -> None:
    for sizes in (VIT, LLAMA, {"0.weight": 1, "1.2.weight": 2}, {"": 1}, {"7": 1}, {"h.0.h.1.w": 3, "lm_head": 9}):
        for pattern in ("q_proj", "*layers*", "", "*", "0", "h"):
            for one in suggestions(pattern, sizes):
                assert any(matches(name, [one]) for name in sizes), (one, sizes)


def test_a_refusal_names_what_is_there_and_what_would_match() -> None:
    with pytest.raises(UserError, match=r"'\*layers\*' .*names look like net\.blocks\.0.*'\*blocks\.\*'"):
        require_matches(["*layers*"], list(VIT), "parameter of ViT", sizes=VIT)
    with pytest.raises(UserError, match=r"'q_proj' matches no module of Sequential.*: '\*q_proj'"):
        adapt(nn.Sequential(nn.Sequential(nn.ModuleDict({"q_proj": nn.Linear(2, 2)}))), ["q_proj"], LoRA(rank=1))
    with pytest.raises(UserError, match=r"'1' matches only Sequential.*that match some here: '\*1\*'"):
        adapt(nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(2, 2))), ["1"], LoRA(rank=1))


def test_text_is_refused_by_the_name_of_its_setting() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    refused: list[tuple[str, Callable[[], object]]] = [
        ("match", lambda: adapt(model, "*q_proj", LoRA(rank=1))),
        ("train", lambda: adapt(model, ["0"], LoRA(rank=1), train="0.bias")),
        ("match", lambda: sparsify(model, "0", 0.5)),
        ("SubspaceProjection match", lambda: SubspaceProjection(match="0")),  # type: ignore[arg-type]
        ("MaskLearning match", lambda: MaskLearning("0", ByScore())),  # type: ignore[arg-type]
        ("match", lambda: ParameterGroups(rules=[Rule("*", lr_scale=2.0)]).build(model)),  # type: ignore[arg-type]
        ("groups.layers", lambda: ParameterGroups(layer_decay=0.5, layers="0").build(model)),  # type: ignore[arg-type]
    ]
    for setting, use in refused:
        with pytest.raises(UserError, match=f"{setting}='.*' must be a list of patterns"):
            use()
    assert torch.nn.utils.parameters_to_vector(model.parameters()).requires_grad  # nothing was frozen
