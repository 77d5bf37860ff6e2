"""SwAV's objective as a part: prototypes score embeddings, and the code of one view is predicted from the others.

Source: Caron et al., "SwAV", NeurIPS 2020, arXiv 2006.09882: swapped prediction (eq. 1, 2, 6), codes by Sinkhorn-Knopp
(eq. 3-5, appendix A), queue (section 4.1), and the authors' code: prototypes come back to unit length after each step,
which is itself unconstrained, and a batch joins the queue after its step, so that its micro-batches do not meet one
another there either. Sinkhorn-Knopp runs in logarithms over the rows of all ranks; each rank adds its share of the
queue to them.
Shapes: B samples of this rank, G views with codes, V views, D embedding width, K prototypes, L rows of a queue.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.distributed import rank, world_size
from lightspan.core.ranges import require_in, require_shares, require_temperatures
from lightspan.core.sharded import local, row_norms
from lightspan.core.unit_length import unit_length
from lightspan.nn.heads.dino_head import dot_products, zero_grads
from lightspan.nn.teachers.feature_queue import FeatureQueue
from lightspan.nn.views import require_global_views
from lightspan.objectives.prototypes import cross_view_loss, sinkhorn


class Predicted(NamedTuple):
    """The loss, and the entropy of the mean prediction in nats: log K while all prototypes are predicted alike, 0 if
    one is predicted of all samples.
    """

    loss: Tensor
    entropy: Tensor


class SwappedPrediction(nn.Module):
    """Prototypes and their queues. A method calls it with the embeddings of a step, `hold` before the optimiser's step,
    and `follow` after it.

    Args:
        in_features: D.
        prototypes: K, well below the number of samples.
        temperature: of predictions, > 0.
        code_temperature: epsilon of Sinkhorn-Knopp, > 0; a smaller one gives harder codes.
        iterations: of Sinkhorn-Knopp, at least 1.
        queue: L, embeddings of each view with codes from earlier batches of all ranks that take part in Sinkhorn-Knopp,
            >= 0: for batches with fewer samples than prototypes. It is used once it is full.
        queue_from: share of the run before which no queue is filled, in [0, 1].
        freeze_prototypes: share of the run in which prototypes keep their place, in [0, 1].
        global_views: G, at least 2.
    """

    parameter_kinds = {"weight": "embeddings"}  # noqa: RUF012 - read by lightspan.optim.groups

    def __init__(
        self,
        in_features: int,
        prototypes: int = 3000,
        temperature: float = 0.1,
        code_temperature: float = 0.05,
        iterations: int = 3,
        queue: int = 0,
        queue_from: float = 0.0,
        freeze_prototypes: float = 1 / 800,
        global_views: int = 2,
    ) -> None:
        super().__init__()
        require_shares(queue_from=queue_from, freeze_prototypes=freeze_prototypes)
        require_temperatures(temperature=temperature, code_temperature=code_temperature)
        require_global_views(global_views)
        require_in("[1, inf)", in_features=in_features, prototypes=prototypes, iterations=iterations)
        require_in("[0, inf)", queue=queue)
        self.in_features = in_features
        self.weight = nn.Linear(in_features, prototypes, bias=False).weight
        self.queues = nn.ModuleList(FeatureQueue(queue, in_features) for _ in range(global_views if queue else 0))
        self.temperature, self.code_temperature, self.iterations = temperature, code_temperature, iterations
        self.queue_from, self.freeze_prototypes, self.global_views = queue_from, freeze_prototypes, global_views
        self.renormalise()

    def forward(self, embedded_VBD: Tensor, share: float, step: int) -> Predicted:
        """Of the embeddings of all views, scaled to unit length here; the first G have codes.

        Args:
            share: of the run that is done, in [0, 1].
            step: the number of the optimiser's step, which the queues need.
        """
        z_VBD = unit_length(wide(embedded_VBD))
        scores_VBK = dot_products(z_VBD, self.weight)
        codes_GBK = torch.stack([self.codes(view, scores_VBK[view]) for view in range(self.global_views)])
        if share >= self.queue_from:
            for queue, z_BD in zip(self.queues, z_VBD, strict=False):
                queue.see(z_BD, step)  # type: ignore[operator]
        loss = cross_view_loss(codes_GBK, scores_VBK, self.temperature)
        answer_1K = self._softmax(scores_VBK.detach()).flatten(0, 1).mean(dim=0, keepdim=True)
        return Predicted(loss, torch.special.entr(answer_1K).sum())

    @torch.no_grad()
    def codes(self, view: int, scores_BK: Tensor) -> Tensor:
        """Targets [B K] of a view, with its queue's rows beside those of all ranks."""
        queued_LK = scores_BK[:0]
        if self.queues and self.queues[view].full:
            own_LD: Tensor = self.queues[view].rows_LD[rank() :: world_size()]  # type: ignore[index]
            queued_LK = dot_products(own_LD.to(scores_BK), self.weight)
        scores_LK = torch.cat([queued_LK, scores_BK])
        return sinkhorn(scores_LK, self.code_temperature, self.iterations)[len(queued_LK) :]

    @torch.no_grad()
    def assignments(self, embedded_BD: Tensor) -> Tensor:
        """Which prototypes are predicted, [B K], as the loss compares it with codes."""
        return self._softmax(dot_products(unit_length(wide(embedded_BD)), self.weight))

    def _softmax(self, scores_K: Tensor) -> Tensor:
        return (wide(scores_K) / self.temperature).softmax(dim=-1)

    def hold(self, share: float) -> None:
        """Before the optimiser's step: prototypes that are frozen have no gradient."""
        if share < self.freeze_prototypes:
            zero_grads([self])

    @torch.no_grad()
    def follow(self) -> None:
        """After the optimiser's step: prototypes at unit length, queues with the rows of the step. Every rank calls
        it.
        """
        self.renormalise()
        for queue in self.queues:
            queue.follow()  # type: ignore[operator]

    @torch.no_grad()
    def renormalise(self) -> None:
        """Puts the prototypes back to unit length, however their rows or columns are split over ranks."""
        local(self.weight).div_(row_norms(self.weight).clamp_min(1e-12))
