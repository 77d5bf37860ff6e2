"""The first layers of a trained encoder as a network of its own: what Starbucks trains many sizes for.

Source: Zhuang et al., "Starbucks", 2024, arXiv 2410.13230, section 3.1. The blocks behind layer n go, and with them
their weights. Inside a block all D coordinates stay, since attention and LayerNorm read all of them: what is cut to d
is the embedding, and with it the index of documents. Shapes: B texts, T tokens, D width, d coordinates.
"""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from lightspan.core.errors import UserError
from lightspan.core.layers import list_of_blocks

# A recipe may name the function listed here.
__all__ = ["cut_encoder"]

EXACT = 1e-6
ROWS, TOKENS = 2, 4


def cut_encoder(network: nn.Module, layers: int, width: int | None = None) -> PreTrainedModel:
    """A copy of the embeddings and the first n blocks, whose last states are what these blocks give in the whole.

    `config.truncate_dim` says how many of the first coordinates of a pooled state are the embedding, under the name
    that sentence-transformers has for it; it stays in config.json when the network is exported.

    Args:
        network: an encoder of transformers whose states after block n are what n blocks alone would give, as BERT's.
        layers: n, in [1, N].
        width: d, in [1, D]; None is all.
    Raises: UserError for another size, or for a network that does more to its last state than its blocks do.
    """
    if not isinstance(network, PreTrainedModel):
        raise UserError(f"cut_encoder cuts encoders of transformers, not {type(network).__name__}")
    whole, wide = network.config.num_hidden_layers, network.config.hidden_size
    width = wide if width is None else width
    if not 1 <= layers <= whole or not 1 <= width <= wide:
        raise UserError(
            f"cut_encoder layers={layers} and width={width} must lie in [1, {whole}] and [1, {wide}], the size of "
            f"{type(network).__name__}"
        )
    path = list_of_blocks(network, lambda parameter: True, "cut_encoder cuts encoders with one list of blocks")[0]
    small = copy.deepcopy(network)
    parent, _, name = path.rpartition(".")
    setattr(small.get_submodule(parent), name, nn.ModuleList(list(small.get_submodule(path))[:layers]))
    small.config.num_hidden_layers, small.config.truncate_dim = layers, width
    _require_equal(network, small, layers)
    return small


@torch.no_grad()
def _require_equal(network: PreTrainedModel, small: PreTrainedModel, layers: int) -> None:
    """Raises: UserError where the small network's last states are not the large one's at that layer."""
    tokens_BT = torch.arange(ROWS * TOKENS, device=network.device).view(ROWS, TOKENS) % network.config.vocab_size
    modes = [(part, part.training) for part in (network, small)]
    try:
        states_BTD = network.eval()(input_ids=tokens_BT, output_hidden_states=True).hidden_states[layers]
        last_BTD = small.eval()(input_ids=tokens_BT).last_hidden_state
    finally:
        for part, training in modes:
            part.train(training)
    difference = float((states_BTD - last_BTD).abs().max())
    if not difference <= EXACT * max(1.0, float(states_BTD.abs().max())):
        raise UserError(
            f"{type(network).__name__} cannot be cut: the last states of its first {layers} blocks differ by "
            f"{difference:.3g} from what these give inside it; the last block must be the output, as BERT's is"
        )
