"""CLIP's text transformer, open where prompts are put in: transformers' own takes token numbers alone.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (CLIP), 2021, arXiv
2103.00020, section 2.4, with the start of the weights of the authors' code. Shapes: B texts, T tokens, D width.
"""

from typing import Any

import torch
from timm.layers.activations import quick_gelu
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.nn.heads.pooling import masked_mean
from lightspan.nn.sequences.texts import require_encoder

# A recipe may name the classes listed here.
__all__ = ["MeanTokens", "TextMemory", "TextTransformer"]


class TextTransformer(nn.Module):
    """A causal transformer, LayerNorm first: tokens and mask [B T] -> [B D], the state of each text's last token.

    What follows the last token of a text has no effect on it.

    Args:
        vocab_size: of the tokenizer.
        width: D, a multiple of `heads`.
        depth, heads: blocks, and heads of each.
        context: longest text in tokens; the positions have that many rows.
    """

    def __init__(
        self, vocab_size: int = 49408, width: int = 512, depth: int = 12, heads: int = 8, context: int = 77
    ) -> None:
        super().__init__()
        if min(vocab_size, width, depth, heads, context) < 1 or width % heads:
            raise UserError(
                f"TextTransformer vocab_size={vocab_size}, width={width}, depth={depth}, heads={heads} and "
                f"context={context} must be at least 1, and width a multiple of heads"
            )
        self.num_features, self.context = width, context
        self.tokens = nn.Embedding(vocab_size, width)
        self.pos_embed = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation=quick_gelu, batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self._initialise()

    def _initialise(self) -> None:
        width, depth = self.num_features, len(self.blocks)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)
        block: Any  # its attributes are those of the class above
        into_residual = width**-0.5 * (2 * depth) ** -0.5
        for block in self.blocks:
            nn.init.normal_(block.self_attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.self_attn.out_proj.weight, std=into_residual)
            nn.init.normal_(block.linear1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.linear2.weight, std=into_residual)

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """[B D] of token numbers; the mask is 1 on a text's tokens, 0 on what follows them."""
        return self.read(self.tokens(tokens_BT), mask_BT)

    def read(self, embedded_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """[B D] of embedded tokens, positions not yet added: where learned prompts come in. Without any token in its
        mask a text has the state of its first.

        Raises: UserError for more tokens than there are positions.
        """
        return self.norm(last_states(self._states(embedded_BTD), mask_BT))

    def states(self, tokens_BT: Tensor) -> Tensor:
        """[B T D], of every token after the last norm; `forward` gives that of each text's last. Raises: as `read`."""
        return self.norm(self._states(self.tokens(tokens_BT)))

    def _states(self, embedded_BTD: Tensor) -> Tensor:
        length = embedded_BTD.shape[1]
        if length > self.context:
            raise UserError(
                f"texts of {length} tokens are longer than the {self.context} positions of the text encoder; lower "
                "length of the data or the number of prompt tokens, or raise context"
            )
        x_BTD = embedded_BTD + self.pos_embed[:length].to(embedded_BTD.dtype)
        after_TT = torch.ones(length, length, dtype=torch.bool, device=x_BTD.device).triu(1)
        for block in self.blocks:
            x_BTD = block(x_BTD, src_mask=after_TT, is_causal=True)
        return x_BTD


class TextMemory(nn.Module):
    """Texts as tokens for a decoder to look at: tokens and mask [B T] -> [B 1+T D], the map of the last token's state
    into the space that texts share with images, before it is scaled to length 1, then the states of all tokens.

    Source: Zhao et al., "DPTR", 2024, arXiv 2408.05706, section 3.2.

    Args:
        encoders: a `lightspan.backbones.dual_encoder.DualEncoder` whose text encoder has `states`; of it the text's
            half is kept.
    Raises: UserError for another, or one whose common space is not as wide as the states.
    """

    def __init__(self, encoders: nn.Module) -> None:
        super().__init__()
        text: Any = getattr(encoders, "text", None)
        map_ = getattr(encoders, "text_map", None)
        if not callable(getattr(text, "states", None)) or not isinstance(map_, nn.Linear):
            raise UserError(
                "TextMemory needs a lightspan.backbones.dual_encoder.DualEncoder whose text encoder gives the states "
                f"of all tokens, such as TextTransformer, not {type(encoders).__name__}"
            )
        if map_.out_features != map_.in_features:
            raise UserError(
                f"the space of texts and images has {map_.out_features} dimensions and the text encoder's states "
                f"{map_.in_features}; a memory needs both of one width"
            )
        self.num_features, self.text, self.text_map = map_.out_features, text, map_

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        states_BTD = self.text.states(tokens_BT)
        return torch.cat([self.text_map(last_states(states_BTD, mask_BT)).unsqueeze(1), states_BTD], dim=1)


class MeanTokens(nn.Module):
    """Tokens and mask [B T] -> [B D], the mean of a network's states over the tokens of each text: Sentence-BERT
    (Reimers, Gurevych, 2019, arXiv 1908.10084), whose networks are trained to be read so.

    Args:
        network: an encoder of transformers without a head, such as `lightspan.backbones.pretrained.minilm` makes.
    Raises: UserError for another network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        require_encoder(network, "MeanTokens")
        config: Any = network.config
        self.network, self.num_features = network, int(config.hidden_size)

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        states_BTD = self.network(input_ids=tokens_BT, attention_mask=mask_BT).last_hidden_state
        return masked_mean(states_BTD, mask_BT)


def last_states(x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """That of each text's last token, of a text without any its first: [B D]."""
    end_B = (mask_BT.sum(dim=1) - 1).clamp_min(0)
    return x_BTD[torch.arange(x_BTD.shape[0], device=x_BTD.device), end_B]
