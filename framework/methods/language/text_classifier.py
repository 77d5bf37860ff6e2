"""Classification of texts: the mean of an encoder's last states over the text's tokens, and one linear layer.

Source: mean pooling as in Reimers and Gurevych, "Sentence-BERT", 2019, arXiv 1908.10084, section 3. Shapes: B texts, T
positions, D width, K classes.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lightspan.core.ranges import require_in
from lightspan.datamodules.text.batch import LabelledPairBatch, LabelledTextBatch
from lightspan.nn.heads.pooling import masked_mean
from lightspan.nn.labels import labels_of
from lightspan.nn.sequences.texts import require_encoder, texts_of
from lightspan.objectives.classes import label_cross_entropy, share_right
from lightspan.training.method import Method

COLUMNS = ("tokens", "mask", "token_types")
"""Fields of a batch with a column for each position."""


class TextClassifier(Method):
    """Trains `backbone`, a transformers encoder, and a new linear head with cross-entropy, on single texts or on pairs.

    Args:
        backbone: maps input_ids and attention_mask, int64 [B T], to an output with `last_hidden_state` [B T D].
        num_classes: K, at least 2.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        num_classes: int,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_in("[2, inf)", num_classes=num_classes)
        require_encoder(backbone, "TextClassifier")
        self.backbone, self.num_classes = backbone, num_classes
        self.num_tokens = getattr(backbone.config, "vocab_size", None)
        self.takes_types = "token_type_ids" in inspect.signature(backbone.forward).parameters
        self.head = nn.Linear(backbone.config.hidden_size, num_classes)

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """In a run, leaves out the columns that are padding in every row, which only cost time."""
        batch = super()._on_before_batch_transfer(batch, dataloader_idx)
        # A plan counts full rows, and its batches have no numbers.
        running = self._trainer is not None and self._trainer.state.stage is not None
        return _trimmed(batch) if running else batch

    def features(self, batch: LabelledTextBatch | LabelledPairBatch) -> Tensor:
        """Mean of the last states over the mask, [B D]."""
        tokens_BT, mask_BT = texts_of(batch, "TextClassifier")
        types_BT: Any = batch.get("token_types") if self.takes_types else None
        types = {} if types_BT is None else {"token_type_ids": types_BT}
        states_BTD = self.backbone(input_ids=tokens_BT, attention_mask=mask_BT, **types).last_hidden_state
        return masked_mean(states_BTD, mask_BT)

    def training_step(self, batch: LabelledTextBatch | LabelledPairBatch, batch_idx: int) -> Tensor:
        loss, accuracy = self.loss_and_accuracy(batch)
        self.log_training({"train/loss_nats": loss, "train/accuracy": accuracy}, prog_bar=True)
        return loss

    def validation_step(self, batch: LabelledTextBatch | LabelledPairBatch, batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: LabelledTextBatch | LabelledPairBatch, batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def predict_step(self, batch: LabelledTextBatch | LabelledPairBatch, batch_idx: int) -> Tensor:
        """Logits [B K]."""
        return self.head(self.features(batch))

    def loss_and_accuracy(self, batch: LabelledTextBatch | LabelledPairBatch) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy in nats, and the share of texts whose largest logit is that of their label."""
        logits_BK = self.head(self.features(batch))
        label_B = labels_of(batch, "TextClassifier")
        return label_cross_entropy(logits_BK, label_B), share_right(logits_BK, label_B)

    def evaluate(self, batch: LabelledTextBatch | LabelledPairBatch, stage: str) -> None:
        loss, accuracy = self.loss_and_accuracy(batch)
        figures = {f"{stage}/loss_nats": loss, f"{stage}/accuracy": accuracy}
        self.log_dict(figures, batch_size=len(batch["tokens"]), prog_bar=True, sync_dist=True)


def _trimmed(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    longest = max(1, int(texts_of(batch, "TextClassifier")[1].sum(dim=1).max()))
    return {name: value[:, :longest] if name in COLUMNS else value for name, value in batch.items()}
