"""Causal language modelling: predict each token from those before it.

Source: Bengio et al. 2003; decoder-only as in Radford et al. 2018. Shapes: B sequences, T positions, V vocabulary, D
width.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lightspan.datamodules.batches import DocumentBatch, TextBatch
from lightspan.method import Method
from lightspan.nn.sequences.texts import texts_of, tokens_of
from lightspan.objectives.language import next_token_loss


class CausalLM(Method):
    """Trains `backbone`, a transformers causal language model, on windows of T + 1 tokens, or on documents that are
    padded at the end (`DocumentBatch`), whose padding is not learned.

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

    def loss(self, batch: TextBatch | DocumentBatch) -> Tensor:
        """Nats per token: position t predicts token t + 1."""
        # No position sees what comes after it, so padding at the end needs no attention mask.
        tokens_BT1 = tokens_of(batch, "CausalLM")
        known_BT = texts_of(batch, "CausalLM")[1][:, 1:].bool() if "mask" in batch else None
        return next_token_loss(self.backbone(input_ids=tokens_BT1[:, :-1]).logits, tokens_BT1[:, 1:], known_BT)

    def features(self, batch: TextBatch) -> Tensor:
        """Last hidden states averaged over positions, [B D]."""
        return self.backbone.base_model(input_ids=tokens_of(batch, "CausalLM")[:, :-1]).last_hidden_state.mean(dim=1)

    def training_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log_training({"train/loss_nats": loss}, prog_bar=True)
        return loss

    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        loss, size = self.loss(batch), targets_in(batch)
        self.log("val/loss_nats", loss, batch_size=size, prog_bar=True, sync_dist=True)
        if "mask" not in batch:
            self.log("val/bits_per_byte", loss * self.bits_per_nat_and_byte, batch_size=size, sync_dist=True)

    def test_step(self, batch: TextBatch, batch_idx: int) -> None:
        self.log("test/loss_nats", self.loss(batch), batch_size=targets_in(batch), sync_dist=True)

    def predict_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        """Logits [B T V]."""
        return self.backbone(input_ids=tokens_of(batch, "CausalLM")[:, :-1]).logits


def targets_in(batch: Mapping[str, Any]) -> int:
    """How many tokens of a batch are predicted, at least 1: the weight of its mean loss beside other batches."""
    targets = batch["mask"][:, 1:].sum() if "mask" in batch else batch["tokens"][:, 1:].numel()
    return max(1, int(targets))
