"""DeepCluster-v2: all crops of an image predict the cluster that k-means gave it at the start of the epoch.

Source: Caron et al., "SwAV", NeurIPS 2020, arXiv 2006.09882, appendix (DeepCluster-v2), and the authors' code: a memory
of the embeddings of the large crops, spherical k-means for each of several heads, centroids that become prototypes and
are never trained, and a mean of cross-entropies over heads and over all crops, the one that was clustered too.
That code fills the memory by a pass over the data before it trains; here prototypes of the first epoch are random
directions, and an image's cluster is the nearest of these to its first global view.
Shapes: B images of this rank, N rows of all ranks, V views, G global, M images of the data, H heads, D embedding width,
K prototypes.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.distributed import agreed, gather_rows, rank, register_replicated, world_size
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_temperatures
from lightspan.core.unit_length import unit_length
from lightspan.datamodules.image.batch import ViewsBatch
from lightspan.nn.clustering.spherical_kmeans import drawn_rows, spherical_kmeans
from lightspan.nn.heads.dino_head import dot_products
from lightspan.nn.image_numbers import index_in, training_images
from lightspan.nn.multi_crop import MultiCropNetwork
from lightspan.nn.step_buffer import StepBuffer
from lightspan.nn.submodule_alias import submodule_alias
from lightspan.nn.views import global_first, require_global_views
from lightspan.nn.widths import given_width, require_projector
from lightspan.objectives.classes import label_cross_entropy
from lightspan.training.method import Method


class DeepCluster(Method):
    """Clusters all images between epochs and learns their clusters within one. The backbone is what is kept.

    Batches hold views of which the first `global_views` are of one size, and the number of each image.

    Args:
        backbone: [R C h w] -> [R num_features], for each size of view.
        projector: [R num_features] -> [R D], with D as its `out_features`.
        images: M, at least as many as there are training images, whose numbers must lie in [0, M). The memory holds
            `global_views` embeddings of each, on every rank; places without an image do no harm.
        prototypes: K of each head, at least one head; at most as many as there are training images.
        temperature: of predictions, > 0.
        steps: of k-means, at least 1.
        global_views: at least 2; heads take turns to cluster them.
        seed: of the rows that k-means starts from.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    Raises: UserError before the first step for data of more images than `images`, or of fewer than prototypes; before a
        batch of other numbers goes to the device, where they would crash a kernel.
    """

    memory_GMD: Tensor
    cluster_HM: Tensor
    clustered_in: Tensor

    backbone = submodule_alias("network.backbone", "The network's, which gives the features.")
    projector = submodule_alias("network.head", "The network's, which gives the embeddings.")
    keeps_apart = "prototypes are few enough for the images, and clusters keep their size"

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        images: int,
        prototypes: tuple[int, ...] = (3000, 3000, 3000),
        temperature: float = 0.1,
        steps: int = 10,
        global_views: int = 2,
        seed: int = 0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_temperatures(temperature=temperature)
        require_global_views(global_views)
        require_projector(backbone, projector)
        width = given_width(projector)
        if not prototypes or min(prototypes) < 1 or max(prototypes) > images or steps < 1 or seed < 0:
            raise UserError(
                f"prototypes={list(prototypes)} must be one number or more in [1, images={images}], steps={steps} at "
                f"least 1, and seed={seed} at least 0"
            )
        self.network, self.num_images = MultiCropNetwork(backbone, projector), images
        for head, count in enumerate(prototypes):
            register_replicated(self, f"prototypes_{head}", unit_length(torch.randn(count, width)))
        register_replicated(self, "memory_GMD", torch.zeros(global_views, images, width))
        register_replicated(self, "cluster_HM", torch.full((len(prototypes), images), -1))
        register_replicated(self, "clustered_in", torch.zeros((), dtype=torch.int64))
        self.seen = StepBuffer[tuple[Tensor, Tensor]]()  # of each micro-batch: embeddings [G B D] and image numbers [B]
        self.begun = 0  # the epoch; spares a question to the device in each step
        self.temperature, self.steps, self.global_views, self.seed = temperature, steps, global_views, seed

    def setup(self, stage: str) -> None:
        """Raises: UserError for data with more training images than places, or with fewer than a head has prototypes,
        where they know how many there are.
        """
        super().setup(stage)
        count, most = training_images(getattr(self.trainer, "datamodule", None)), max(map(len, self._all_prototypes()))
        if stage == "fit" and count is not None and count < most:
            raise UserError(
                f"k-means of {most} prototypes needs as many images, and the data have {count} to train on; lower "
                "model.init_args.prototypes or take more data"
            )

    @torch.no_grad()
    def assignments(self, batch: Any) -> Tensor:
        """Which prototypes of the first head a batch predicts, [B K]."""
        z_BD = unit_length(self.projector(self.features(batch)))
        return (wide(z_BD @ self.prototypes(0).to(z_BD).T) / self.temperature).softmax(dim=1)

    def prototypes(self, head: int) -> Tensor:
        """[K D], rows of unit length."""
        return getattr(self, f"prototypes_{head}")

    def _all_prototypes(self) -> list[Tensor]:
        return [self.prototypes(head) for head in range(len(self.cluster_HM))]

    def start_seed(self, epoch: int, head: int) -> int:
        """Of the rows from which a head's k-means starts."""
        return int(np.random.SeedSequence((self.seed, epoch, head)).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Not at Lightning's start of an epoch, which a run that resumes within one or at its end has once more or not
        # at all: the buffer knows.
        if self.current_epoch > self.begun:
            self.begun = self.current_epoch
            if self.current_epoch > int(self.clustered_in):
                self.cluster(self.current_epoch)
                self.clustered_in.fill_(self.current_epoch)

    @torch.no_grad()
    def cluster(self, epoch: int) -> None:
        """Each head's k-means, on one large crop's embeddings; images that the memory lacks keep their cluster."""
        for head in range(len(self.cluster_HM)):
            memory_MD = self.memory_GMD[head % self.global_views]
            known_M = memory_MD.any(dim=1).nonzero()[:, 0]
            own_M = known_M[rank() :: world_size()]
            count = len(self.prototypes(head))
            start_KD = drawn_rows(memory_MD[own_M], own_M, count, self.start_seed(epoch, head))
            found = spherical_kmeans(memory_MD[own_M], start_KD, self.steps)
            self.prototypes(head).copy_(agreed(found.centroid_KD))
            nearest_N, _ = gather_rows(found.nearest_M)
            self.cluster_HM[head, gather_rows(own_M)[0]] = nearest_N

    def training_step(self, batch: ViewsBatch, batch_idx: int) -> Tensor:
        views, index_B = global_first(batch, "DeepCluster", self.global_views), index_in(batch, self)
        z_VBD = unit_length(wide(self.network(views)))
        losses = []
        for head in range(len(self.cluster_HM)):
            scores_VBK = dot_products(z_VBD, self.prototypes(head)) / self.temperature
            known_B = self.cluster_HM[head, index_B]
            target_B = torch.where(known_B < 0, scores_VBK[0].argmax(dim=1), known_B)
            target_R = target_B.repeat(len(views))
            losses.append(label_cross_entropy(scores_VBK.flatten(0, 1), target_R))
        self.seen.add((z_VBD[: self.global_views].detach(), index_B), self.global_step)
        loss = torch.stack(losses).mean()
        self.log_training({"train/loss": loss})
        return loss

    def after_optimizer_step(self) -> None:
        """Puts the embeddings of all ranks and micro-batches into the memory."""
        embedded, numbers = zip(*self.seen.take(), strict=True)
        rows_NGD, _ = gather_rows(torch.cat(embedded, dim=1).transpose(0, 1).contiguous())
        index_N, _ = gather_rows(torch.cat(numbers))
        self.memory_GMD[:, index_N] = rows_NGD.transpose(0, 1).to(self.memory_GMD)
