"""How much of a batch its strongest directions hold, as a term that training may raise or lower.

Shapes: B rows of this rank, N of all ranks, D features, S singular values.
"""

import torch
from torch import Tensor

from lightspan.core.devices import wide
from lightspan.core.distributed import gather_rows


def leading_singular_share(z_BD: Tensor, leading: int = 5) -> Tensor:
    """Mean of the largest `leading` singular values of the rows of all ranks, as shares of the sum of all: a scalar in
    [0, 1], in float32 or wider; 0, with gradient 0, for zeros or without rows; NaN for rows that are not finite. Fewer
    values than `leading` are all taken.

    Source: the term of NMTune, arXiv 2309.17002; rows are not centred, as in its code. Singular values are the roots of
    the eigenvalues of the smaller Gram matrix, Z Z' or Z' Z, whose gradient with respect to an eigenvalue needs one
    eigenvector and no difference of two: where values coincide it stays bounded, unlike that of the vectors of an SVD.
    What a Gram cannot tell from zero counts as zero. It does not change when z is rotated or scaled.

    Args:
        leading: at least 1.
    """
    with torch.autocast(z_BD.device.type, enabled=False):
        z_ND, _ = gather_rows(wide(z_BD))
        largest = z_ND.detach().abs().amax() if z_ND.numel() else z_ND.new_zeros(())
        z_ND = z_ND / largest.where(largest > 0, 1)  # of which squares neither vanish nor overflow
        few_rows = z_ND.shape[0] <= z_ND.shape[1]
        gram_SS = z_ND @ z_ND.T if few_rows else z_ND.T @ z_ND
        sound = gram_SS.isfinite().all()  # LAPACK raises on NaN, where a scaler of gradients would skip the step
        energy_S = torch.linalg.eigvalsh(gram_SS.where(sound, 0)).flip(0)
        if not len(energy_S):
            return z_ND.sum()
        least = max(z_ND.shape) * torch.finfo(energy_S.dtype).eps * energy_S.detach()[0].clamp_min(0)
        there_S = energy_S.detach() > least
        value_S = energy_S.where(there_S, 1).sqrt().where(there_S, 0)
        total = value_S.sum()
        return (value_S[:leading].mean() / total.where(total > 0, 1)).where(sound, torch.nan)
