"""SIGReg: embeddings are pushed to an isotropic Gaussian, one random direction at a time.

Source: Balestriero, LeCun, "LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics", 2025, arXiv
2511.08544, section 4 and algorithm 1, and the authors' package; the test is that of Epps and Pulley (1983). Algorithm 1
integrates over [-5, 5] with 17 points, the package over [-3, 3], which is the default here, with 17 points on the half
of it that symmetry leaves. The package draws directions on the device; here the processor draws them, so that every
device and every rank has the same ones.
Shapes: V sets of B rows of this rank, D embedding width, M directions, T points of the integral. Half precision is
widened to float32, also under autocast.
"""

import torch
from torch import Tensor

from lightspan.core.devices import wide
from lightspan.core.ranges import require_in
from lightspan.objectives.means import sum_over_rows

SEED_STRIDE = 1_000_003
"""Apart in seeds: runs whose seeds differ by less than a million share no directions for as many steps."""


def random_directions(width: int, count: int, seed: int, step: int) -> Tensor:
    """Unit columns [D M] in float32, a function of (seed, step): uniform on the sphere."""
    generator = torch.Generator().manual_seed(seed * SEED_STRIDE + step)
    direction_DM = torch.randn(width, count, generator=generator)
    return direction_DM / direction_DM.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny)


def epps_pulley(x_VBM: Tensor, reach: float = 3.0, points: int = 17) -> Tensor:
    """N int |phi_N(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt over [-reach, reach] by the trapezoidal rule, [V M].

    phi_N is the empirical characteristic function of the N rows of all ranks; the integrand is even, so half of it is
    computed. Samples of a standard normal give about the same number whatever N; others grow with N. Without a row on
    any rank it is 0.
    """
    x_VBM = wide(x_VBM)
    t_T = torch.linspace(0, reach, points, dtype=x_VBM.dtype, device=x_VBM.device)
    gauss_T = (-0.5 * t_T.square()).exp()
    angle_VBMT = x_VBM[..., None] * t_T
    sums_2VMT, rows = sum_over_rows(
        torch.stack([angle_VBMT.cos().sum(dim=1), angle_VBMT.sin().sum(dim=1)]), x_VBM.shape[1]
    )
    real_VMT, imaginary_VMT = sums_2VMT / rows.clamp_min(1)
    error_VMT = ((real_VMT - gauss_T).square() + imaginary_VMT.square()) * gauss_T
    return 2 * rows * torch.trapezoid(error_VMT, t_T, dim=-1)


def sigreg(
    z_VBD: Tensor,
    seed: int,
    step: int,
    directions: int = 1024,
    reach: float = 3.0,
    points: int = 17,
) -> Tensor:
    """Mean over V sets of rows, such as views, and over random directions a of the test of a^T z (algorithm 1).

    Args:
        z_VBD: embeddings as they are: their scale is what the test sees.
        seed, step: from which all ranks draw the same directions, other ones in each step.
        directions: M, at least 1.
        reach: largest |t|, above 0.
        points: of the integral over [0, reach], at least 2.
    Returns: scalar >= 0, the same on all ranks.
    Raises: UserError for numbers out of range.
    """
    require_in("[1, inf)", directions=directions)
    require_in("(0, inf)", reach=reach)
    require_in("[2, inf)", points=points)
    with torch.autocast(z_VBD.device.type, enabled=False):
        z_VBD = wide(z_VBD)
        direction_DM = random_directions(z_VBD.shape[2], directions, seed, step).to(z_VBD)
        return epps_pulley(z_VBD @ direction_DM, reach, points).mean()
