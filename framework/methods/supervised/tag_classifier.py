"""Multi-label classification: of each of many tags a logistic regression on a backbone's features.

Source: Sun et al., "Revisiting Unreasonable Effectiveness of Data in Deep Learning Era", ICCV 2017, arXiv 1707.02968,
section 4.1: each class of JFT-300M has its own sigmoid, since an image has several labels, of which about a fifth is
wrong and many are missing.
Differs: the mean over tags in place of their sum, so that its scale is independent of how many there are.
Shapes: B images of this rank, C h w image, F features, G tags.
"""

from typing import Any

from torch import Tensor, nn

from lightspan.datamodules.image.batch import TaggedBatch
from lightspan.evaluation.scores.tag_precision import TagPrecision
from lightspan.nn.tags import tags_of
from lightspan.nn.views import image_of
from lightspan.nn.widths import given_width, require_width
from lightspan.objectives.asymmetric import asymmetric_loss
from lightspan.training.method import Method


class TagClassifier(Method):
    """Trains a backbone and a head of tags; logs val/mean_average_precision of the known tags that some image has.

    A batch has images, or one view of each, and `tags`, with `tags_known` where not all are known. Where none is, the
    loss is 0.

    Args:
        backbone: [B C h w] -> [B F]; what probes read.
        tagger: [B F] -> logits [B G], such as `torch.nn.Linear`; its `out_features` is G.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    def __init__(self, backbone: nn.Module, tagger: nn.Module, **optimization: Any) -> None:
        super().__init__(**optimization)
        require_width(backbone, "tagger.in_features", getattr(tagger, "in_features", None))
        self.backbone, self.tagger, self.num_tags = backbone, tagger, given_width(tagger)
        self.precision_of_tags = TagPrecision(self.num_tags)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Logits [B G]."""
        return self.tagger(self.backbone(x_BChw))

    def features(self, batch: TaggedBatch) -> Tensor:
        """[B F]."""
        return self.backbone(image_of(batch, "TagClassifier"))

    def loss(self, batch: TaggedBatch) -> tuple[Tensor, Tensor]:
        """(binary cross-entropy in nats, logits [B G])."""
        logits_BG = self(image_of(batch, "TagClassifier"))
        tags = tags_of(batch, "TagClassifier", self.num_tags)
        plain = {"positive_focus": 0.0, "negative_focus": 0.0, "margin": 0.0}
        return asymmetric_loss(logits_BG, tags.hold_BG, tags.known_BG, **plain), logits_BG

    def training_step(self, batch: TaggedBatch, batch_idx: int) -> Tensor:
        loss, _ = self.loss(batch)
        self.log_training({"train/loss_nats": loss}, prog_bar=True)
        return loss

    def validation_step(self, batch: TaggedBatch, batch_idx: int) -> None:
        loss, logits_BG = self.loss(batch)
        tags = tags_of(batch, "TagClassifier", self.num_tags)
        self.precision_of_tags.update(logits_BG, tags.hold_BG, tags.known_BG)
        self.log("val/mean_average_precision", self.precision_of_tags, prog_bar=True)
        self.log("val/loss_nats", loss, sync_dist=True, batch_size=len(logits_BG))
