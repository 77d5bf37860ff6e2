"""Segmentation: a class for each voxel of a volume, or pixel of an image, by Dice and cross-entropy.

Source: Isensee et al., "nnU-Net", Nature Methods 2021, arXiv 1809.10486: L = (Dice + cross-entropy) / 2.
Shapes: B samples of this rank, C channels, N axes of a sample, K classes.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchmetrics.classification import MulticlassF1Score

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.nn.heads.pixel_classifier import PixelClassifier
from lightspan.nn.init import CONVOLUTIONS
from lightspan.nn.labels import VOXEL_LABELS, require_classes, voxel_labels_of
from lightspan.nn.submodule_alias import submodule_alias
from lightspan.nn.views import image_of
from lightspan.nn.widths import given_features
from lightspan.objectives.segmentation import dice_and_cross_entropy
from lightspan.training.method import Method


class Segmenter(Method):
    """Trains a backbone and a convolution of single voxels on labels of voxels; those below 0 do not count.

    Validation logs val/loss, and val/dice: twice the overlap over the sizes of truth and answer, of all voxels
    together, mean over the classes that occur. Whole volumes take
    `lightspan.evaluation.dense.sliding_window.sliding_window(method, volume, window)`.

    Args:
        backbone: [B C N] -> maps [B F N] of the samples' size, with `num_features` F, such as
            `lightspan.backbones.dense.UNet`; probes read their mean.
        num_classes: K, at least 2.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    backbone = submodule_alias("network.0", "What gives the maps.")

    def __init__(self, backbone: nn.Module, num_classes: int, **optimization: Any) -> None:
        super().__init__(**optimization)
        require_in("[2, inf)", num_classes=num_classes)
        width, axes = given_features(backbone), getattr(backbone, "axes", 2)
        if width is None:
            raise UserError(
                f"Segmenter needs the width of its backbone's maps, but {type(backbone).__name__} has no num_features"
            )
        self.network = PixelClassifier(backbone, CONVOLUTIONS[axes - 1](width, num_classes, 1))
        self.num_classes = num_classes
        self.dice = MulticlassF1Score(num_classes, average="macro", ignore_index=-1, validate_args=False)

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        batch = super()._on_before_batch_transfer(batch, dataloader_idx)
        if isinstance(batch, Mapping):
            for field in set(VOXEL_LABELS) & batch.keys():
                require_classes(batch[field], self.num_classes, "Segmenter", field)
        return batch

    def forward(self, x_BCN: Tensor) -> Tensor:
        """Logits [B K N]."""
        return self.network(x_BCN)

    def features(self, batch: Any) -> Tensor:
        return self.backbone(image_of(batch, "Segmenter")).flatten(2).mean(dim=2)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logits [B K N]."""
        return self(image_of(batch, "Segmenter"))

    def losses(self, logits_BKN: Tensor, label_BN: Tensor) -> dict[str, Tensor]:
        found = dice_and_cross_entropy(logits_BKN, label_BN)
        return {"loss": (found["dice"] + found["nats"]) / 2, "loss_dice": found["dice"], "loss_nats": found["nats"]}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x_BCN = image_of(batch, "Segmenter")
        losses = self.losses(self(x_BCN), voxel_labels_of(batch, "Segmenter", x_BCN))
        self.log_training({f"train/{name}": value for name, value in losses.items()})
        return losses["loss"]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x_BCN = image_of(batch, "Segmenter")
        logits_BKN, label_BN = self(x_BCN), voxel_labels_of(batch, "Segmenter", x_BCN)
        self.dice.update(logits_BKN.argmax(dim=1), label_BN)
        losses = {f"val/{name}": value for name, value in self.losses(logits_BKN, label_BN).items()}
        self.log_dict(losses, batch_size=len(label_BN), sync_dist=True)
        self.log("val/dice", self.dice, prog_bar=True)
