"""Subspaces as points of a manifold: tangent directions, geodesics, and retractions of their orthonormal frames.

A point of the Grassmann manifold is the span of a frame S with S^T S = I; S R, with an orthogonal R, is the same point.
Steps are horizontal: orthogonal to the span, so that a frame turns towards other directions and not within its own.
Source: Edelman, Arias, Smith, "The Geometry of Algorithms with Orthogonality Constraints", 1998, sections 2.4 and 2.5;
Absil, Mahony, Sepulchre, "Optimization Algorithms on Matrix Manifolds", 2008 (retraction by QR, transport by
projection). All functions compute in float32 or wider and return the dtype of the frame.
Shapes: B frames, N ambient width, R dimension of the subspace, R <= N.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightspan.core.devices import wide, widest_float


@dataclass(frozen=True)
class Horizontal:
    """The `SubspaceMap` onto horizontal directions at frames: push(z) = z - S S^T z, an orthogonal projection, which is
    its own adjoint. It turns a Euclidean gradient into the Riemannian one, and transports a direction from another
    frame to this one.
    """

    frame_BNR: Tensor

    def push(self, z_BNR: Tensor) -> Tensor:
        return z_BNR - self.frame_BNR @ (self.frame_BNR.mT @ z_BNR)

    def pull(self, g_BNR: Tensor) -> Tensor:
        return self.push(g_BNR)


def geodesic(frame_BNR: Tensor, direction_BNR: Tensor, length: float | Tensor = 1.0) -> Tensor:
    """The frame after going `length` along the geodesic in a horizontal direction H (Edelman et al., theorem 2.3).

    With the thin SVD H = U s V^T it is S V cos(length s) V^T + U sin(length s) V^T: the span turns by the angles
    length s. Both terms are smooth functions of H^T H, whose eigenvectors give them without U: a direction of zero, or
    one of deficient rank, is an ordinary case.
    """
    frame, direction = wide(frame_BNR), wide(direction_BNR)
    exact = widest_float(frame.device)
    half = direction.to(exact)
    # Scaled, so that squares of small directions do not vanish.
    scale_B11 = half.abs().amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(exact).tiny)
    energy_BR, v_BRR = torch.linalg.eigh((half / scale_B11).mT @ (half / scale_B11))
    angle_BR = energy_BR.clamp_min(0).sqrt() * scale_B11[:, :, 0] * length
    cosine_BRR, sine_BRR = (
        ((v_BRR * function_BR[:, None]) @ v_BRR.mT).to(frame.dtype)
        for function_BR in (angle_BR.cos(), length * (angle_BR / torch.pi).sinc())
    )
    return (frame @ cosine_BRR + direction @ sine_BRR).to(frame_BNR.dtype)


def orthonormalised(frame_BNR: Tensor) -> Tensor:
    """The Q of a QR decomposition whose R has a diagonal above 0: the frame itself if it is orthonormal.

    Without the signs LAPACK may turn columns round, and with them the momentum that belongs to them.
    """
    q_BNR, r_BRR = torch.linalg.qr(wide(frame_BNR))
    sign_BR = torch.where(r_BRR.diagonal(dim1=-2, dim2=-1) < 0, -1, 1).to(q_BNR.dtype)
    return (q_BNR * sign_BR[:, None]).to(frame_BNR.dtype)


def principal_angles(one_BNR: Tensor, other_BNR: Tensor) -> Tensor:
    """Angles between two spans, [B R] in [0, pi/2], ascending; orthonormal frames.

    By sines where cosines are near 1 and lose half of the digits (Björck, Golub 1973).
    """
    one, other = wide(one_BNR), wide(other_BNR)
    cosine_BR = torch.linalg.svdvals(one.mT @ other).clamp(0, 1)
    sine_BR = torch.linalg.svdvals(Horizontal(one).push(other)).clamp(0, 1).flip(-1)
    return torch.where(cosine_BR.square() < 0.5, cosine_BR.acos(), sine_BR.asin())
