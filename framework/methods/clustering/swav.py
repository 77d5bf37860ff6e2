"""SwAV: the cluster codes of one crop are predicted from another crop of the same image, while both are learned.

Source: Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments" (SwAV), NeurIPS
2020, arXiv 2006.09882: swapped prediction (eq. 1, 2, 6), codes by Sinkhorn-Knopp (eq. 3-5, appendix A), multi-crop
(section 3.3), queue (section 4.1), and the authors' code: prototypes come back to unit length after each step, which is
itself unconstrained, and a batch joins the queue after its step, so that its micro-batches do not meet one another
there either. Sinkhorn-Knopp runs in logarithms over
the rows of all ranks; each rank adds its share of the queue to them.
Shapes: B images of this rank, G global and V views, D embedding width, K prototypes, L rows of a queue.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.distributed import rank, world_size
from lightspan.core.ranges import require_in, require_shares, require_temperatures
from lightspan.core.sharded import local, row_norms
from lightspan.core.unit_length import unit_length
from lightspan.datamodules.image.batch import ViewsBatch
from lightspan.nn.heads.dino_head import dot_products, zero_grads
from lightspan.nn.multi_crop import MultiCropNetwork
from lightspan.nn.submodule_alias import submodule_alias
from lightspan.nn.teachers.feature_queue import FeatureQueue
from lightspan.nn.views import global_first, require_global_views
from lightspan.nn.widths import given_width, require_projector
from lightspan.objectives.prototypes import cross_view_loss, sinkhorn
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
        require_shares(queue_from=queue_from, freeze_prototypes=freeze_prototypes)
        require_temperatures(temperature=temperature, code_temperature=code_temperature)
        require_global_views(global_views)
        require_projector(backbone, projector)
        width = given_width(projector)
        require_in("[1, inf)", prototypes=prototypes, iterations=iterations)
        require_in("[0, inf)", queue=queue)
        self.network = MultiCropNetwork(backbone, projector)
        self.prototypes = nn.Linear(width, prototypes, bias=False)
        self.prototypes.parameter_kinds = {"weight": "embeddings"}  # type: ignore[assignment]
        self.queues = nn.ModuleList(FeatureQueue(queue, width) for _ in range(global_views if queue else 0))
        self.temperature, self.code_temperature, self.iterations = temperature, code_temperature, iterations
        self.queue_from, self.freeze_prototypes, self.global_views = queue_from, freeze_prototypes, global_views
        self.renormalise()

    @torch.no_grad()
    def assignments(self, batch: Any) -> Tensor:
        """Which prototypes a batch predicts, [B K], as the loss compares it with codes."""
        z_BD = unit_length(self.projector(self.features(batch)))
        return (wide(self.prototypes(z_BD)) / self.temperature).softmax(dim=1)

    def training_step(self, batch: ViewsBatch, batch_idx: int) -> Tensor:
        views = global_first(batch, "SwAV", self.global_views)
        z_VBD = unit_length(wide(self.network(views)))
        scores_VBK = dot_products(z_VBD, self.prototypes.weight)
        codes_GBK = torch.stack([self.codes(view, scores_VBK[view]) for view in range(self.global_views)])
        if self.share_of_run() >= self.queue_from:
            for queue, z_BD in zip(self.queues, z_VBD, strict=False):
                queue.see(z_BD, self.global_step)  # type: ignore[operator]
        loss = cross_view_loss(codes_GBK, scores_VBK, self.temperature)
        answer_1K = (
            (wide(scores_VBK.detach()) / self.temperature).softmax(dim=-1).flatten(0, 1).mean(dim=0, keepdim=True)
        )
        # log K while all prototypes are predicted alike, 0 if one is predicted of all images.
        self.log_training({"train/loss": loss, "train/prototype_entropy_nats": torch.special.entr(answer_1K).sum()})
        return loss

    @torch.no_grad()
    def codes(self, view: int, scores_BK: Tensor) -> Tensor:
        """Targets [B K] of a global view, with the queue's rows beside those of all ranks."""
        queued_LK = scores_BK[:0]
        if self.queues and self.queues[view].full:
            own_LD: Tensor = self.queues[view].rows_LD[rank() :: world_size()]  # type: ignore[index]
            queued_LK = dot_products(own_LD.to(scores_BK), self.prototypes.weight)
        scores_LK = torch.cat([queued_LK, scores_BK])
        return sinkhorn(scores_LK, self.code_temperature, self.iterations)[len(queued_LK) :]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.share_of_run() < self.freeze_prototypes:
            zero_grads([self.prototypes])

    def after_optimizer_step(self) -> None:
        self.renormalise()
        for queue in self.queues:
            queue.follow()  # type: ignore[operator]

    @torch.no_grad()
    def renormalise(self) -> None:
        """Puts the prototypes back to unit length, however their rows or columns are split over ranks."""
        weight_KD = self.prototypes.weight
        local(weight_KD).div_(row_norms(weight_KD).clamp_min(1e-12))
