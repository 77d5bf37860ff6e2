"""Index sets that move: coordinates with the lowest scores are dropped, and as many of the others grow.

Sources: Evci et al., "Rigging the Lottery: Making All Tickets Winners" (RigL), 2020, arXiv 1911.11134, section 3; the
schedule of counts is its equation 1, and that of SSVI (arXiv 2402.11025).
"""

import math

import torch
from torch import Tensor

from lightspan.subspaces.masks.top_k import top_k


def count_to_drop(count: int, alpha: float, progress: float) -> int:
    """floor(|S| alpha / 2 (1 + cos(pi t / T_end))) of |S| = `count` open coordinates, at `progress` = t / T_end.

    The cosine goes from alpha of all at the start to none at the end.
    """
    return math.floor(count * alpha / 2 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))))


def drop_and_grow(open_S: Tensor, drop_scores_S: Tensor, grow_scores_S: Tensor, dropped: int, count: int) -> Tensor:
    """The next index set [S], bool, with exactly `count` coordinates.

    Of the open coordinates all but `dropped`, those with the lowest drop scores, stay. Then coordinates with the
    highest grow scores among all others open, one that was dropped just now among them: it is as if it had stayed, and
    a caller that asks `open_S & ~next` finds it in neither set. Fewer stay where `count` leaves less room.

    Args:
        open_S: bool.
        dropped: in [0, number of open ones].
        count: in [0, all].
    """
    stays = min(int(open_S.sum()) - dropped, count)
    kept_S = _best(open_S, drop_scores_S, stays)
    return kept_S | _best(~kept_S, grow_scores_S, count - stays)


def _best(among_S: Tensor, scores_S: Tensor, count: int) -> Tensor:
    """The `count` highest of the coordinates in `among_S`, whatever scores the others have."""
    chosen_S = torch.zeros_like(among_S)
    chosen_S[among_S] = top_k(scores_S[among_S], count)
    return chosen_S
