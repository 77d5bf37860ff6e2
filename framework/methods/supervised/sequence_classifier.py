"""Classification of sequences of values or symbols: the mean of a network's last states, then Linear - ReLU - Linear.

Source: stage 2 of Amos, Berant, Gupta, "Never Train from Scratch" (SPT), 2023, arXiv 2310.02980, section 3: the network
starts from the weights of stage 1, `lightspan.methods.masked.spt`, the head is new, and all weights are trained. From
random weights it is the baseline that the paper argues against. Shapes: B sequences, D width, K classes.
"""

from typing import Any

from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.datamodules.sequence.batch import SequenceBatch
from lightspan.datamodules.text.batch import LabelledTextBatch
from lightspan.nn.heads.projector import Projector
from lightspan.nn.labels import labels_of
from lightspan.nn.sequences.series import require_series, series_in
from lightspan.nn.widths import require_width
from lightspan.objectives.classes import label_cross_entropy, share_right
from lightspan.training.method import Method


class SequenceClassifier(Method):
    """Trains a network for sequences and a head with cross-entropy.

    Args:
        backbone: one of `lightspan.backbones.sequence`; `lightspan.backbones.weights.with_weights` gives it those of
            an earlier run.
        num_classes: K, at least 2.
        head: [B D] -> [B K]; None is Linear - ReLU - Linear with a hidden layer of D.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    Raises: UserError for a network of another kind, fewer classes, or a head of another width.
    """

    def __init__(
        self, backbone: nn.Module, num_classes: int, head: nn.Module | None = None, **optimization: Any
    ) -> None:
        super().__init__(**optimization)
        require_series(backbone, "SequenceClassifier")
        require_in("[2, inf)", num_classes=num_classes)
        width = int(backbone.num_features)  # type: ignore[arg-type]
        head = head or Projector(width, [width], num_classes, hidden_norm=False)
        require_width(backbone, "head.in_features", getattr(head, "in_features", None))
        if (outputs := getattr(head, "out_features", num_classes)) != num_classes:
            raise UserError(f"{type(head).__name__} tells {outputs} classes apart, but num_classes={num_classes}")
        self.backbone, self.num_classes, self.head = backbone, num_classes, head
        self.num_tokens = backbone.vocab_size  # type: ignore[assignment]

    def features(self, batch: SequenceBatch | LabelledTextBatch) -> Tensor:
        """Mean of the last states over a sequence's own steps, [B D]."""
        return self.backbone(*series_in(batch, self.backbone, "SequenceClassifier"))

    def training_step(self, batch: SequenceBatch | LabelledTextBatch, batch_idx: int) -> Tensor:
        figures = self._measure("train", batch)
        self.log_training(figures, prog_bar=True)
        return figures["train/loss_nats"]

    def validation_step(self, batch: SequenceBatch | LabelledTextBatch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: SequenceBatch | LabelledTextBatch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def predict_step(self, batch: SequenceBatch | LabelledTextBatch, batch_idx: int) -> Tensor:
        """Logits [B K]."""
        return self.head(self.features(batch))

    def _evaluate(self, stage: str, batch: SequenceBatch | LabelledTextBatch) -> None:
        size = len(labels_of(batch, "SequenceClassifier"))
        self.log_dict(self._measure(stage, batch), batch_size=size, prog_bar=True, sync_dist=True)

    def _measure(self, stage: str, batch: SequenceBatch | LabelledTextBatch) -> dict[str, Tensor]:
        """Loss in nats and the share of correct answers."""
        logits_BK, label_B = self.head(self.features(batch)), labels_of(batch, "SequenceClassifier")
        loss, accuracy = label_cross_entropy(logits_BK, label_B), share_right(logits_BK, label_B)
        return {f"{stage}/loss_nats": loss, f"{stage}/accuracy": accuracy}
