"""Features of points from the differences to their neighbours.

Source: Wang et al., "Dynamic Graph CNN for Learning on Point Clouds" (DGCNN), 2018, arXiv 1801.07829, section 3.1; with
the sizes and the norm of P2P, 2022, arXiv 2208.02812.
Shapes: N points of all clouds, B clouds, K neighbours, C channels, G groups of channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.core.ragged import padded, ragged_means, row_owners
from lightspan.core.ranges import require_in
from lightspan.nn.points.groups import nearest_points


class RaggedGroupNorm(nn.Module):
    """GroupNorm whose samples are clouds of any numbers of points [N ... C]: means and variances are those of a group
    of channels over all that a cloud has.
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x_NKC: Tensor, offsets: Tensor) -> Tensor:
        x_NKGc = wide(x_NKC).unflatten(-1, (self.groups, -1))
        owner_N, inside = row_owners(offsets, len(x_NKC)), (*range(1, x_NKC.ndim - 1), -1)
        shape = (-1, *(1 for _ in range(1, x_NKC.ndim - 1)), self.groups, 1)
        apart_NKGc = x_NKGc - ragged_means(x_NKGc.mean(inside), offsets)[owner_N].view(shape)
        variance_BG = ragged_means(apart_NKGc.square().mean(inside), offsets)
        unit_NKC = (apart_NKGc * (variance_BG + self.eps).rsqrt()[owner_N].view(shape)).flatten(-2)
        return (unit_NKC * self.weight + self.bias).to(x_NKC.dtype)


class EdgeEncoder(nn.Module):
    """Packed points [N 3] and the offsets [B+1] that cut them -> features of the points [N out_features].

    f = Linear(p); of the K points j that are nearest to a point i, itself among them, the edge is
    LeakyReLU(GroupNorm(Linear([f_j - f_i, f_i]))), and the feature Linear(max over j).

    Args:
        out_features: C, a multiple of `groups`.
        width: of f.
        neighbours: K; a cloud of fewer points has some more than once.
        groups: of channels in the norm.
    Raises: UserError for sizes that do not fit.
    """

    def __init__(self, out_features: int = 64, width: int = 8, neighbours: int = 32, groups: int = 4) -> None:
        super().__init__()
        require_in("[1, inf)", out_features=out_features, width=width, neighbours=neighbours, groups=groups)
        if out_features % groups:
            raise UserError(f"out_features={out_features} must be a multiple of groups={groups}")
        self.out_features, self.neighbours = out_features, neighbours
        self.lift = nn.Linear(3, width)
        self.edge = nn.Linear(2 * width, out_features, bias=False)
        self.norm = RaggedGroupNorm(groups, out_features)
        self.last = nn.Linear(out_features, out_features)

    def forward(self, xyz_N3: Tensor, offsets: Tensor) -> Tensor:
        near_NK = self.nearest(xyz_N3, offsets)
        f_Nw = self.lift(xyz_N3.to(self.lift.weight.dtype))
        # A linear layer of the edge, taken apart: what is of the neighbour is computed once for each point.
        to_Cw, own_Cw = self.edge.weight.chunk(2, dim=1)
        theirs_NKC = F.linear(f_Nw, to_Cw).index_select(0, near_NK.flatten()).unflatten(0, near_NK.shape)
        edges_NKC = theirs_NKC + F.linear(f_Nw, own_Cw - to_Cw)[:, None]
        return self.last(F.leaky_relu(self.norm(edges_NKC, offsets), 0.2).amax(dim=1))

    def nearest(self, xyz_N3: Tensor, offsets: Tensor) -> Tensor:
        """Rows of the points nearest to each, of its own cloud, int64 [N K]."""
        xyz_BM3, real_BM = padded(xyz_N3.detach(), offsets)
        owner_N = row_owners(offsets, len(xyz_N3))
        place_N = torch.arange(len(xyz_N3), device=xyz_N3.device) - offsets[owner_N]
        near_BMK = nearest_points(xyz_BM3, xyz_BM3, real_BM, self.neighbours)
        return near_BMK[owner_N, place_N] + offsets[owner_N, None]
