"""The spectral contrastive loss: views of one image are alike, and embeddings of all images spread over all directions.

Source: HaoChen, Wei, Gaidon, Ma, "Provable Guarantees for Self-Supervised Deep Learning with Spectral Contrastive
Loss", NeurIPS 2021, arXiv 2106.04156, eq. 6. For N pairs it factorises a matrix: N + L = |I - Z1 Z2' / N|^2, and pairs
that occur several times give that of the graph of augmentations.
Shapes: B rows of this rank, N rows of all ranks, D embedding width.
"""

import torch
from torch import Tensor

from lightspan.core.devices import wide
from lightspan.core.distributed import all_reduce_sums


def spectral_contrastive(z1_BD: Tensor, z2_BD: Tensor) -> Tensor:
    """-2 mean_n z1_n . z2_n + mean_{n, m} (z1_n . z2_m)^2 over the rows of all ranks, a scalar; 0 without rows.

    The second mean is over all pairs, a row with its own other view among them, as x and x' are independent in the
    paper; its authors' code leaves these out. It is the product of the two second moments, so that memory is D^2 and
    not N^2, and rows of other ranks need not come here.

    Args:
        z1_BD, z2_BD: row i of both comes from image i; not normalised. Half precision is widened to float32, also under
            autocast. Ranks may differ in B.
    Returns: scalar >= -N, the same on all ranks.
    """
    with torch.autocast(z1_BD.device.type, enabled=False):
        z1_BD, z2_BD = wide(z1_BD), wide(z2_BD)
        rows = z1_BD.new_full((), len(z1_BD))
        alike, first_DD, second_DD, rows = all_reduce_sums(
            (z1_BD * z2_BD).sum(), z1_BD.T @ z1_BD, z2_BD.T @ z2_BD, rows
        )
        rows = rows.detach().clamp_min(1)
        return -2 * alike / rows + (first_DD * second_DD).sum() / rows**2
