"""SwAV: the cluster codes of one crop are predicted from another crop of the same image, while both are learned.

Source: Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments" (SwAV), NeurIPS
2020, arXiv 2006.09882: multi-crop (section 3.3) in front of `lightspan.objectives.swapped_prediction`, which has the
loss, its codes and their queue.
Shapes: B images of this rank, R rows of one pass, D embedding width, K prototypes, L rows of a queue.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.datamodules.image.batch import ViewsBatch
from lightspan.nn.multi_crop import MultiCropNetwork
from lightspan.nn.submodule_alias import submodule_alias
from lightspan.nn.views import global_first
from lightspan.nn.widths import given_width, require_projector
from lightspan.objectives.swapped_prediction import SwappedPrediction
from lightspan.training.method import Method


class SwAV(Method):
    """Clusters and learns at once, without negatives, teacher or memory of the data. The backbone is what is kept.

    Batches hold views of which the first `global_views` are of one size; codes are theirs, and all views predict them.

    Args:
        backbone: [R C h w] -> [R num_features], for each size of view.
        projector: [R num_features] -> [R D], with D as its `out_features`, such as
            `lightspan.nn.heads.projector.Projector`; a BatchNorm in it sees the rows of all views at once.
        prototypes: K, well below the number of images.
        temperature: of predictions, > 0.
        code_temperature: epsilon of Sinkhorn-Knopp, > 0; a smaller one gives harder codes.
        iterations: of Sinkhorn-Knopp, at least 1.
        queue: L, embeddings of each global view from earlier batches of all ranks that take part in Sinkhorn-Knopp,
            >= 0: for batches with fewer images than prototypes. It is used once it is full.
        queue_from: share of the run before which no queue is filled, in [0, 1].
        freeze_prototypes: share of the run in which prototypes keep their place, in [0, 1].
        global_views: at least 2.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    backbone = submodule_alias("network.backbone", "The network's, which gives the features.")
    projector = submodule_alias("network.head", "The network's, which gives the embeddings.")
    keeps_apart = "code_temperature and iterations give codes that use all prototypes alike"

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        prototypes: int = 3000,
        temperature: float = 0.1,
        code_temperature: float = 0.05,
        iterations: int = 3,
        queue: int = 0,
        queue_from: float = 0.0,
        freeze_prototypes: float = 1 / 800,
        global_views: int = 2,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_projector(backbone, projector)
        self.network = MultiCropNetwork(backbone, projector)
        self.prototypes = SwappedPrediction(
            given_width(projector),
            prototypes,
            temperature,
            code_temperature,
            iterations,
            queue,
            queue_from,
            freeze_prototypes,
            global_views,
        )

    @torch.no_grad()
    def assignments(self, batch: Any) -> Tensor:
        """Which prototypes a batch predicts, [B K], as the loss compares it with codes."""
        return self.prototypes.assignments(self.projector(self.features(batch)))

    def training_step(self, batch: ViewsBatch, batch_idx: int) -> Tensor:
        views = global_first(batch, "SwAV", self.prototypes.global_views)
        loss, entropy = self.prototypes(self.network(views), self.share_of_run(), self.global_step)
        self.log_training({"train/loss": loss, "train/prototype_entropy_nats": entropy})
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.prototypes.hold(self.share_of_run())

    def after_optimizer_step(self) -> None:
        self.prototypes.follow()
