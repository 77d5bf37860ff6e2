"""Self-distillation on prototypes: a teacher's scores become targets, a student's scores are held to them.

Source: Caron et al., "SwAV", 2020, arXiv 2006.09882, section 3 and appendix A (Sinkhorn-Knopp); Caron et al., "DINO",
2021, arXiv 2104.14294, eq. 1-3 (cross-view loss, centring); CION, 2024, arXiv 2409.18569 (targets of an identity); Zhou
et al., "iBOT", 2021, arXiv 2111.07832, eq. 3 (masked patches, by the weights of `prototype_cross_entropy`).
Targets carry no gradient. Temperatures are > 0; a target's is below a student's, or both collapse to a uniform answer.
Shapes: B rows of this rank, K prototypes, G views with targets, V views of a student, N masked patches (in
`target_distribution` all images), H heads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightspan.core.devices import wide
from lightspan.core.distributed import all_reduce_max, all_reduce_sum
from lightspan.objectives.means import mean_of


@torch.no_grad()
def sinkhorn(scores_BK: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Targets [B K] in float32 or wider, each row a distribution, all prototypes used about equally over all ranks.

    exp(scores / temperature) with its columns, then its rows, normalised `iterations` times (SwAV eq. 3-5), in
    logarithms, so that no row and no prototype underflows. Batches of different sizes on the ranks count by their rows;
    a rank without rows takes part.
    """
    scores_BK = wide(scores_BK) / temperature
    return (scores_BK + column_potentials(scores_BK, iterations)).softmax(dim=1)


@torch.no_grad()
def column_potentials(scores_BK: Tensor, iterations: int) -> Tensor:
    """v [K] such that softmax(scores + v) over each row has equal column sums over all ranks, in the limit of many
    `iterations`; scores are those over the temperature, in float32 or wider.
    """
    by_row_B, by_column_K = scores_BK.new_zeros(len(scores_BK)), scores_BK.new_zeros(scores_BK.shape[1])
    for _ in range(iterations):
        shifted_BK = scores_BK + by_row_B[:, None]
        largest_K = all_reduce_max(
            shifted_BK.amax(dim=0) if len(scores_BK) else scores_BK.new_full(scores_BK.shape[1:], -torch.inf)
        )
        by_column_K = -largest_K - all_reduce_sum((shifted_BK - largest_K).exp().sum(dim=0)).log()
        by_row_B = -(scores_BK + by_column_K).logsumexp(dim=1)
    return by_column_K


@torch.no_grad()
def target_distribution(p_NK: Tensor, power: float = 1.0, balance: float = 0.5) -> Tensor:
    """q_ik proportional to p_ik^power / (sum_j p_jk)^balance, rows sum to 1, [N K] in float32 or wider: targets of
    clusters out of their own predictions.

    Source: Dizaji et al., "DEPICT", ICCV 2017, arXiv 1704.06327, eq. 7, whose targets are the defaults; power 2 and
    balance 1 are those of Xie et al., "DEC", ICML 2016, arXiv 1511.06335, eq. 3.

    Args:
        p_NK: predictions of all images, rows sum to 1. A cluster that nobody is in stays without a share.
        power: > 0; above 1 sharpens.
        balance: >= 0; above 0 large clusters have less, as suits classes of about equal size.
    """
    p_NK = wide(p_NK)
    least = torch.finfo(p_NK.dtype).tiny
    sizes_K = p_NK.sum(dim=0).clamp_min(least)
    # In logarithms: p^2 of a prediction below 1e-23 is zero in float32.
    logit_NK = power * p_NK.clamp_min(least).log() - balance * sizes_K.log()
    return logit_NK.masked_fill(p_NK == 0, -torch.inf).softmax(dim=1)


@torch.no_grad()
def centred_softmax(scores_BK: Tensor, centre_K: Tensor, temperature: float) -> Tensor:
    """softmax((scores - centre) / temperature), [B K] in float32 or wider (DINO eq. 1 with section 3.1's centring)."""
    return ((wide(scores_BK) - centre_K) / temperature).softmax(dim=1)


