"""DEPICT: an autoencoder and a softmax over clusters, trained towards its own sharpened and evened-out predictions.

Source: Dizaji, Herandi, Deng, Cai, Huang, "Deep Clustering via Joint Convolutional Autoencoder Embedding and Relative
Entropy Minimization", ICCV 2017, arXiv 1704.06327: targets (eq. 7), loss (eq. 9), and the authors' code for settings.
1. For the first `first_share` of the run the denoising autoencoder alone is trained.
2. k-means of the clean embeddings gives hard targets, and the softmax begins at the directions of the centroids.
3. After `hard_share` targets come from the clean predictions, anew in each epoch.
The paper's target is power 1 and balance 1/2; the authors' code has DEC's, power 2 and balance 1.
Differs: shares of the run in place of stopping early (train/target_change is the paper's criterion for the end, at
1e-7); embeddings of an image are those of its last step, under the softmax of the epoch's beginning; the last batch of
an epoch counts. k-means with 40 starts is the paper's for large sets; AC-PIC, for small ones, is not built. As in the
equation, the layers that reconstructions are compared with have gradients too. Unverified: the published accuracies.
Shapes: B images of this rank, M images of the data, N of those seen, E embedding width, K clusters.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.backbones.conv_autoencoder import ConvAutoencoder
from lightspan.core.devices import wide
from lightspan.core.distributed import agreed, register_replicated
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_shares, require_weights
from lightspan.core.sharded import local, own_part, whole
from lightspan.core.unit_length import unit_length
from lightspan.datamodules.image.batch import ImageBatch
from lightspan.evaluation.geometry.clustering import agreement, kmeans
from lightspan.evaluation.probes.evaluated_rows import EvaluatedRows
from lightspan.nn.clustering.feature_memory import FeatureMemory
from lightspan.nn.image_numbers import index_in, training_images
from lightspan.nn.labels import labels_of
from lightspan.nn.views import image_of
from lightspan.objectives.means import mean, squared_error
from lightspan.objectives.prototypes import target_distribution
from lightspan.training.method import BetweenEpochs

STARTS = 40  # of k-means
FIGURES = ("accuracy", "nmi", "ari")
PRETRAINING, HARD, SOFT = 0, 1, 2


def reconstruction_loss(found: list[Tensor], wanted: list[Tensor], layer_weight: float) -> Tensor:
    """Mean squared error of the image, plus `layer_weight` times that of each layer."""
    image, *layers = (squared_error(x, y) for x, y in zip(found, wanted, strict=True))
    return image + layer_weight * torch.stack(layers).sum()


class DEPICT(BetweenEpochs):
    """Clusters images without labels. The encoder and the softmax are what is kept.

    Batches hold images and their numbers. Of labelled images validation logs val/accuracy by the best matching of
    clusters and classes, val/nmi and val/ari; nothing is chosen by them.

    Args:
        network: the autoencoder; its embedding is what probes read. The paper's has as many numbers as clusters.
        images: M, at least as many as there are training images, whose numbers lie in [0, M). Every rank keeps their
            embeddings and targets.
        clusters: K, >= 2.
        first_share, hard_share: of the run, in [0, 1], the first at most the second.
        power, balance: of the targets, see `lightspan.objectives.prototypes.target_distribution`.
        reconstruction: weight of the autoencoder's loss, >= 0; the first stage has it at 1.
        layer_weight: of the layers in that loss, >= 0.
        seed: of k-means.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    target_MK: Tensor
    stage: Tensor

    def __init__(
        self,
        network: ConvAutoencoder,
        images: int,
        clusters: int,
        first_share: float = 0.4,
        hard_share: float = 0.5,
        power: float = 1.0,
        balance: float = 0.5,
        reconstruction: float = 1.0,
        layer_weight: float = 0.1,
        seed: int = 42,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_shares(first_share=first_share, hard_share=hard_share)
        require_weights(power=power, balance=balance, reconstruction=reconstruction, layer_weight=layer_weight)
        if clusters < 2 or first_share > hard_share or power == 0 or seed < 0:
            raise UserError(
                f"DEPICT clusters={clusters} must be at least 2, first_share={first_share} at most "
                f"hard_share={hard_share}, power={power} above 0 and seed={seed} at least 0"
            )
        self.network, self.head = network, nn.Linear(network.num_features, clusters)
        nn.init.zeros_(self.head.bias)
        self.first_share, self.hard_share, self.power, self.balance = first_share, hard_share, power, balance
        self.reconstruction, self.layer_weight, self.clusters, self.seed = reconstruction, layer_weight, clusters, seed
        self.memory, self.num_images = FeatureMemory(images, network.num_features), images
        register_replicated(self, "target_MK", torch.zeros(images, clusters))
        register_replicated(self, "stage", torch.tensor(PRETRAINING))
        self.evaluated = EvaluatedRows()

    @property
    def backbone(self) -> nn.Module:
        """The clean encoder."""
        return self.network

    def setup(self, stage: str) -> None:
        super().setup(stage)
        count = training_images(getattr(self.trainer, "datamodule", None))
        if stage == "fit" and count is not None and count < self.clusters:
            raise UserError(f"DEPICT clusters={self.clusters} needs as many images, and the data have {count}")

    def assignments(self, batch: Any) -> Tensor:
        """Clean predictions, [B K]."""
        with torch.no_grad():
            return wide(self.head(self.features(batch))).softmax(dim=1)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        index_B = index_in(batch, self)
        image_BCHW = image_of(batch, "DEPICT")
        *_, noisy_BE = self.network.encode(image_BCHW, noisy=True)
        *layers, clean_BE = self.network.encode(image_BCHW)
        reconstruction = reconstruction_loss(self.network.decode(noisy_BE), [image_BCHW, *layers], self.layer_weight)
        # Targets of the first stage are zero, and so is this then, with its gradient.
        clustering = -mean((self.target_MK[index_B] * wide(self.head(noisy_BE)).log_softmax(dim=1)).sum(dim=1))
        weight = torch.where(self.stage == PRETRAINING, 1.0, self.reconstruction)
        self.memory.see(clean_BE, index_B, self.global_step)
        self.log_training({"train/reconstruction": reconstruction, "train/clustering_nats": clustering})
        return weight * reconstruction + clustering

    def after_optimizer_step(self) -> None:
        self.memory.follow()

    def enter(self, epoch: int) -> None:
        """The next stage, or the next targets."""
        known_N, share = self.memory.known(), self.share_of_run()
        if self.stage == PRETRAINING and share >= self.first_share and len(known_N) >= self.clusters:
            self.start_clusters(known_N)
        elif self.stage != PRETRAINING and share >= self.hard_share:
            self.stage.fill_(SOFT)
            self.renew_targets(known_N)

    @torch.no_grad()
    def start_clusters(self, known_N: Tensor) -> None:
        """Hard targets by k-means, and the softmax at the directions of its centroids, without a bias."""
        row_NE = self.memory.rows_MF[known_N]
        cluster_N = agreed(kmeans(row_NE.cpu(), self.clusters, self.seed, STARTS).to(row_NE.device))
        hard_NK = nn.functional.one_hot(cluster_N, self.clusters).to(row_NE)
        direction_KE = unit_length(hard_NK.T @ row_NE)
        local(self.head.weight).copy_(own_part(direction_KE.to(self.head.weight.dtype), self.head.weight))
        local(self.head.bias).zero_()
        self.target_MK[known_N] = hard_NK.to(self.target_MK)
        self.stage.fill_(HARD)

    @torch.no_grad()
    def renew_targets(self, known_N: Tensor) -> None:
        """The E-step: from the clean predictions of all images that were seen."""
        logit_NK = self.memory.rows_MF[known_N] @ whole(self.head.weight).T.to(self.memory.rows_MF)
        p_NK = (logit_NK + whole(self.head.bias).to(logit_NK)).softmax(dim=1)
        target_NK = agreed(target_distribution(p_NK, self.power, self.balance).to(self.target_MK))
        self.log("train/target_change", (target_NK - self.target_MK[known_N]).square().mean(), batch_size=1)
        self.target_MK[known_N] = target_NK

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        if "label" in batch:
            self.evaluated.add(self.assignments(batch), labels_of(batch, "DEPICT"), index_in(batch, self))

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self.evaluated.log(self, "val", FIGURES, _matched)

    def on_test_epoch_end(self) -> None:
        self.evaluated.log(self, "test", FIGURES, _matched)


def _matched(p_NK: Tensor, label_N: Tensor) -> dict[str, float]:
    return agreement(p_NK.argmax(dim=1), label_N)
