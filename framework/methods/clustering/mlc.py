"""MLC: features in which clusters are orthogonal subspaces, and the clustering, both without labels.

Source: Ding, Tong, Chan, Dai, Ma, Haeffele, "Unsupervised Manifold Linearizing and Clustering", ICCV 2023, arXiv
2301.01805, eq. 4: maximise R(Z) - R_c(Z, G), with rates of `lightspan.objectives.coding_rate`. Two heads of one shape
stand on the same pre-features: Z are the features, and C gives the membership of pairs, G = Sinkhorn(C C^T).
1. For the first `first_share` of the run the features alone are trained, by the total coding rate of two views.
2. Then the cluster head becomes a copy of the feature head, once, so that G starts as Sinkhorn(Z Z^T), and both train.
   Of several views Z is the mean, scaled to length 1, and G the mean, which is doubly stochastic too.
Each stage has the given schedule from its beginning, the second at a rate of its own.
Labels come from spectral clustering of G with the number of clusters given. Assumed, where the paper's appendix was not
at hand: temperature, rounds of Sinkhorn, and one optimiser for both stages.
Shapes: B images of this rank, N of all ranks, V views, R = B V rows, D width of both heads.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.distributed import agreed, gather_rows, raise_on_all_ranks, rank
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in, require_temperatures
from lightspan.core.unit_length import unit_length
from lightspan.evaluation.geometry.clustering import agreement, spectral
from lightspan.nn.copies import copied
from lightspan.nn.image_numbers import index_in
from lightspan.nn.views import views_of
from lightspan.nn.widths import require_projector, require_width
from lightspan.objectives.coding_rate import (
    coding_rate,
    pairwise_coding_rate,
    pairwise_membership,
    require_distortion,
    total_coding_rate_loss,
)
from lightspan.optim.schedules import ScheduleCallable, restarting_schedule
from lightspan.training.method import Method

ROUNDS_TO_READ = 100
FIGURES = {"val/cluster_accuracy": "accuracy", "val/nmi": "nmi", "val/ari": "ari"}


class MLC(Method):
    """Coding rates run over the images of all ranks; with sync_batchnorm N ranks train as one.

    Args:
        backbone: [R C H W] -> [R num_features]; what probes read.
        projector: pre-features, [R num_features] -> [R P].
        head: the feature head, [R P] -> [R D]; the cluster head begins as a copy.
        first_share: of the run, in [0, 1]; 0 clusters from the first step, for a network that was trained before.
        second_rate: rate of the second stage by that of the first, > 0; it needs a schedule.
        distortion: e^2 of all rates, > 0.
        similarity: weight of the agreement of views in the first stage, >= 0.
        temperature: of Sinkhorn, > 0.
        iterations: of Sinkhorn while training, >= 1.
        clusters: for validation on labelled images: logs val/cluster_accuracy, val/nmi and val/ari. None leaves it out.
            Takes N^2 numbers on every rank for N validation images, 10 GB for 50,000; rank 0 clusters them.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    keeps_apart = "distortion and similarity fit"

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        head: nn.Module,
        first_share: float = 0.8,
        second_rate: float = 1.0,
        distortion: float = 0.2,
        similarity: float = 30.0,
        temperature: float = 0.1,
        iterations: int = 5,
        clusters: int | None = None,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_distortion(distortion)
        require_temperatures(temperature=temperature)
        require_in("[0, 1]", first_share=first_share)
        require_in("[0, inf)", similarity=similarity)
        require_in("(0, inf)", second_rate=second_rate)
        require_in("[1, inf)", iterations=iterations)
        require_in("[2, inf)", clusters=clusters)
        require_projector(backbone, projector)
        require_width(projector, "head.in_features", getattr(head, "in_features", None))
        self.backbone, self.projector, self.head, self.cluster_head = backbone, projector, head, copied(head, "MLC")
        self.first_share, self.second_rate = first_share, second_rate
        self.distortion, self.similarity = distortion, similarity
        self.temperature, self.iterations, self.clusters = temperature, iterations, clusters
        self._validated: list[tuple[Tensor, Tensor, Tensor]] = []

    def run_schedule(self) -> ScheduleCallable | None:
        """The given one for each stage."""
        if (given := super().run_schedule()) is None:
            return None
        first = self._first_steps()
        second = self._total_steps() - first
        return restarting_schedule(given, (first, second), (1.0, self.second_rate)) if first and second else given

    def embeddings(self, batch: Any) -> Tensor:
        """Z before it is scaled, [B D]."""
        return self.head(super().embeddings(batch))

    def represent(self, image_RCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(Z, C), both [R D] with rows of length 1."""
        pre_RP = self.projector(self.backbone(image_RCHW))
        return unit_length(self.head(pre_RP)), unit_length(self.cluster_head(pre_RP))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Between steps: in a step FSDP2 has gathered the heads, and drops what is written to them. Micro-batches of one
        # step copy the same numbers again.
        if self.global_step == self._first_steps():
            self.copy_head()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        views = views_of(batch, "MLC", None if self.clustering else 2)
        z_RD, c_RD = self.represent(torch.cat(views))
        z_VBD, c_VBD = (x_RD.view(len(views), -1, x_RD.shape[1]) for x_RD in (z_RD, c_RD))
        if self.clustering:
            loss, figures = self.rate_reduction_loss(z_VBD, c_VBD)
        else:
            # The cluster head has a gradient of zero: DDP waits for one of each parameter.
            loss = total_coding_rate_loss(z_VBD[0], z_VBD[1], self.distortion, self.similarity) + 0 * c_RD.sum()
            figures = {}
        self.log_training({"train/loss": loss, **figures})
        return loss

    def rate_reduction_loss(self, z_VBD: Tensor, c_VBD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(R_c - R, both rates for the logs)."""
        z_BD = unit_length(z_VBD.mean(dim=0))
        rate, compressed = coding_rate(z_BD, self.distortion), self.compressed_rate(z_BD, c_VBD)
        return compressed - rate, {"train/rate": rate, "train/cluster_rate": compressed}

    def compressed_rate(self, z_BD: Tensor, c_VBD: Tensor) -> Tensor:
        """R_c of the features in the clusters that C gives."""
        memberships = [pairwise_membership(c_BD, self.temperature, self.iterations) for c_BD in c_VBD]
        return pairwise_coding_rate(z_BD, torch.stack(memberships).mean(dim=0), self.distortion)

    @property
    def clustering(self) -> bool:
        """Whether the second stage has begun."""
        return self.global_step >= self._first_steps()

    @torch.no_grad()
    def copy_head(self) -> None:
        """Gives the cluster head the numbers of the feature head; of sharded heads each rank copies its part."""
        pairs = zip(self.cluster_head.state_dict().values(), self.head.state_dict().values(), strict=True)
        for mine, theirs in pairs:
            mine.copy_(theirs)

    def _first_steps(self) -> int:
        """Steps of the first stage; without a Trainer a run has but one stage, the second if `first_share` is 0."""
        return math.ceil(self.first_share * (1 if self._trainer is None else self._total_steps()))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.clusters is not None:
            if "label" not in batch:
                raise UserError(
                    f"MLC clusters={self.clusters} compares clusters with labels, which these data lack; set it to null"
                )
            self._validated.append((self.represent(batch["image"])[1], batch["label"], index_in(batch, self)))

    def on_validation_epoch_end(self) -> None:
        if not self._validated or self.clusters is None:
            return
        c_BD, label_B, index_B = (torch.cat(parts) for parts in zip(*self._validated, strict=True))
        self._validated.clear()
        membership_NN, label_N, index_N = (gather_rows(rows)[0] for rows in (self.membership(c_BD), label_B, index_B))
        if self.trainer.sanity_checking or len(index_N) < self.clusters:
            return
        figures = torch.zeros(len(FIGURES), device=self.device)
        with raise_on_all_ranks("cluster the validation images"):
            if rank() == 0:
                order_N = index_N.sort(stable=True).indices  # the same graph on any number of ranks
                found_N = spectral(membership_NN[order_N][:, order_N].cpu(), self.clusters)
                scores = agreement(found_N, label_N[order_N].cpu())
                figures = torch.tensor([scores[name] for name in FIGURES.values()], device=self.device)
        self.log_dict(dict(zip(FIGURES, agreed(figures).unbind(), strict=True)))

    def membership(self, c_BD: Tensor) -> Tensor:
        """G [B N], from which labels are read: with so many rounds of Sinkhorn that columns too sum to 1."""
        return pairwise_membership(c_BD, self.temperature, ROUNDS_TO_READ)
