"""Causal language modelling: predict each token from those before it.

Source: Bengio et al. 2003; decoder-only as in Radford et al. 2018. Shapes: B sequences, T positions, V vocabulary, D
width.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lightspan.core.errors import UserError
from lightspan.datamodules.text.batch import ChatBatch, DocumentBatch, TextBatch
from lightspan.nn.heads.pooling import masked_mean
from lightspan.nn.sequences.texts import learned_of, places_of, texts_of, tokens_of
from lightspan.objectives.language import next_token_loss
from lightspan.training.method import Method

Texts = TextBatch | DocumentBatch | ChatBatch


class CausalLM(Method):
    """Trains `backbone`, a transformers causal language model, on windows of T + 1 tokens, on documents that are padded
    at the end (`DocumentBatch`), whose padding is not learned, or on conversations (`ChatBatch`), of which only the
    answers are.

    Args:
        backbone: maps input_ids int64 [B T] to an output with `logits` [B T V].
        bytes_per_token: mean bytes that a token stands for, > 0; 1 for byte-level models. Turns nats per token of
            windows into bits per byte.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        bytes_per_token: float = 1.0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        self.backbone, self.num_tokens = backbone, getattr(backbone.config, "vocab_size", None)
        self.bits_per_nat_and_byte = 1 / (math.log(2) * bytes_per_token)
        self.takes_places = "position_ids" in inspect.signature(backbone.forward).parameters

    def setup(self, stage: str) -> None:
        """Raises: UserError for rows that are longer than the network's positions, and for several texts in a row where
        it has none to tell them apart.
        """
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        if getattr(data, "pack", False) and not self.takes_places:
            raise UserError(
                f"{type(self.backbone).__name__} takes no positions, so that texts that share a row would read each "
                "other; set data.init_args.pack=false"
            )
        longest = getattr(data, "length", 0)
        positions = getattr(self.backbone.config, "max_position_embeddings", None)
        if positions is not None and longest > positions:
            raise UserError(
                f"data.init_args.length={longest} tokens are more than the {positions} positions of "
                f"{type(self.backbone).__name__}; lower it to {positions}"
            )

    def loss(self, batch: Texts) -> Tensor:
        """Nats per token: position t predicts token t + 1."""
        tokens_BT1, learned_BT1 = tokens_of(batch, "CausalLM"), learned_of(batch, "CausalLM")
        known_BT = None if learned_BT1 is None else learned_BT1[:, 1:]
        return next_token_loss(self.logits(batch), tokens_BT1[:, 1:], known_BT)

    def logits(self, batch: Texts) -> Tensor:
        """What is predicted at each position but the last, [B T V]."""
        return self.backbone(**self.inputs(batch)).logits

    def inputs(self, batch: Texts) -> dict[str, Any]:
        """What the network reads. No position sees what comes after it, so padding at the end needs no attention mask.

        Positions that begin anew with each conversation of a row also tell networks of transformers to keep their
        attention inside it, where no cache is in use.
        """
        read: dict[str, Any] = {"input_ids": tokens_of(batch, "CausalLM")[:, :-1]}
        if "learned" in batch and self.takes_places:
            read |= {"position_ids": places_of(texts_of(batch, "CausalLM")[1][:, :-1]), "use_cache": False}
        return read

    def features(self, batch: Texts) -> Tensor:
        """Last hidden states averaged over the positions of text, [B D]."""
        states_BTD = self.backbone.base_model(**self.inputs(batch)).last_hidden_state
        mask_BT1: Any = batch.get("mask")
        return states_BTD.mean(dim=1) if mask_BT1 is None else masked_mean(states_BTD, mask_BT1[:, :-1])

    def training_step(self, batch: Texts, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log_training({"train/loss_nats": loss}, prog_bar=True)
        return loss

    def validation_step(self, batch: Texts, batch_idx: int) -> None:
        loss, size = self.loss(batch), targets_in(batch)
        self.log("val/loss_nats", loss, batch_size=size, prog_bar=True, sync_dist=True)
        if "mask" not in batch:
            self.log("val/bits_per_byte", loss * self.bits_per_nat_and_byte, batch_size=size, sync_dist=True)

    def test_step(self, batch: Texts, batch_idx: int) -> None:
        self.log("test/loss_nats", self.loss(batch), batch_size=targets_in(batch), sync_dist=True)

    def predict_step(self, batch: Texts, batch_idx: int) -> Tensor:
        """Logits [B T V]."""
        return self.logits(batch)


def targets_in(batch: Mapping[str, Any]) -> int:
    """How many tokens of a batch are predicted, at least 1: the weight of its mean loss beside other batches."""
    learned_BT1 = learned_of(batch, "CausalLM")
    return max(1, batch["tokens"][:, 1:].numel() if learned_BT1 is None else int(learned_BT1[:, 1:].sum()))
