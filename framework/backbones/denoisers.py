"""Networks that read a text with gaps and say what is missing: an encoder with a decoder, or a decoder alone.

Several texts may share a row: attention stays within the segment of a text, and positions begin anew in each, so that a
text is read as if it were alone. Shapes: B rows, T tokens of an input, U of a target, D width, V vocabulary.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, T5ForConditionalGeneration

from lightspan.core.errors import UserError

# A recipe may name the classes listed here.
__all__ = ["EncoderDecoder", "PrefixDecoder"]


class DenoisingNetwork(nn.Module, ABC):
    """Maps inputs and what a decoder reads to logits of the targets.

    Attributes:
        num_tokens: V.
        positions: the longest input and target together that it can place; None is any.
    """

    num_tokens: int
    positions: int | None = None

    @abstractmethod
    def states(self, inputs_BT: Tensor, segments_BT: Tensor) -> Tensor:
        """What it makes of the inputs alone, [B T D]."""

    @abstractmethod
    def forward(
        self, inputs_BT: Tensor, input_segments_BT: Tensor, decoder_inputs_BU: Tensor, target_segments_BU: Tensor
    ) -> Tensor:
        """Logits [B U V] of the token behind each of the decoder's inputs.

        Args:
            input_segments_BT, target_segments_BU: the text that a token belongs to; 0 on padding.
        """


class EncoderDecoder(DenoisingNetwork):
    """An encoder that sees all of an input, and a decoder that sees it and the target up to a token: T5's.

    Its positions are relative, so that it has no longest input.

    Raises: UserError for a network without an encoder, a decoder or a head.
    """

    def __init__(self, network: T5ForConditionalGeneration) -> None:
        super().__init__()
        if not all(isinstance(getattr(network, part, None), nn.Module) for part in ("encoder", "decoder", "lm_head")):
            raise UserError(
                "EncoderDecoder holds a T5 of transformers with its head, such as T5ForConditionalGeneration, not "
                f"{type(network).__name__}"
            )
        self.network, self.num_tokens = network, network.config.vocab_size

    def states(self, inputs_BT: Tensor, segments_BT: Tensor) -> Tensor:
        mask = self._added(same_text(segments_BT, segments_BT))
        return self.network.encoder(input_ids=inputs_BT, attention_mask=mask).last_hidden_state

    def forward(
        self, inputs_BT: Tensor, input_segments_BT: Tensor, decoder_inputs_BU: Tensor, target_segments_BU: Tensor
    ) -> Tensor:
        states_BTD = self.states(inputs_BT, input_segments_BT)
        within_BUU = same_text(target_segments_BU, target_segments_BU).tril()
        return self.network(
            encoder_outputs=(states_BTD,),
            attention_mask=self._added(same_text(target_segments_BU, input_segments_BT)),
            decoder_input_ids=decoder_inputs_BU,
            decoder_attention_mask=self._added(within_BUU),
            use_cache=False,
        ).logits

    def _added(self, sees_BQK: Tensor) -> Tensor:
        return added_mask(sees_BQK, self.network.dtype)


class PrefixDecoder(DenoisingNetwork):
    """A decoder whose inputs see each other in both directions, and whose targets see the inputs and the targets before
    them.

    Inputs stand before the targets of a row, each text's target at the positions behind its input. A token begins the
    target, as in a decoder with an encoder.

    Raises: UserError for a network that has an encoder, or no head.
    """

    def __init__(self, network: LlamaForCausalLM) -> None:
        super().__init__()
        head, config = getattr(network, "get_output_embeddings", lambda: None)(), getattr(network, "config", None)
        if head is None or config is None or config.is_encoder_decoder:
            raise UserError(
                "PrefixDecoder holds a decoder of transformers with its head, such as LlamaForCausalLM, not "
                f"{type(network).__name__}"
            )
        self.network, self.num_tokens = network, config.vocab_size
        self.positions = getattr(config, "max_position_embeddings", None)

    def states(self, inputs_BT: Tensor, segments_BT: Tensor) -> Tensor:
        nothing_B0 = inputs_BT[:, :0]
        return self._states(inputs_BT, segments_BT, nothing_B0, nothing_B0)

    def forward(
        self, inputs_BT: Tensor, input_segments_BT: Tensor, decoder_inputs_BU: Tensor, target_segments_BU: Tensor
    ) -> Tensor:
        states_BSD = self._states(inputs_BT, input_segments_BT, decoder_inputs_BU, target_segments_BU)
        return self.network.get_output_embeddings()(states_BSD[:, inputs_BT.shape[1] :])

    def _states(
        self, inputs_BT: Tensor, input_segments_BT: Tensor, decoder_inputs_BU: Tensor, target_segments_BU: Tensor
    ) -> Tensor:
        """Of inputs and targets, [B T + U D]."""
        segments_BS = torch.cat([input_segments_BT, target_segments_BU], dim=1)
        inputs = inputs_BT.shape[1]
        sees_BSS = same_text(segments_BS, segments_BS).tril()
        sees_BSS[:, :inputs, :inputs] = same_text(input_segments_BT, input_segments_BT)
        return self.network.base_model(
            input_ids=torch.cat([inputs_BT, decoder_inputs_BU], dim=1),
            attention_mask=added_mask(sees_BSS, self.network.dtype),
            position_ids=places_in_text(segments_BS),
            use_cache=False,
        ).last_hidden_state


def require_denoiser(backbone: nn.Module, method: str) -> DenoisingNetwork:
    """The network itself. Raises: UserError for one of another kind."""
    if not isinstance(backbone, DenoisingNetwork):
        raise UserError(
            f"{method} needs a network of lightspan.backbones.denoisers, such as EncoderDecoder, not "
            f"{type(backbone).__name__}"
        )
    return backbone


def same_text(segments_BQ: Tensor, segments_BK: Tensor) -> Tensor:
    """Which tokens belong to one text, bool [B Q K]; padding belongs to padding."""
    return segments_BQ[:, :, None] == segments_BK[:, None, :]


def places_in_text(segments_BS: Tensor) -> Tensor:
    """How many tokens of its text stand before each token, int64 [B S]."""
    return same_text(segments_BS, segments_BS).tril(-1).sum(dim=2)


def added_mask(sees_BQK: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a query sees a key and the least number elsewhere, [B 1 Q K].

    That of a query that sees none, such as padding beside inputs without any, is equal everywhere: no NaN.
    """
    mask = torch.zeros(sees_BQK.shape, dtype=dtype, device=sees_BQK.device)
    return mask.masked_fill(~sees_BQK, torch.finfo(dtype).min)[:, None]


def require_room(network: DenoisingNetwork, num_tokens: int, longest: int) -> None:
    """Raises: UserError for tokens that the network does not know, and for rows longer than its positions."""
    if num_tokens > network.num_tokens:
        raise UserError(
            f"the data have {num_tokens:,} numbers of tokens, sentinels and modes among them, and the network knows "
            f"{network.num_tokens:,}; set its vocab_size to {num_tokens} or more"
        )
    if network.positions is not None and longest > network.positions:
        raise UserError(
            f"inputs and targets have {longest} tokens together, and the network has {network.positions} positions; "
            f"set its context to {longest}, or lower the inputs and targets of the data's form, or its length"
        )
