"""Which rows of two encoders belong together, read off a score of every pair: by one assignment, or row by row.

Rows of one group are the same thing, such as objects that share a caption: any of them is right.
Shapes: Q queries, G rows of a gallery, M of each in an assignment.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lightspan.evaluation.rows import unit_rows

STEP = 2.0**-20
"""Cosines are compared in multiples of it: equal rows differ by rounding, and must not be told apart by it."""


def cosines(x_QD: Tensor, y_GD: Tensor) -> Tensor:
    """[Q G], rounded to multiples of `STEP`; 0 of a row of zeros."""
    return (unit_rows(x_QD) @ unit_rows(y_GD).T / STEP).round() * STEP


def assigned(scores_MM: Tensor) -> Tensor:
    """For each row the column that it gets, int64 [M], each once, so that the sum of scores is the largest (Kuhn,
    1955). Time grows with M^3.
    """
    return torch.as_tensor(linear_sum_assignment(scores_MM.cpu().numpy(), maximize=True)[1], dtype=torch.int64)


def matching_accuracy(scores_MM: Tensor, group_M: Tensor) -> float:
    """Share of rows that the best assignment gives a column of their group, in [0, 1]. Row and column i are a pair.

    Knowing that each column is taken once makes it higher than the share of rows whose best column is right. Among
    equal scores, columns are taken in another order than rows, so that scores without a difference find nothing by it.
    """
    if not len(scores_MM):
        return 0.0
    backwards = torch.arange(len(scores_MM) - 1, -1, -1)
    column_M = backwards[assigned(scores_MM[:, backwards])]
    return float((group_M[column_M] == group_M).double().mean())


def ranks(scores_QG: Tensor, group_Q: Tensor, group_G: Tensor) -> Tensor:
    """The place of each query's group among all groups of the gallery, int64 [Q] from 1.

    A group has the score of its best row. Of equal scores, those of other groups come first, so that scores that are
    all alike find nothing. A group that the gallery does not have comes behind all others.
    """
    own, place = torch.cat([group_G, group_Q]).unique(return_inverse=True)
    at_G, at_Q = place[: len(group_G)], place[len(group_G) :]
    best_QC = scores_QG.new_full((len(scores_QG), len(own)), -torch.inf)
    best_QC.scatter_reduce_(1, at_G.expand(len(scores_QG), -1), scores_QG, "amax")
    return (best_QC >= best_QC.gather(1, at_Q[:, None])).sum(dim=1)


def numbered_rows(x_ND: Tensor) -> Tensor:
    """Groups of equal rows, int64 [N] from 0."""
    return x_ND.unique(dim=0, return_inverse=True)[1] if x_ND.shape[1] else torch.zeros(len(x_ND), dtype=torch.int64)
