"""Stochastic depth: training drops residual branches of single samples, and scales those it keeps.

Source: Huang et al., "Deep Networks with Stochastic Depth", 2016, arXiv 1603.09382.
"""

from timm.layers import DropPath
from torch import nn

from lightspan.core.errors import UserError

Rates = float | tuple[float, float]
"""Share of dropped branches in the last block, rising evenly from 0 in the first; or in the first and in the last."""


def drop_paths(rates: Rates, depth: int, of: str) -> list[nn.Module]:
    """A module for each of `depth` blocks, through which its branches go.

    Args:
        of: the class whose setting `drop_path` this is, for the message.
    Raises: UserError for shares outside [0, 1).
    """
    first, last = rates if isinstance(rates, tuple | list) else (0.0, rates)
    if not (0 <= first < 1 and 0 <= last < 1):
        raise UserError(f"{of} drop_path={rates} is a share of branches, or the first and last, and must lie in [0, 1)")
    shares = [first + (last - first) * block / max(depth - 1, 1) for block in range(depth)]
    return [DropPath(share) if share else nn.Identity() for share in shares]
