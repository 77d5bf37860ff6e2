"""P2P: a frozen network of images classifies clouds of points that a small trained part paints as pictures.

Source: Wang et al., "P2P: Tuning Pre-trained Image Models for Point Cloud Analysis with Point-to-Pixel Prompting",
2022, arXiv 2208.02812, and its code. Features of points come from the cloud as it is; the cloud is turned and
stretched, and each point's feature is summed in the pixels that it has then; small convolutions make colours of the
sums (`lightspan.nn.points.prompt.PointPrompt`); the network, whose weights stay, and a head say the class. What trains
is the prompt and the head, by the cross-entropy with a share e of each label spread over the other K - 1 classes:
L = mean of -(1 - e) log p(y) - e / (K - 1) sum over k != y of log p(k).
In evaluation the logits of several views are averaged. By default no weight of the network trains; in the authors' code
norms and class tokens do (`train_norms`). Differences from it: a cloud has any number of points, of which no farthest
ones are chosen first; a common shift of a cloud before the projection, which takes no notice, is not drawn; views are
functions of seed, step and cloud. Not here: the head for parts of objects, which the paper has and its code lacks.
Shapes: B clouds, N points of all, V views, F features, K classes, S side of a picture.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.datamodules.points.batch import PointsBatch
from lightspan.nn.image_numbers import index_in
from lightspan.nn.labels import labels_of
from lightspan.nn.points.clouds import points_of
from lightspan.nn.points.prompt import PointPrompt
from lightspan.nn.points.views import ViewsFromAbove
from lightspan.nn.teachers.frozen import FixedNetwork
from lightspan.nn.widths import build_outputs, given_features, require_width
from lightspan.objectives.classes import label_cross_entropy, share_right
from lightspan.training.method import Method


def smoothed(label_B: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Shares of the classes, float32 [B K]: 1 - smoothing of the label, and equal parts of the rest of all others."""
    own_BK = (label_B[:, None] == torch.arange(num_classes, device=label_B.device)).float()
    return torch.lerp(own_BK, (1 - own_BK) / (num_classes - 1), smoothing)


class P2P(Method):
    """Trains a prompt and a head, of which `features` are what the network says of the prompt's pictures.

    Batches are `PointsBatch`, of which coordinates and labels are read. A cloud without points is an empty picture.

    Args:
        network: of images, [B 3 S S] -> [B F], without a classifier.
        num_classes: K, >= 2; labels are in [0, K).
        prompt: paints clouds; None is the paper's, for networks of ImageNet on 224 pixels.
        head: [B F] -> logits [B K]; None makes a linear layer.
        views: from where clouds are seen.
        votes: from how many sides, and at how many heights, a cloud is seen in evaluation.
        smoothing: e, in [0, 1).
        train_norms: train norms of the network and its class token too.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    Raises: UserError for a network that does not say its width or has a classifier, a head of another width or number
        of classes, and settings out of range.
    """

    batch_type = PointsBatch

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        prompt: PointPrompt | None = None,
        head: nn.Module | None = None,
        views: ViewsFromAbove | None = None,
        votes: tuple[int, int] = (10, 4),
        smoothing: float = 0.2,
        train_norms: bool = False,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_in("[2, inf)", num_classes=num_classes)
        require_in("[1, inf)", votes=votes)
        require_in("[0, 1)", smoothing=smoothing)
        width = given_features(network)
        if width is None:
            raise UserError(
                f"P2P needs the width of its network, but {type(network).__name__} has no attribute num_features; use "
                "one of lightspan.backbones or set it"
            )
        head = nn.Linear(width, num_classes) if head is None else head
        require_width(network, "head.in_features", getattr(head, "in_features", None))
        build_outputs(head, num_classes)
        if (outputs := getattr(head, "out_features", num_classes)) != num_classes:
            raise UserError(f"{type(head).__name__} tells {outputs} classes apart, but num_classes={num_classes}")
        self.backbone, self.prompt, self.head = FixedNetwork(network, train_norms), prompt or PointPrompt(), head
        self.views, self.votes = views or ViewsFromAbove(), (votes[0], votes[1])
        self.num_classes, self.smoothing = num_classes, smoothing

    def forward(self, xyz_N3: Tensor, offsets: Tensor, axes_B33: Tensor) -> Tensor:
        """Logits [B K] of clouds that are each seen along axes of their own."""
        return self.head(self.backbone(self.prompt(xyz_N3, offsets, axes_B33)))

    def seen(self, batch: Any) -> Tensor:
        """What the network says of each view of evaluation, [V B F]."""
        xyz_N3, offsets = points_of(batch, "P2P")
        x_NC = self.prompt.encoder(xyz_N3, offsets)
        views_V33 = self.views.around(*self.votes).to(xyz_N3.device)
        views_VB33 = views_V33[:, None].expand(-1, len(offsets) - 1, 3, 3)
        pictures = (self.prompt.pictures(x_NC, xyz_N3, offsets, axes_B33) for axes_B33 in views_VB33)
        return torch.stack([self.backbone(picture_B3SS) for picture_B3SS in pictures])

    def features(self, batch: Any) -> Tensor:
        """[B F], the mean over the views of evaluation."""
        return self.seen(batch).mean(dim=0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        xyz_N3, offsets = points_of(batch, "P2P")
        label_B = labels_of(batch, "P2P", len(offsets) - 1)
        logits_BK = self(xyz_N3, offsets, self.views.drawn(index_in(batch, self), self.global_step))
        loss = label_cross_entropy(logits_BK, smoothed(label_B, logits_BK.shape[1], self.smoothing))
        self.log_training(
            {"train/loss_nats": loss, "train/accuracy": share_right(logits_BK, label_B)}, batch_size=len(label_B)
        )
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logits [B K], the mean over the views of evaluation."""
        return self.head(self.seen(batch).flatten(0, 1)).unflatten(0, (-1, len(batch["offsets"]) - 1)).mean(dim=0)

    def _evaluate(self, stage: str, batch: Any) -> None:
        logits_BK, label_B = self.predict_step(batch, 0), labels_of(batch, "P2P")
        figures = {"loss_nats": label_cross_entropy(logits_BK, label_B), "accuracy": share_right(logits_BK, label_B)}
        self.log_dict(
            {f"{stage}/{name}": figure for name, figure in figures.items()},
            batch_size=len(label_B),
            sync_dist=True,
            prog_bar=True,
        )
