"""The Transformer of frames is torch's with the same weights, and padding has no say."""

from typing import Any

import pytest
import torch
from torch import nn

from lightspan.backbones.frames import FrameTransformer
from lightspan.core.errors import UserError
from lightspan.nn.sequences.positions import sincos
from lightspan.nn.tokens import token_features

FRAMES = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(0))
VALID = torch.arange(9) < torch.tensor([[9], [4], [1]])


def network(**settings: Any) -> FrameTransformer:
    torch.manual_seed(0)
    return FrameTransformer(**{"bands": 5, "width": 16, "depth": 2, "heads": 4} | settings)


def torchs(block: Any) -> nn.TransformerEncoderLayer:
    """torch's layer with the weights of a block."""
    layer = nn.TransformerEncoderLayer(16, 4, 64, dropout=0.0, activation="gelu", batch_first=True)
    attention = block.attention
    maps = attention.query, attention.key, attention.value
    state = {
        "self_attn.in_proj_weight": torch.cat([part.weight for part in maps]),
        "self_attn.in_proj_bias": torch.cat([part.bias for part in maps]),
    }
    named = {"self_attn.out_proj": attention.out, "linear1": block.mlp.fc1, "linear2": block.mlp.fc2}
    named |= {"norm1": block.norm_attention, "norm2": block.norm_mlp}
    for name, part in named.items():
        state |= {f"{name}.weight": part.weight, f"{name}.bias": part.bias}
    layer.load_state_dict(state)
    return layer.double().train()  # its fast path in evaluation has other rounding


def test_the_states_are_those_of_torchs_encoder_layers() -> None:
    model, x = network(dropout=0.0).double(), FRAMES.double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.normal_()
                module.bias.normal_()
    expected = model.norm(model.embed(x) + sincos([9], 16))
    for block in model.blocks:
        expected = torchs(block)(expected, src_key_padding_mask=~VALID)
    torch.testing.assert_close(model(x, VALID)[VALID], expected[VALID])


def test_what_enters_attention_weights_and_both_branches_are_dropped_in_training_alone() -> None:
    model = network(dropout=0.25, depth=1)
    (block,), acted = model.blocks, list[tuple[str, float]]()
    drops = {"entry": model.drop, "attention": block.drop, "MLP": block.mlp.drop2}
    for name, drop in drops.items():
        drop.register_forward_hook(lambda module, given, made, name=name: acted.append((name, module.p)))
    model(FRAMES, VALID)
    assert acted == [("entry", 0.25), ("attention", 0.25), ("MLP", 0.25)]
    assert (block.attention.dropout, block.mlp.drop1.p) == (0.25, 0.0)
    assert not torch.equal(model(FRAMES, VALID), model(FRAMES, VALID))
    assert torch.equal(model.eval()(FRAMES, VALID), model(FRAMES, VALID))


def test_padding_changes_no_valid_state() -> None:
    model = network().eval()
    whole = model(FRAMES, VALID)
    for row, length in enumerate(VALID.sum(1).tolist()):
        alone = model(FRAMES[row : row + 1, :length], VALID[row : row + 1, :length])
        torch.testing.assert_close(whole[row, :length], alone[0])


def test_it_starts_as_bert_at_its_width_and_with_outputs_of_that_size_at_others() -> None:
    for width in (768, 192):
        block = network(width=width, depth=1).blocks[0]
        assert float(block.mlp.fc1.weight.detach().std()) == pytest.approx(0.02 * (768 / width) ** 0.5, rel=0.02)
        assert not block.mlp.fc1.bias.any()


def test_its_blocks_are_its_layers() -> None:
    model = network().eval()
    first, last = token_features(model, lambda: model(FRAMES, VALID), (0, -1))
    assert torch.equal(last.tokens_BTD, model(FRAMES, VALID))
    assert first.tokens_BTD.shape == (3, 9, 16)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="bands=0"):
        network(bands=0)
    with pytest.raises(UserError, match="width=15 even"):
        network(width=15)
    with pytest.raises(UserError, match="width=16 must be a multiple of heads=3"):
        network(heads=3)
