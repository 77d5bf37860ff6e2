"""Supervised contrast: rows of one class are positives of one another.

Source: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, arXiv 2004.11362, L_out of equation 2. The
authors' code also multiplies by the temperature over 0.07, which is left out here, as in the paper.
Shapes: B anchors of this rank, N rows of all ranks, D embedding width.
"""

from torch import Tensor

from lightspan.core.distributed import gather_rows
from lightspan.core.ranges import require_temperatures
from lightspan.objectives.info_nce import gated_cosine, own_rows, soft_info_nce


def supcon(z_BD: Tensor, label_B: Tensor, temperature: float | Tensor = 0.1) -> Tensor:
    """Mean over anchors i of -1 / |P(i)| sum_p log(exp(z_i z_p / T) / sum_a exp(z_i z_a / T)), where a runs over all
    rows but i itself, and p over those of them that have i's class, P(i).

    Rows are those of all ranks, with gradients. An anchor without a positive is left out of the mean, where the paper's
    sum has 0 / 0, but stands in the denominators of others; without any positive the loss is 0.

    Args:
        z_BD: embeddings, not normalised; ranks may differ in B. Half precision is widened to float32, also under
            autocast.
        label_B: int64.
        temperature: T > 0; a tensor may be trained.
    Returns: scalar >= 0, the same on all ranks.
    Raises: UserError for a temperature of 0 or less or infinity, if it is no tensor.
    """
    require_temperatures(temperature=temperature)
    key_ND, first = gather_rows(z_BD)
    label_N, _ = gather_rows(label_B)
    logits_BN = gated_cosine(z_BD, key_ND) / temperature
    own_BN = own_rows(len(z_BD), first, key_ND)
    positive_BN = (label_N == label_B[:, None]) & ~own_BN
    target_BN = positive_BN.to(logits_BN.dtype) / positive_BN.sum(dim=1, keepdim=True).clamp_min(1)
    return soft_info_nce(logits_BN, target_BN, ~own_BN)
