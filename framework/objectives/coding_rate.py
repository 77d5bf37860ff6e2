"""Coding rates: how many nats features take, all together, and cluster by cluster.

Source: Yu et al., "Learning Diverse and Discriminative Representations via the Principle of Maximal Coding Rate
Reduction" (MCR2), 2020, arXiv 2006.08558, eq. 7 and 8; Ding et al., "Unsupervised Manifold Linearizing and Clustering"
(MLC), 2023, arXiv 2301.01805; total coding rate of two views: Li et al., "Neural Manifold Clustering and Embedding"
(NMCE), 2022, arXiv 2201.10000. As in MLC, rates have no factor 1/2, which MCR2's have. e^2, here `distortion`, is the
squared error up to which features are coded; published code calls it eps.
Features are rows, meant to be of length 1. Sums run over all ranks, in float32 or wider, also under autocast.
Shapes: B rows of this rank, N rows of all ranks, D width, K clusters.
"""

import torch
from torch import Tensor

from lightspan.core.devices import wide
from lightspan.core.distributed import all_reduce_sum, all_reduce_sums, gather_rows
from lightspan.core.ranges import require_in
from lightspan.core.unit_length import unit_length
from lightspan.objectives.prototypes import column_potentials


def require_distortion(distortion: float) -> None:
    """Raises: UserError for anything but a finite number above 0."""
    require_in("(0, inf)", distortion=distortion)


def coding_rate(z_BD: Tensor, distortion: float) -> Tensor:
    """R = logdet(I + D / (N e^2) Z^T Z), a scalar >= 0 in nats, the same on all ranks; 0 without rows."""
    with torch.autocast(z_BD.device.type, enabled=False):
        z_BD = wide(z_BD)
        rows, gram_DD = all_reduce_sums(z_BD.new_tensor(float(len(z_BD))), z_BD.T @ z_BD)
        return _logdet(gram_DD / rows.clamp_min(1) * (z_BD.shape[1] / distortion))


def cluster_coding_rate(z_BD: Tensor, membership_BK: Tensor, distortion: float) -> Tensor:
    """R_c = sum_k (m_k / N) logdet(I + D / (m_k e^2) Z^T Diag(P_k) Z): what rows take if each cluster has its own code.

    P_k is column k of the memberships and m_k its sum (MCR2 eq. 8).

    Args:
        membership_BK: shares >= 0 of each row in each cluster, or one-hot labels.
    Returns: scalar >= 0, the same on all ranks; 0 without rows. A cluster without members counts nothing.
    """
    with torch.autocast(z_BD.device.type, enabled=False):
        z_BD, membership_BK = wide(z_BD), wide(membership_BK)
        rows, mass_K, gram_KDD = all_reduce_sums(
            z_BD.new_tensor(float(len(z_BD))), membership_BK.sum(dim=0), _weighted_grams(z_BD, membership_BK.T)
        )
        return _summed_rates(mass_K, gram_KDD, distortion) / rows.clamp_min(1)


def pairwise_coding_rate(z_BD: Tensor, membership_BN: Tensor, distortion: float) -> Tensor:
    """R_c where every row is the centre of a cluster of its own: `cluster_coding_rate` with K = N (MLC's
    second term).

    For a doubly stochastic membership m is 1; as in the authors' later code, each row counts by its mass, so that one
    from a few rounds of Sinkhorn will do. A rank computes the N D x D matrices of its own B clusters alone.

    Args:
        membership_BN: row j has the shares of all ranks' rows in the cluster around this rank's row j.
    """
    with torch.autocast(z_BD.device.type, enabled=False):
        z_ND, _ = gather_rows(wide(z_BD))
        membership_BN = wide(membership_BN)
        own = _summed_rates(membership_BN.sum(dim=1), _weighted_grams(z_ND, membership_BN), distortion)
        return all_reduce_sum(own) / max(len(z_ND), 1)


def pairwise_membership(c_BD: Tensor, temperature: float, iterations: int = 10) -> Tensor:
    """MLC's membership [B N]: the doubly stochastic matrix closest to the kernel C C^T with an entropy of weight
    `temperature`, rows of this rank by those of all ranks.

    Each row is a distribution; with many `iterations` each column too sums to 1, and the matrix is symmetric. As in
    the authors' later code, gradients pass the kernel and the last normalisation of rows, but not the potentials of
    columns.

    Args:
        c_BD: rows, scaled to length 1 here.
        temperature: > 0. Small ones leave every row alone with itself, large ones make all equal.
        iterations: rounds of `lightspan.objectives.prototypes.sinkhorn`.
    """
    with torch.autocast(c_BD.device.type, enabled=False):
        c_BD = unit_length(wide(c_BD))
        scores_BN = c_BD @ gather_rows(c_BD)[0].T / temperature
        return (scores_BN + column_potentials(scores_BN.detach(), iterations)).softmax(dim=1)


def total_coding_rate_loss(z1_BD: Tensor, z2_BD: Tensor, distortion: float, similarity: float) -> Tensor:
    """-R((Z1 + Z2) / 2) - `similarity` mean_n |z1_n . z2_n|: views of an image agree, images fill all dimensions.

    Rows are scaled to length 1 first. The similarity is a mean over rows (NMCE's code), where MLC writes a sum.
    """
    with torch.autocast(z1_BD.device.type, enabled=False):
        z1_BD, z2_BD = (unit_length(wide(z_BD)) for z_BD in (z1_BD, z2_BD))
        agreement, rows = all_reduce_sums((z1_BD * z2_BD).sum(dim=1).abs().sum(), z1_BD.new_tensor(float(len(z1_BD))))
        rate = coding_rate((z1_BD + z2_BD) / 2, distortion)
        return -rate - similarity * agreement / rows.clamp_min(1)


def _summed_rates(mass_K: Tensor, gram_KDD: Tensor, distortion: float) -> Tensor:
    """sum_k m_k logdet(I + D / (m_k e^2) gram_k)."""
    divisor_K = torch.where(mass_K > 0, mass_K, 1)
    return (mass_K * _logdet(gram_KDD / divisor_K[:, None, None] * (gram_KDD.shape[1] / distortion))).sum()


def _weighted_grams(z_ND: Tensor, weight_KN: Tensor) -> Tensor:
    """Z^T Diag(w_k) Z for each row of weights, [K D D]: one product, without a copy of Z for each."""
    width = z_ND.shape[1]
    outer_NDD = z_ND[:, :, None] * z_ND[:, None, :]
    return (weight_KN @ outer_NDD.flatten(1)).view(-1, width, width)


def _logdet(scatter_KDD: Tensor) -> Tensor:
    """logdet(I + S) of positive semidefinite matrices, by slogdet: a determinant overflows float32 at D of about 50."""
    identity_DD = torch.eye(scatter_KDD.shape[-1], dtype=scatter_KDD.dtype, device=scatter_KDD.device)
    return torch.linalg.slogdet(identity_DD + scatter_KDD).logabsdet
