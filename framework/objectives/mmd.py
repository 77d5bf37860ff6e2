"""How far apart two distributions are: the maximum mean discrepancy under several Gaussian kernels.

Source: Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, lemma 6 (unbiased) and equation 5 (biased); the sum of
kernels of several widths is that of Long et al., "DAN", 2015, arXiv 1502.02791, with widths in multiples of the mean
squared distance. Shapes: R and S rows of this rank, M and N of all ranks, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightspan.core.devices import wide
from lightspan.core.distributed import gather_rows
from lightspan.core.errors import UserError

WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)


def require_widths(widths: Sequence[float]) -> None:
    """Raises: UserError for no width, or one that is not above 0."""
    if not widths or not min(widths) > 0:
        raise UserError(f"widths={[*widths]} of kernels must name at least one, all above 0")


def mmd(x_RD: Tensor, y_SD: Tensor, widths: Sequence[float] = WIDTHS, unbiased: bool = True) -> Tensor:
    """mean k(x, x') + mean k(y, y') - 2 mean k(x, y), over the rows of all ranks, with k(a, b) the mean over widths w
    of exp(-|a - b|^2 / (w s)), s the mean squared distance between different rows of both sets, without a gradient.

    Args:
        widths: > 0, without unit.
        unbiased: no row is compared with itself; the result may then be below 0.
    Returns: scalar, the same on all ranks; 0, with gradient 0, where a set has too few rows: fewer than one, or than
        two if unbiased, and where all rows are alike.
    Raises: UserError for other widths.
    """
    require_widths(widths)
    with torch.autocast(x_RD.device.type, enabled=False):
        x_MD, y_ND = (gather_rows(wide(rows))[0] for rows in (x_RD, y_SD))
        count, all_ND = len(x_MD), torch.cat([x_MD, y_ND])
        if min(count, len(y_ND)) < 1 + unbiased:
            return all_ND.sum() * 0
        # Far from 0 the products below would round distances away. First from a row, which leaves exact zeros of rows
        # that are all alike, where a rounded mean would leave noise for the unit to blow up.
        all_ND = all_ND - all_ND[0].detach()
        all_ND = all_ND - all_ND.detach().mean(dim=0)
        norm_N = all_ND.square().sum(dim=1)
        squared_NN = (norm_N[:, None] + norm_N - 2 * all_ND @ all_ND.T).clamp_min(0)
        # Rounding leaves a distance of a row to itself.
        squared_NN = squared_NN.masked_fill(torch.eye(len(all_ND), dtype=torch.bool, device=all_ND.device), 0)
        unit = squared_NN.detach().sum() / max(1, len(all_ND) * (len(all_ND) - 1))
        unit = unit.clamp_min(torch.finfo(unit.dtype).tiny)
        kernel_NN = torch.stack([(-squared_NN / (width * unit)).exp() for width in widths]).mean(dim=0)
        within = [_mean(part, unbiased) for part in (kernel_NN[:count, :count], kernel_NN[count:, count:])]
        return within[0] + within[1] - 2 * kernel_NN[:count, count:].mean()


def _mean(kernel_NN: Tensor, unbiased: bool) -> Tensor:
    rows = len(kernel_NN)
    return (kernel_NN.sum() - kernel_NN.trace()) / (rows * (rows - 1)) if unbiased else kernel_NN.mean()
