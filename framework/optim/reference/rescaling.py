"""What Fira and APOLLO share: scales by row, and the norm-growth limiter.

Shapes: M rows, N columns, R rank.
"""

import math

import torch
from torch import Tensor

from lightspan.optim.reference.loop import State


def row_scale(above: Tensor, below: Tensor, outside: Tensor, frame: Tensor, bound: float | None) -> Tensor:
    """|n| / (|r| + 1e-8): what Adam does to the length of a row's coordinates (Fira, arXiv 2410.01623, equation 11;
    APOLLO, arXiv 2412.05270, equation 5). The epsilon is that of Fira's algorithm 1 and of both papers' code; APOLLO's
    equations have none.

    Args:
        above, below, outside: norms of n, of r and of what is rescaled, by row [M] or [M 1], or of whole matrices, 0-d.
        frame: [N R], for its shape.
        bound: not in the papers: what is rescaled becomes no longer than bound sqrt(N / R) |n|, `bound` times what an
            isotropic gradient would make of it. None is as published.
    """
    scale = above / (below + 1e-8)
    if bound is None:
        return scale
    longest = bound * math.sqrt(frame.shape[0] / frame.shape[1]) * above
    return torch.where(scale * outside > longest, longest / outside, scale)


def limited(update: Tensor, state: State, gamma: float | None) -> Tensor:
    """The norm-growth limiter (Fira, arXiv 2410.01623, equation 12; APOLLO, arXiv 2412.05270, equation 4): at most
    gamma times as long as the last update that was not zero, itself limited, whose norm `state` keeps. None does not
    limit, nor does the first.

    The papers' code also counts steps without an update, and limits the one after such a step to a length of 1e-8.
    """
    own, before = update.norm().item(), state.get("norm", 0.0)
    if gamma is None or own == 0 or before == 0 or own <= gamma * before:
        state["norm"] = own or before
        return update
    state["norm"] = gamma * before
    return update / own * gamma * before
