"""Supervised segmentation of point clouds: cross-entropy of a class for each point.

Source: Yang et al., "Swin3D: A Pretrained Transformer Backbone for 3D Indoor Scene Understanding", 2023, arXiv
2304.06906, which trains so, first on drawn rooms and then on scanned ones: what is new there is its network,
`lightspan.backbones.swin3d.Swin3D`, and that its encoder is kept. Any other network of voxels trains here too.
Shapes: B clouds, N points of all, K classes.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from lightspan.backbones.voxel_points import VoxelPoints
from lightspan.core.ragged import ragged_means
from lightspan.core.ranges import require_in
from lightspan.datamodules.points.batch import PointsBatch
from lightspan.nn.class_overlap import overlap
from lightspan.nn.labels import places_labels_of, require_classes
from lightspan.nn.points.clouds import point_fields_of, points_of
from lightspan.nn.row_norm import RowNorm
from lightspan.objectives.classes import known_cross_entropy
from lightspan.training.method import Method


class PointSegmenter(Method):
    """Trains a backbone and a classifier of points. Points with a class below 0 are not learned or counted.

    Batches are `PointsBatch` with `classes`. Validation logs val/loss_nats, and of all its points together val/accuracy
    and val/iou, the mean over the classes that are there or guessed.

    Args:
        backbone: gives features of points; probes read their mean over a cloud.
        num_classes: K, at least 2.
        field: of the batch, with the classes, int64 [N].
        hidden: width of a layer with a norm and ReLU in the classifier; None is a linear map alone.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    batch_type = PointsBatch

    def __init__(
        self,
        backbone: VoxelPoints,
        num_classes: int,
        field: str = "classes",
        hidden: int | None = None,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_in("[2, inf)", num_classes=num_classes)
        require_in("[1, inf)", hidden=hidden)
        self.backbone, self.classes, self.field = backbone, num_classes, field
        width = backbone.num_features
        first = [nn.Linear(width, hidden), RowNorm(hidden), nn.ReLU()] if hidden else []
        self.head = nn.Sequential(*first, nn.Linear(hidden or width, num_classes))
        self.counts = MulticlassConfusionMatrix(num_classes, ignore_index=-1, validate_args=False)

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        batch = super()._on_before_batch_transfer(batch, dataloader_idx)
        if isinstance(batch, Mapping) and self.field in batch:
            require_classes(batch[self.field], self.classes, "PointSegmenter", self.field)
        return batch

    def point_features(self, batch: Any) -> Tensor:
        """[N F]."""
        xyz_N3, offsets = points_of(batch, "PointSegmenter")
        return self.backbone(
            xyz_N3, offsets, *point_fields_of(batch, self.backbone.fields, len(xyz_N3), "PointSegmenter")
        )

    def forward(self, batch: Any) -> Tensor:
        """Logits [N K]."""
        return self.head(self.point_features(batch))

    def features(self, batch: Any) -> Tensor:
        return ragged_means(self.point_features(batch), batch["offsets"])

    def loss(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(cross-entropy, logits [N K], classes [N])."""
        xyz_N3, _ = points_of(batch, "PointSegmenter")
        source = "lightspan.datamodules.points.furnished.FurnishedRooms"
        label_N = places_labels_of(batch, self.field, xyz_N3.shape[:1], "PointSegmenter", "point", source)
        logits_NK = self(batch)
        return known_cross_entropy(logits_NK, label_N.clamp_min(0), label_N >= 0), logits_NK, label_N

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, *_ = self.loss(batch)
        self.log_training({"train/loss_nats": loss})
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss, logits_NK, label_N = self.loss(batch)
        self.log("val/loss_nats", loss, batch_size=max(len(label_N), 1), sync_dist=True)
        self.counts.update(logits_NK.argmax(dim=1), label_N)

    def on_validation_epoch_end(self) -> None:
        counts_KK = self.counts.compute()
        right = counts_KK.diagonal().sum() / counts_KK.sum().clamp_min(1)
        scores = {"iou": overlap(counts_KK, first=0)["iou"], "accuracy": right}
        self.log_dict({f"val/{name}": score for name, score in scores.items()}, prog_bar=True, sync_dist=True)
        self.counts.reset()

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logits [N K]."""
        return self(batch)
