"""Attention in windows of voxels with a contextual encoding of how two of them differ: in place, colour, normal.

Source: Yang et al., "Swin3D: A Pretrained Transformer Backbone for 3D Indoor Scene Understanding", 2023, arXiv
2304.06906, section 3. Of a head with queries q, keys k and values v of d numbers each, over the voxels j of i's window:

    e_ij = d^-1/2 q_i . k_j + d^-1/2 q_i . tQ_ij + k_j . tK_ij,    a_ij = softmax over j of e_ij,
    o_i = sum_j a_ij (v_j + tV_ij).

Each t is a sum, over the axes of all signals, of rows of tables: row floor(Q (s_i - s_j) + L), in [0, 2L - 1], of an
axis s. The key's term is not divided by the root of d, as in the authors' code.
A row of the tables times a query, or the share of attention that falls to it, is found for all rows at once, so that
pairs add single numbers. Windows are taken some at a time, and what belongs to pairs is made again for gradients:
memory grows with the voxels.
Shapes: V voxels, P pairs, h heads of d numbers, R = 2L rows of a table.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightspan.core.devices import wide_type
from lightspan.nn.voxels.windows import VoxelWindows, pairs_of, parts

MOST_NUMBERS = 2**25
"""That pairs hold at once in one place, of all heads: 128 MB."""


class ContextAxis(NamedTuple):
    """One axis of a signal.

    Attributes:
        signal_V: float.
        steps: Q, rows of the tables for a difference of 1.
        query_Rhd, key_Rhd, value_Rhd: the tables; their middle, L, is a difference of 0.
    """

    signal_V: Tensor
    steps: float
    query_Rhd: Tensor
    key_Rhd: Tensor
    value_Rhd: Tensor


def table_rows(signal_V: Tensor, own_P: Tensor, other_P: Tensor, steps: float, rows: int) -> Tensor:
    """Of each pair the row that stands for its difference, int64 [P] in [0, rows). What is further apart than tables
    reach has their last row or first; NaN has the middle one.
    """
    apart_P = (signal_V[own_P] - signal_V[other_P]) * steps + rows // 2
    return apart_P.nan_to_num(rows // 2).clamp(0, rows - 1).long()


def segment_softmax(x_hP: Tensor, owner_P: Tensor, owners: int) -> Tensor:
    """The softmax over the columns that have the same owner, in each row: [h P].

    Args:
        owner_P: int64, in [0, owners).
    """
    at_hP = owner_P.expand_as(x_hP)
    most = x_hP.detach().new_zeros(len(x_hP), owners)
    most = most.scatter_reduce(1, at_hP, x_hP.detach(), "amax", include_self=False)
    above_hP = (x_hP - most.index_select(1, owner_P)).exp()
    return above_hP / torch.zeros_like(most).scatter_add(1, at_hP, above_hP).index_select(1, owner_P)


def pair_attention(
    q_Vhd: Tensor, k_Vhd: Tensor, v_Vhd: Tensor, axes: Sequence[ContextAxis], own_P: Tensor, other_P: Tensor
) -> Tensor:
    """What each voxel gets of those that it is paired with, [V h d].

    Args:
        own_P, other_P: int64, i and j.
    """
    voxels, heads, _ = q_Vhd.shape
    q_Vhd = q_Vhd * q_Vhd.shape[2] ** -0.5
    logit_hP = (q_Vhd.index_select(0, own_P) * k_Vhd.index_select(0, other_P)).sum(dim=2).T
    rows = []
    for axis in axes:
        R = len(axis.query_Rhd)
        row_P = table_rows(axis.signal_V, own_P, other_P, axis.steps, R)
        for x_Vhd, table_Rhd, of_P in ((q_Vhd, axis.query_Rhd, own_P), (k_Vhd, axis.key_Rhd, other_P)):
            each_hVR = torch.einsum("vhd,rhd->hvr", x_Vhd, table_Rhd)
            logit_hP = logit_hP + each_hVR.flatten(1).index_select(1, of_P * R + row_P)
        rows.append(row_P)
    share_hP = segment_softmax(logit_hP, own_P, voxels)
    given_Phd = share_hP.T[..., None] * v_Vhd.index_select(0, other_P)
    out_Vhd = torch.zeros_like(v_Vhd).index_add(0, own_P, given_Phd)
    for axis, row_P in zip(axes, rows, strict=True):
        R = len(axis.value_Rhd)
        at_hP = (own_P * R + row_P).expand_as(share_hP)
        of_rows = share_hP.new_zeros(heads, voxels * R).scatter_add(1, at_hP, share_hP)
        out_Vhd = out_Vhd + torch.einsum("hvr,rhd->vhd", of_rows.unflatten(1, (voxels, R)), axis.value_Rhd)
    return out_Vhd


def context_attention(
    q_Vhd: Tensor,
    k_Vhd: Tensor,
    v_Vhd: Tensor,
    axes: Sequence[ContextAxis],
    windows: VoxelWindows,
    most_numbers: int = MOST_NUMBERS,
) -> Tensor:
    """`pair_attention` of each voxel with all of its window, [V h d] in float32 or wider.

    Args:
        most_numbers: that pairs hold at once, see `MOST_NUMBERS`; a single window may have more.
    """
    dtype = wide_type(q_Vhd.dtype, *(axis.query_Rhd.dtype for axis in axes))
    q_Vhd, k_Vhd, v_Vhd = q_Vhd.to(dtype), k_Vhd.to(dtype), v_Vhd.to(dtype)
    axes = [ContextAxis(a.signal_V, a.steps, *(table.to(dtype) for table in a[2:])) for a in axes]

    def part(row_v: Tensor, counts_W: Tensor, pairs: int) -> Tensor:
        own_P, other_P = pairs_of(counts_W, len(row_v), pairs)
        here = [axis._replace(signal_V=axis.signal_V[row_v]) for axis in axes]
        return pair_attention(q_Vhd[row_v], k_Vhd[row_v], v_Vhd[row_v], here, own_P, other_P)

    found = []
    with torch.autocast(q_Vhd.device.type, enabled=False):
        for each in parts(windows, max(most_numbers // max(q_Vhd[:1].numel(), 1), 1)):
            found.append(checkpoint(part, *each, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(found)[windows.row_V.argsort()]
