"""Queries and their documents: losses that rank them, and how far a small encoder is from a large one.

Source: Reimers and Gurevych, "Sentence-BERT", 2019, arXiv 1908.10084, and the library of these authors
(MultipleNegativesRanking, after Henderson et al., 2017, arXiv 1705.00652; CoSENT, Su, 2022); Karpukhin et al., "DPR",
2020, arXiv 2004.04906, section 3.2 (documents of all queries, and of all ranks); Zhuang et al., "Starbucks", 2024,
arXiv 2410.13230, section 3.1 (the divergences).
Shapes: B queries of this rank, P documents of each, of which the first answers it, N documents of all ranks, D width.
Half precision is widened to float32, also under autocast.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.devices import wide
from lightspan.core.distributed import gather_rows
from lightspan.core.ranges import require_temperatures
from lightspan.objectives.info_nce import gated_cosine, own_rows, soft_info_nce, unit
from lightspan.objectives.means import mean, sum_over_rows


def pair_scores(query_BD: Tensor, document_BPD: Tensor, cosine: bool) -> tuple[Tensor, Tensor]:
    """(score of each query with each document of all ranks [B N], which of these is its own first: bool [B N])."""
    count = document_BPD.shape[1]
    key_ND, first = gather_rows(document_BPD.flatten(0, 1))
    own_BN = own_rows(len(query_BD) * count, first, key_ND)[::count]
    if cosine:
        return gated_cosine(query_BD, key_ND), own_BN
    with torch.autocast(query_BD.device.type, enabled=False):
        return wide(query_BD) @ wide(key_ND).T, own_BN


def document_ranking_loss(
    query_BD: Tensor, document_BPD: Tensor, temperature: float = 0.05, cosine: bool = True
) -> Tensor:
    """Mean over the queries of all ranks of the cross-entropy in nats of their own first document among the documents
    of all queries.

    Args:
        temperature: > 0; scores are divided by it.
        cosine: scores are cosines, else dot products.
    Returns: scalar >= 0, the same on all ranks.
    Raises: UserError for another temperature.
    """
    require_temperatures(temperature=temperature)
    scores_BN, own_BN = pair_scores(query_BD, document_BPD, cosine)
    return soft_info_nce(scores_BN / temperature, own_BN)


def cosent_loss(query_BD: Tensor, document_BD: Tensor, score_B: Tensor, temperature: float = 0.05) -> Tensor:
    """log(1 + sum over (i, j) with s_i > s_j of exp((cos_j - cos_i) / temperature)), over the pairs of all ranks: pairs
    that are more alike are to have the larger cosine.

    Args:
        score_B: s, how alike each pair is, in any unit.
    Returns: scalar >= 0, the same on all ranks; 0 if all scores are equal.
    Raises: UserError for a temperature of 0 or less or infinity.
    """
    require_temperatures(temperature=temperature)
    with torch.autocast(query_BD.device.type, enabled=False):
        cosine_N = gather_rows((unit(query_BD) * unit(document_BD)).sum(dim=1))[0] / temperature
    score_N = gather_rows(score_B)[0]
    apart_NN = cosine_N[None, :] - cosine_N[:, None]
    wrong = apart_NN.masked_fill(~(score_N[:, None] > score_N[None, :]), torch.finfo(apart_NN.dtype).min)
    return torch.cat([wrong.new_zeros(1), wrong.flatten()]).logsumexp(dim=0)


def score_divergence(student_BN: Tensor, teacher_BN: Tensor) -> Tensor:
    """Mean over the queries of all ranks of KL(softmax(teacher) || softmax(student)) over the documents, in nats, >= 0.
    The teacher has no gradient.
    """
    student_BN, teacher_BN = wide(student_BN).log_softmax(dim=1), wide(teacher_BN.detach()).log_softmax(dim=1)
    divergence_B = F.kl_div(student_BN, teacher_BN, reduction="none", log_target=True).sum(dim=1)
    total, rows = sum_over_rows(divergence_B.sum(), len(divergence_B))
    return total / rows.clamp_min(1)


def coordinate_divergence(student_RD: Tensor, teacher_RD: Tensor) -> Tensor:
    """Mean over the rows of all ranks of KL(softmax(teacher) || softmax(student)) over the coordinates, in nats, >= 0;
    0 without rows. The teacher has no gradient.
    """
    student_RD, teacher_RD = wide(student_RD).log_softmax(dim=1), wide(teacher_RD.detach()).log_softmax(dim=1)
    return mean(F.kl_div(student_RD, teacher_RD, reduction="none", log_target=True).sum(dim=1))
