"""Supervised classification: cross-entropy of a linear layer on a backbone's features.

Shapes: B batch of this rank, C H W image, F features, K classes.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.datamodules.batches import ImageBatch
from lightspan.errors import UserError
from lightspan.method import Method
from lightspan.nn.init import he_normal_


class Classifier(Method):
    """Trains a backbone and a linear classifier on labelled images. The classifier starts He-normal, its bias at zero.

    Args:
        backbone: [B C H W] -> [B num_features]; what probes read.
        num_classes: K, >= 2; labels are in [0, K).
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    Raises: UserError for a backbone without `num_features`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        width = getattr(backbone, "num_features", None)
        if not isinstance(width, int):
            raise UserError(
                f"Classifier needs the width of its backbone, but {type(backbone).__name__} has no attribute "
                "num_features; use one of lightspan.backbones.vision or set it"
            )
        if num_classes < 2:
            raise UserError(f"Classifier num_classes={num_classes} must be at least 2")
        self.num_classes = num_classes
        self.backbone, self.head = backbone, nn.Linear(width, num_classes)
        he_normal_(self.head)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits [B K]."""
        return self.head(self.backbone(x_BCHW))

    def features(self, batch: ImageBatch) -> Tensor:
        """[B F], before the classifier."""
        return self.backbone(batch["image"])

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        figures = self._measure("train", batch)
        self.log_training(figures, batch_size=len(batch["label"]), prog_bar=True)
        return figures["train/loss_nats"]

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Logits [B K]."""
        return self(batch["image"])

    def _evaluate(self, stage: str, batch: ImageBatch) -> None:
        options: dict[str, Any] = {"batch_size": len(batch["label"]), "sync_dist": True, "prog_bar": True}
        self.log_dict(self._measure(stage, batch), **options)

    def _measure(self, stage: str, batch: ImageBatch) -> dict[str, Tensor]:
        """Loss in nats and the share of correct answers."""
        logits_BK, label_B = self(batch["image"]), batch["label"]
        loss = F.cross_entropy(logits_BK, label_B)
        accuracy = (logits_BK.argmax(dim=1) == label_B).float().mean()
        return {f"{stage}/loss_nats": loss, f"{stage}/accuracy": accuracy}
