"""ADSL: metric learning by learners that each own some coordinates of the embedding and see one cluster of the data.

Source: Adiga, Dolz, Lombaert, "Attention-based Dynamic Subspace Learners for Medical Image Analysis", IEEE JBHI 2022,
arXiv 2206.09068, and the authors' code. One learner begins with all coordinates. When validation stalls, the last
learner keeps the coordinates that its loss needs most, and a new one begins with the rest
(`lightspan.nn.heads.subspace_learners`); `lightspan.objectives.margin` is the loss, and the attention is a part of the
backbone (`lightspan.backbones.attended`). At the end all learners are tuned as one embedding.
Differs from that code: the optimiser forgets the moments of rows that are drawn anew; splits follow validation data,
which are not the test data; an epoch that begins with a split also clusters; k-means is spherical, of the features
that the last epoch saw, without one more pass over the data; an epoch has as many steps as the data have batches,
where the largest cluster decides there. Unverified: the figures of the paper's tables.
Shapes: B images of this rank, M images of the data, F features, D embedding width.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightspan.core.distributed import agreed, register_replicated
from lightspan.core.ranges import require_in, require_shares, require_weights
from lightspan.core.unit_length import unit_length
from lightspan.datamodules.image.batch import ImageBatch
from lightspan.evaluation.geometry.clustering import agreement, kmeans, renumbered
from lightspan.evaluation.probes.evaluated_rows import EvaluatedRows
from lightspan.evaluation.probes.knn import recall_at_one
from lightspan.nn.clustering.feature_memory import FeatureMemory
from lightspan.nn.heads.subspace_learners import SubspaceLearners
from lightspan.nn.image_numbers import index_in, training_images
from lightspan.nn.labels import labels_of
from lightspan.nn.step_buffer import StepBuffer
from lightspan.nn.views import image_of
from lightspan.nn.widths import require_width
from lightspan.objectives.margin import margin_loss
from lightspan.optim.masks.follow import keep_only
from lightspan.training.method import BetweenEpochs

STARTS, STEPS = 5, 20  # of k-means
FIGURES = ("nmi", "recall_at_1")


class ADSL(BetweenEpochs):
    """Trains a backbone and an embedding in which images of a class are near one another.

    Batches hold labelled images, or one view of each, and their numbers. With `data.init_args.per_class` each batch is
    of one cluster, as in the paper; with other data rows meet those of their own cluster within a batch. Validation
    logs val/nmi and val/recall_at_1, on which splits depend: without it there is one, after `patience` epochs.

    Args:
        backbone: [B C H W] -> [B F]; what probes read, such as `lightspan.backbones.attended.Attended`.
        head: the embedding, F -> D.
        images: M, at least as many as there are training images, whose numbers lie in [0, M). Every rank keeps their
            features.
        num_classes: >= 2; also the number of clusters in validation.
        boundary, margin, cutoff: of the loss, >= 0.
        patience: epochs since the best val/nmi after which the last learner is split, once until it improves; >= 1.
        least_width: a learner of as many coordinates or fewer is not split; >= 1.
        least_kept: coordinates that must stay for a split to happen, >= 1.
        threshold: of the scaled importance above which a coordinate stays, in [0, 1].
        recluster_every: epochs, >= 1.
        tune_from: share of the run after which one cluster trains the whole embedding, in [0, 1].
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    least_rows = 2

    cluster_M: Tensor
    importance_D: Tensor
    best_nmi: Tensor
    best_epoch: Tensor
    may_split: Tensor
    tuning: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        head: SubspaceLearners,
        images: int,
        num_classes: int,
        boundary: float = 1.2,
        margin: float = 0.2,
        cutoff: float = 0.5,
        patience: int = 10,
        least_width: int = 10,
        least_kept: int = 5,
        threshold: float = 0.5,
        recluster_every: int = 2,
        tune_from: float = 5 / 6,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_width(backbone, "head.in_features", head.in_features)
        require_weights(boundary=boundary, margin=margin, cutoff=cutoff)
        require_shares(threshold=threshold, tune_from=tune_from)
        require_in("[2, inf)", num_classes=num_classes)
        require_in(
            "[1, inf)",
            patience=patience,
            least_width=least_width,
            least_kept=least_kept,
            recluster_every=recluster_every,
        )
        self.backbone, self.head, self.num_classes = backbone, head, num_classes
        self.boundary, self.margin, self.cutoff = boundary, margin, cutoff
        self.patience, self.least_width, self.least_kept = patience, least_width, least_kept
        self.threshold, self.recluster_every, self.tune_from = threshold, recluster_every, tune_from
        self.memory, self.num_images = FeatureMemory(images, head.in_features), images
        register_replicated(self, "cluster_M", torch.zeros(images, dtype=torch.int64))
        register_replicated(self, "importance_D", torch.zeros(head.out_features))
        register_replicated(self, "best_nmi", torch.zeros(()))
        register_replicated(self, "best_epoch", torch.tensor(-1))
        register_replicated(self, "may_split", torch.tensor(True))
        register_replicated(self, "tuning", torch.tensor(False))
        self.scores = StepBuffer[Tensor]()
        self.evaluated = EvaluatedRows()

    def configure_model(self) -> None:
        self.require_whole("draws rows of a whole embedding anew")

    def setup(self, stage: str) -> None:
        """Gives the data the clusters of which they make batches, where they have a place for them."""
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and training_images(data) and hasattr(data, "clusters"):
            data.clusters = self.clusters_in

    def clusters_in(self, epoch: int) -> np.ndarray:
        """The cluster of each training image; the loader asks when an epoch begins."""
        self.begin(epoch)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return self.cluster_M[: len(data.train)].cpu().numpy()

    def embeddings(self, batch: Any) -> Tensor:
        """All slices, [B D]."""
        return self.head.slices(self.head(self.features(batch)))

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        label_B, index_B = labels_of(batch, "ADSL"), index_in(batch, self)
        h_BF = self.backbone(image_of(batch, "ADSL"))
        cluster_B = self.cluster_M[index_B]
        z_BD = self.head.slice_of(self.head(h_BF), cluster_B, self.tuning)
        loss = margin_loss(z_BD, label_B, cluster_B, self.boundary, self.margin, self.cutoff)
        self.memory.see(unit_length(h_BF.detach()), index_B, self.global_step)
        self.log_training({"train/loss": loss, "train/learners": self.head.owner_D.max() + 1.0})
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.scores.add(self.head.taylor(), self.global_step)

    def after_optimizer_step(self) -> None:
        self.memory.follow()
        self.importance_D += torch.stack(self.scores.take()).sum(dim=0)

    def enter(self, epoch: int) -> None:
        """A split or the tuning, and new clusters."""
        was_tuning = bool(self.tuning)
        self.tuning.fill_(self.share_of_run() >= self.tune_from)
        stalled = bool(self.may_split) and epoch > int(self.best_epoch) + self.patience
        changed = bool(self.tuning) != was_tuning or (stalled and not self.tuning and self.split())
        if changed or epoch % self.recluster_every == 0:
            self.recluster(1 if self.tuning else self.head.learners, epoch)
        self.importance_D.zero_()

    def split(self) -> bool:
        """Splits the last learner by what its coordinates did for the loss in the last epoch; whether that happened."""
        if int((self.head.owner_D == self.head.learners - 1).sum()) <= self.least_width:
            return False
        freed_D = self.head.split(agreed(self.importance_D), self.threshold, self.least_kept)
        if freed_D is None:
            return False
        for parameter in (self.head.weight, self.head.bias):
            freed = freed_D.view(-1, *[1] * (parameter.ndim - 1)).expand_as(parameter)
            keep_only(self.trainer.optimizers[0], parameter, ~freed)
        self.may_split.fill_(False)
        return True

    def recluster(self, count: int, epoch: int) -> None:
        """Clusters keep their numbers as far as they overlap; images that were not seen keep their cluster.

        While fewer images have been seen than there are learners, all are of the first one.
        """
        if count == 1 or len(self.memory.known()) < count:
            self.cluster_M.zero_()
            return
        seeds = np.random.SeedSequence((self.head.seed, epoch)).generate_state(STARTS).tolist()
        index_N, cluster_N = self.memory.clusters(count, seeds, STEPS)
        self.cluster_M[index_N] = agreed(renumbered(cluster_N, self.cluster_M[index_N]))

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self.evaluated.add(self.embeddings(batch), labels_of(batch, "ADSL"), index_in(batch, self))

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        found = self.evaluated.log(self, "val", FIGURES, self.retrieval, prog_bar=True)
        if found and found["nmi"] > self.best_nmi:
            self.best_nmi.copy_(found["nmi"])
            self.best_epoch.fill_(self.current_epoch)
            self.may_split.fill_(True)

    def on_test_epoch_end(self) -> None:
        self.evaluated.log(self, "test", FIGURES, self.retrieval)

    def retrieval(self, z_ND: Tensor, label_N: Tensor) -> dict[str, float]:
        """How well k-means of all slices finds the classes, and how often the nearest image is of the same class."""
        assert self.num_classes is not None
        nmi = agreement(kmeans(z_ND, self.num_classes), label_N)["nmi"]
        return {"nmi": nmi, "recall_at_1": recall_at_one(z_ND, label_N)}
