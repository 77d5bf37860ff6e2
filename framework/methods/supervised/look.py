"""LOOK: most of an image's nearest neighbours should share its label, so that a class may have several modes.

Source: Feng, Jiang, Tang, Jin, Gao, Zhang, "Rethinking Supervised Pre-training for Better Downstream Transferring",
ICLR 2022, arXiv 2110.06014. The loss is a soft leave-one-out error of k nearest neighbours, with w = exp(cosine / T):

    p(y_i | x_i) = sum_{j in N(i)} w_ij 1[y_j = y_i] / sum_{j in N(i)} w_ij,    L = -mean_i log p(y_i | x_i)

Unlike SupCon, which asks each image of a class to be near, it asks only that those that are near are of the class. With
all images as neighbours it is the logarithmic form of neighbourhood components analysis (Goldberger et al., 2004).
There is no public code, and these are assumed: the bank is a queue that a moving average of the network fills, as in
MoCo; where no neighbour has the label, the nearest of the class joins them, as without it p is 0 and the loss infinite;
images without a classmate in the bank are ignored.
Shapes: B images of this rank, C H W image, D embedding width, L rows in the bank, K neighbours.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.distributed import all_reduce_sums
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_shares, require_temperatures
from lightspan.nn.heads.projector import Projector
from lightspan.nn.image_numbers import index_in
from lightspan.nn.submodule_alias import submodule_alias
from lightspan.nn.teachers.ema import EMATeacher
from lightspan.nn.teachers.labelled_bank import Bank, LabelledBank
from lightspan.nn.views import labelled_views
from lightspan.nn.widths import require_projector
from lightspan.objectives.info_nce import gated_cosine, unit
from lightspan.training.method import Method

CHUNK = 1024
"""Images whose similarities with the bank are computed at a time, which bounds memory and changes nothing."""


def neighbour_loss(
    query_BD: Tensor, label_B: Tensor, index_B: Tensor, bank: Bank, neighbours: int, temperature: float
) -> Tensor:
    """Mean of -log p(y_i | x_i) over the images of all ranks that have a say; 0 if none has.

    Rows of the bank that are of the image itself are never its neighbours, and neither are those that are not held.
    Which rows are neighbours is not differentiated, and the bank gets no gradient.

    Args:
        query_BD: embeddings, not normalised. Half precision is widened to float32, also under autocast.
        label_B, index_B: int64, classes and numbers of the images.
        bank: the same on all ranks; its rows need not be normalised.
        neighbours: K, from 1 to L; while fewer rows are held, all of them.
        temperature: T > 0.
    Returns: scalar >= 0, the same on all ranks.
    """
    chunks = zip(query_BD.split(CHUNK), label_B.split(CHUNK), index_B.split(CHUNK), strict=True)
    losses, say = zip(*(_losses(*chunk, bank, neighbours, temperature) for chunk in chunks), strict=True)
    loss_B, say_B = torch.cat(losses), torch.cat(say)
    total, anchors = all_reduce_sums(loss_B.sum(), say_B.sum().to(loss_B.dtype))
    return total / anchors.clamp_min(1)


def _losses(
    query_BD: Tensor, label_B: Tensor, index_B: Tensor, bank: Bank, neighbours: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """-log p(y_i | x_i) [B], 0 for images without a say, and which have one, bool [B]."""
    logits_BL = gated_cosine(query_BD, bank.rows_LD.detach()) / temperature
    # The least number in place of -inf, with which a row without neighbours would have a gradient of NaN.
    nothing = torch.finfo(logits_BL.dtype).min
    others_BL = (bank.index_L != index_B[:, None]) & bank.held_L
    right_BL = others_BL & (bank.label_L == label_B[:, None])
    own_B1 = logits_BL.detach().masked_fill(~right_BL, nothing).argmax(dim=1, keepdim=True)
    near_BK = logits_BL.detach().masked_fill(~others_BL, nothing).topk(neighbours, dim=1).indices
    is_near_BL = torch.zeros_like(others_BL).scatter(1, near_BK, True).scatter(1, own_B1, True) & others_BL
    all_B, right_B = (
        logits_BL.masked_fill(~(is_near_BL & among_BL), nothing).logsumexp(dim=1) for among_BL in (others_BL, right_BL)
    )
    say_B = right_BL.any(dim=1)
    return torch.where(say_B, all_B - right_B, 0), say_B


class LOOK(Method):
    """Looks for neighbours in a bank of earlier images. The student is what is kept.

    The bank is that of all ranks, and what a step shows it comes in after the step, so that N ranks and accumulated
    gradients train as one rank with the whole batch. All views of an image are asked, and the first one is banked.
    With one class, or before the bank holds a row, the loss is 0.

    Args:
        backbone: the student's, [R C H W] -> [R num_features]; the teacher that fills the bank is a copy.
        projector: [R num_features] -> [R D], copied too.
        queue: L, best a multiple of the global batch.
        neighbours: K, from 1 to L.
        all_until: share of the run, in [0, 1], in which all rows of the bank are neighbours: those that a network finds
            before it has learned anything are random, and may lock in.
        momentum: of the teacher, in [0, 1].
        temperature: T > 0.
        batch_statistics: of the teacher's BatchNorms, see `lightspan.methods.contrastive.moco.MoCo`.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    Raises: UserError for a setting out of range, more neighbours than the queue has rows among them.
    """

    learns_from_labels = True
    backbone = submodule_alias("student.0", "The student's, which gives the features.")
    projector = submodule_alias("student.1", "The student's, which gives the embeddings.")

    def __init__(
        self,
        backbone: nn.Module,
        projector: Projector,
        queue: int = 65536,
        neighbours: int = 200,
        all_until: float = 0.0,
        momentum: float = 0.999,
        temperature: float = 0.1,
        batch_statistics: bool = False,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_temperatures(temperature=temperature)
        require_shares(momentum=momentum, all_until=all_until)
        require_projector(backbone, projector)
        self.student = nn.Sequential(backbone, projector)
        self.teacher = EMATeacher(self.student, batch_statistics, average_statistics=True)
        self.bank = LabelledBank(queue, projector.out_features)
        if not 1 <= neighbours <= queue:
            raise UserError(f"neighbours={neighbours} must lie in [1, queue={queue}], the rows of the bank")
        self.queue, self.neighbours, self.all_until = queue, neighbours, all_until
        self.momentum, self.temperature = momentum, temperature

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        views, label_B = labelled_views(batch, "LOOK")
        index_B = index_in(batch, self)
        early = self.all_until > 0 and self.share_of_run() < self.all_until
        neighbours = self.queue if early else self.neighbours
        label_R, index_R = label_B.repeat(len(views)), index_B.repeat(len(views))
        query_RD = self.student(torch.cat(views))
        loss = neighbour_loss(query_RD, label_R, index_R, self.bank(), neighbours, self.temperature)
        self.bank.see(unit(self.teacher(views[0])), label_B, index_B, self.global_step)
        self.log_training({"train/loss": loss})
        return loss

    def after_optimizer_step(self) -> None:
        self.teacher.follow(self.student, self.momentum)
        self.bank.follow()
