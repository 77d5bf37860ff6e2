"""Supervised classification: cross-entropy of a head, by default a linear layer, on a backbone's features.

Shapes: B batch of this rank, C H W image, F features, K classes.
"""

from typing import Any

from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.datamodules.image.batch import ImageBatch
from lightspan.nn.init import he_normal_
from lightspan.nn.labels import labels_of
from lightspan.nn.views import image_of
from lightspan.nn.widths import build_outputs, require_width
from lightspan.objectives.classes import label_cross_entropy, share_right
from lightspan.training.method import Method


class Classifier(Method):
    """Trains a backbone and a classifier on labelled images, or rows of a table.

    Args:
        backbone: [B C H W] -> [B num_features]; what probes read. A batch has images, or one view of each, or rows of
            a table, [B F].
        num_classes: K, >= 2; labels are in [0, K).
        head: [B num_features] -> logits [B K], such as `lightspan.nn.heads.grassmann_head.GrassmannHead`, which
            needs no K of its own. None makes a linear layer, which starts He-normal, its bias at zero.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    Raises: UserError for a backbone without `num_features`, or a head of another width or number of classes.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        head: nn.Module | None = None,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        width = getattr(backbone, "num_features", None)
        if not isinstance(width, int):
            raise UserError(
                f"Classifier needs the width of its backbone, but {type(backbone).__name__} has no attribute "
                "num_features; use one of lightspan.backbones.vision or set it"
            )
        require_in("[2, inf)", num_classes=num_classes)
        if head is None:
            head = nn.Linear(width, num_classes)
            he_normal_(head)
        require_width(backbone, "head.in_features", getattr(head, "in_features", None))
        build_outputs(head, num_classes)
        if (outputs := getattr(head, "out_features", num_classes)) != num_classes:
            raise UserError(f"{type(head).__name__} tells {outputs} classes apart, but num_classes={num_classes}")
        self.num_classes, self.backbone, self.head = num_classes, backbone, head

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits [B K]."""
        return self.head(self.backbone(x_BCHW))

    def features(self, batch: ImageBatch) -> Tensor:
        """[B F], before the classifier."""
        return self.backbone(image_of(batch, "Classifier"))

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        figures = self._measure("train", batch)
        self.log_training(figures, batch_size=len(image_of(batch, "Classifier")), prog_bar=True)
        return figures["train/loss_nats"]

    def validation_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Logits [B K]."""
        return self(image_of(batch, "Classifier"))

    def _evaluate(self, stage: str, batch: ImageBatch) -> None:
        options: dict[str, Any] = {
            "batch_size": len(image_of(batch, "Classifier")),
            "sync_dist": True,
            "prog_bar": True,
        }
        self.log_dict(self._measure(stage, batch), **options)

    def _measure(self, stage: str, batch: ImageBatch) -> dict[str, Tensor]:
        """Loss in nats and the share of correct answers."""
        logits_BK, label_B = self(image_of(batch, "Classifier")), labels_of(batch, "Classifier")
        loss, accuracy = label_cross_entropy(logits_BK, label_B), share_right(logits_BK, label_B)
        return {f"{stage}/loss_nats": loss, f"{stage}/accuracy": accuracy}