def prototype_cross_entropy(
    target_BK: Tensor, scores_BK: Tensor, temperature: float, weight_B: Tensor | None = None, count: int | None = None
) -> Tensor:
    """(1 / N) sum_b w_b (-sum_k p_bk log softmax(scores_b / temperature)_k) over the rows of all ranks, a scalar >= 0
    in float32 or wider.

    Args:
        target_BK: p, rows that are distributions (rows of another sum count by it).
        scores_BK: of the student.
        weight_B: w; None is 1. With iBOT a masked patch weighs 1 / masked patches of its image.
        count: what this rank adds to N; None is B. With iBOT it is the number of images.
    Returns: 0, with a gradient of 0, where there are no rows.
    """
    entropy_B = -(target_BK.detach() * (wide(scores_BK) / temperature).log_softmax(dim=1)).sum(dim=1)
    total = entropy_B.sum() if weight_B is None else (weight_B * entropy_B).sum()
    return mean_of(total, len(entropy_B) if count is None else count)


def cross_view_loss(targets_GBK: Tensor, scores_VBK: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy over all pairs of a view with targets and another view of the student (DINO eq. 3), and over
    the images of all ranks.

    The first G of the V views are those of the targets, so there are G (V - 1) pairs; without a pair the loss is 0.

    Args:
        targets_GBK: targets of G views.
        scores_VBK: scores of V >= G views; row b of all comes from image b.
    """
    targets, views = len(targets_GBK), len(scores_VBK)
    if views < 2:
        return 0 * wide(scores_VBK).sum()
    # Cross-entropy is linear in its target: a view is held to the sum of all targets but its own at once.
    summed_VBK = targets_GBK.sum(dim=0).expand(views - targets, -1, -1)
    others_VBK = torch.cat([targets_GBK.sum(dim=0) - targets_GBK, summed_VBK])
    pairs = targets * (views - 1)
    return prototype_cross_entropy(others_VBK.flatten(0, 1), scores_VBK.flatten(0, 1), temperature) * (views / pairs)


@torch.no_grad()
def identity_shares(label_B: Tensor) -> Tensor:
    """Of which images the target of each image is mixed, [B B] with rows that sum to 1 (CION, arXiv 2409.18569): an
    image whose identity has K images in the batch of this rank has 1 / (K (K - 1) + 1) of its own target, and
    K / (K (K - 1) + 1) of that of each other one. With targets that are so mixed `cross_view_loss` is CION's loss.

    Theirs is over groups of equal K: the sum over the ordered pairs of places in a group, each the mean over
    identities, and the mean over images of their own targets, divided by K (K - 1) + 1. In this form every image counts
    alike, whatever its group. Where all are alone it is the identity, and the loss DINO's.

    Args:
        label_B: below 0 for somebody unknown, who is alone.
    """
    alone = torch.eye(len(label_B), dtype=torch.bool, device=label_B.device)
    same_BB = ((label_B[:, None] == label_B) & (label_B >= 0)) | alone
    size_B1 = same_BB.sum(dim=1, keepdim=True)
    weight_BB = torch.where(alone, 1, size_B1) * same_BB
    return weight_BB / (size_B1 * (size_B1 - 1) + 1)


@torch.no_grad()
def mixed_targets(targets_GBK: Tensor, label_B: Tensor) -> Tensor:
    """Targets by `identity_shares` of the given ones, [G B K] in float32 or wider, also under autocast."""
    targets_GBK = wide(targets_GBK)
    with torch.autocast(targets_GBK.device.type, enabled=False):
        return identity_shares(label_B).to(targets_GBK) @ targets_GBK


def class_and_patch_losses(
    targets: Sequence[tuple[Tensor, Tensor]],
    scores: Sequence[tuple[Tensor, Tensor]],
    temperature: float,
    weight_N: Tensor,
    images: int,
) -> tuple[Tensor, Tensor]:
    """Self-distillation of class tokens and of masked patches (iBOT eq. 2 and 3), of each head: two losses [H].

    Class tokens are held to those of other views, patches to those of the same view at the same place.

    Args:
        targets: of each head those of class tokens [G B K] and of masked patches [N K].
        scores: of the student, [V B K] and [N K], as `cross_view_loss` and `prototype_cross_entropy` take them.
        weight_N: of the patches.
        images: how many of this rank the patches are of, all views counted.
    """
    pairs = [*zip(targets, scores, strict=True)]
    of_class = [cross_view_loss(target[0], score[0], temperature) for target, score in pairs]
    of_patches = [
        prototype_cross_entropy(target[1], score[1], temperature, weight_N, images) for target, score in pairs
    ]
    return torch.stack(of_class), torch.stack(of_patches)
