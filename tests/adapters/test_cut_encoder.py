"""Encoders cut to their first layers: the same states, fewer weights, a folder that transformers reads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, MPNetConfig, MPNetModel

from lightspan.adapters.cut_encoder import cut_encoder
from lightspan.backbones.language import bert, llama, stored_encoder
from lightspan.core.errors import UserError

TOKENS = torch.randint(20, (3, 6), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(6) < torch.tensor([[6], [3], [1]])).long()


def networks() -> list[Any]:
    torch.manual_seed(0)
    config = MPNetConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24
    )
    return [bert(20, 16, 3, 2, 24, 6), MPNetModel(config, add_pooling_layer=False)]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_what_is_cut_gives_the_states_of_that_layer_with_the_weights_of_no_other(number: int, layers: int) -> None:
    whole = networks()[number].eval()
    small = cut_encoder(whole, layers, 8)
    states = whole(input_ids=TOKENS, attention_mask=MASK, output_hidden_states=True).hidden_states[layers]
    last = small(input_ids=TOKENS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(last[MASK == 1], states[MASK == 1], atol=1e-6, rtol=1e-6)
    removed = sum(p.numel() for block in whole.encoder.layer[layers:] for p in block.parameters())
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in whole.parameters()) - removed
    assert whole.config.num_hidden_layers == 3


def test_the_folder_of_a_cut_network_is_read_by_transformers_alone(tmp_path: Path) -> None:
    small = cut_encoder(networks()[0], 2, 8)
    small.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert (loaded.config.num_hidden_layers, loaded.config.truncate_dim) == (2, 8)
    again = stored_encoder(str(tmp_path)).eval()
    for one in (loaded, again):
        assert torch.equal(one(input_ids=TOKENS).last_hidden_state, small.eval()(input_ids=TOKENS).last_hidden_state)


def test_a_network_in_training_stays_in_it() -> None:
    network = networks()[0].train()
    assert cut_encoder(network, 1).training
    assert network.training


def test_sizes_and_networks_that_cannot_be_cut_are_refused(tmp_path: Path) -> None:
    for layers, width in ((0, 8), (4, 8), (1, 0), (1, 17)):
        with pytest.raises(UserError, match=rf"layers={layers} and width={width} must lie in \[1, 3\] and \[1, 16\]"):
            cut_encoder(networks()[0], layers, width)
    with pytest.raises(UserError, match="cuts encoders of transformers, not Linear"):
        cut_encoder(torch.nn.Linear(2, 2), 1)
    with pytest.raises(UserError, match="cannot be cut: the last states of its first 1 blocks differ"):
        cut_encoder(llama(20, 16, 2, 2, 24, 16).model, 1)
    with pytest.raises(UserError, match="there is no text encoder in"):
        stored_encoder(str(tmp_path))
