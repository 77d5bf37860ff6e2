"""Supervised segmentation: cross-entropy and Dice of a class for each pixel or voxel.

Source: Ji, "MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba", 2024, arXiv 2406.05992, and its code,
PixDeep/MHS-VM, after VM-UNet (arXiv 2402.02491): both train L = L_CE + L_Dice, of two classes with equal weights. (Of
several the code of VM-UNet takes 0.4 and 0.6.) Theirs is the binary cross-entropy of one logit, which is that of the
difference of two here, so that any number of classes takes one way. What is new in MHS-VM is its network,
`lightspan.backbones.scanned_unet.ScannedUNet`; any other that gives maps trains here too.
Shapes: B batch of this rank, C channels, sides of as many axes as samples have, K classes.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from lightspan.core.batches import require_fields
from lightspan.core.ranges import require_in, require_weights
from lightspan.nn.class_overlap import overlap
from lightspan.nn.heads.pixel_classifier import PixelClassifier
from lightspan.nn.labels import places_labels_of, require_classes
from lightspan.nn.submodule_alias import submodule_alias
from lightspan.nn.views import image_of
from lightspan.objectives.classes import known_cross_entropy
from lightspan.objectives.dice import dice_loss
from lightspan.objectives.means import weighted_sum
from lightspan.training.method import Method


class Segmenter(Method):
    """Trains a backbone of maps and a linear map of each pixel. Pixels with a label below 0 are not learned or counted.

    Validation logs val/loss, and of all its pixels together val/dice and val/iou: of each class but the first, the
    ground, the mean over those that are there or guessed; 1 if none is.

    Args:
        backbone: samples [B C sides...] -> maps [B F sides...] with `num_features` F; probes read their mean.
        num_classes: K, at least 2, with the ground.
        field: of the batch, with the classes, int64 [B sides...]: `semantic` of pictures, `segmentation` of volumes.
        cross_entropy, dice: weights of the losses, each >= 0.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    backbone = submodule_alias("network.0", "Whose maps are the features.")

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        field: str = "semantic",
        cross_entropy: float = 1.0,
        dice: float = 1.0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_in("[2, inf)", num_classes=num_classes)
        require_weights(cross_entropy=cross_entropy, dice=dice)
        self.network = PixelClassifier(backbone, num_classes)
        self.classes, self.field = num_classes, field
        self.weights = {"cross_entropy_nats": cross_entropy, "dice_loss": dice}
        self.counts = MulticlassConfusionMatrix(num_classes, ignore_index=-1, validate_args=False)

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        batch = super()._on_before_batch_transfer(batch, dataloader_idx)
        if isinstance(batch, Mapping) and self.field in batch:
            require_classes(batch[self.field], self.classes, "Segmenter", self.field)
        return batch

    def forward(self, sample_BC: Tensor) -> Tensor:
        """Logits [B K sides...]."""
        return self.network(sample_BC)

    def features(self, batch: Any) -> Tensor:
        return self.backbone(image_of(batch, "Segmenter")).flatten(2).mean(dim=2)

    def truth(self, batch: Any) -> Tensor:
        """The classes, int64 [B sides...].

        Raises: UserError for a batch without `field`, or with other than a whole number for each pixel.
        """
        require_fields(batch, "Segmenter")
        sample_BC = image_of(batch, "Segmenter")
        source = "a folder of volumes with data.init_args.segmentation"
        return places_labels_of(batch, self.field, (len(sample_BC), *sample_BC.shape[2:]), "Segmenter", "pixel", source)

    def losses(self, batch: Any) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """(each loss before its weight, logits [B K sides...], classes [B sides...])."""
        label_B = self.truth(batch)
        logits_BK = self(image_of(batch, "Segmenter"))
        rows = logits_BK.movedim(1, -1).flatten(0, -2), label_B.clamp_min(0).flatten(), label_B.flatten() >= 0
        losses = {"cross_entropy_nats": known_cross_entropy(*rows), "dice_loss": dice_loss(logits_BK, label_B)}
        return losses, logits_BK, label_B

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses, *_ = self.losses(batch)
        loss = weighted_sum(losses, self.weights)
        self.log_training({"train/loss": loss} | {f"train/{name}": each for name, each in losses.items()})
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        losses, logits_BK, label_B = self.losses(batch)
        self.log("val/loss", weighted_sum(losses, self.weights), batch_size=len(label_B), sync_dist=True)
        self.counts.update(logits_BK.argmax(dim=1), label_B)

    def on_validation_epoch_end(self) -> None:
        for name, score in overlap(self.counts.compute()).items():
            self.log(f"val/{name}", score, prog_bar=True, sync_dist=True)
        self.counts.reset()

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logits [B K sides...]."""
        return self(image_of(batch, "Segmenter"))
