"""Mixtures over groups: drawn around a prior, on a grid, with a limit on how often a group is repeated.

Shapes: M mixtures, G groups.
"""

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in

GRID = 5_000
"""Shares are multiples of 1 / GRID: what is below the 2e-4 of the paper's code is 0."""
STRENGTHS = np.geomspace(0.1, 5, 15)
ATTEMPTS = 50


def stepped(share_MG: np.ndarray) -> np.ndarray:
    """Shares in whole steps of the grid, int64 [M G] with rows that add up to GRID: rounded down, and the steps that
    are left go to the largest remainders.

    Args:
        share_MG: at least 0, rows with a sum above 0.
    """
    exact_MG = GRID * share_MG / share_MG.sum(axis=1, keepdims=True)
    steps_MG = np.floor(exact_MG).astype(np.int64)
    left_M1 = GRID - steps_MG.sum(axis=1, keepdims=True)
    rank_MG = np.argsort(np.argsort(steps_MG - exact_MG, axis=1, kind="stable"), axis=1, kind="stable")
    return steps_MG + (rank_MG < left_M1)


def caps(prior_G: np.ndarray, repeats: float) -> np.ndarray:
    """The most steps of each group, int64 [G]: its prior times `repeats`, at most all of them."""
    return np.minimum(GRID, np.floor(GRID * repeats * prior_G)).astype(np.int64)


def drawn_mixtures(
    prior_G: np.ndarray, count: int, repeats: float, temper: float, generator: np.random.Generator
) -> np.ndarray:
    """Different mixtures around a prior, as steps of the grid, int64 [M G].

        w ~ Dirichlet(s prior^temper / sum),   s one of 15 strengths in [0.1, 5], evenly spaced by logarithm

    Draws in which a group has more than `repeats` times its prior are drawn again. At most `count`: on a grid of few
    groups there may be fewer.

    Args:
        prior_G: above 0, with a sum of 1.
        count: at least 1.
        repeats: above 1.
        temper: in [0, 1]; 0 draws around equal shares, 1 around the prior.
    Raises: UserError if nothing that is drawn keeps the limit.
    """
    require_in("[1, inf)", count=count)
    require_in("(1, inf)", repeats=repeats)
    require_in("[0, 1]", temper=temper)
    most_G = caps(prior_G, repeats)
    centre_G = prior_G**temper
    centre_G = centre_G / centre_G.sum()
    found_MG = np.zeros((0, len(prior_G)), np.int64)
    for _ in range(ATTEMPTS):
        # A Dirichlet draw is gammas over their sum; of small strengths all may be 0, which is no draw.
        strength_M1 = generator.choice(STRENGTHS, size=(2 * count, 1))
        gamma_MG = generator.standard_gamma(strength_M1 * centre_G)
        steps_MG = stepped(gamma_MG[gamma_MG.sum(axis=1) > 1e-200])
        found_MG = distinct(np.concatenate([found_MG, steps_MG[(steps_MG <= most_G).all(axis=1)]]))
        if len(found_MG) >= count:
            break
    if not len(found_MG):
        raise UserError(
            f"repeats={repeats:g} refuses all of {2 * count * ATTEMPTS:,} mixtures that were drawn around shares from "
            f"{prior_G.min():.2g} to {prior_G.max():.2g}; raise it, or take fewer groups"
        )
    return found_MG[:count]


def distinct(steps_MG: np.ndarray) -> np.ndarray:
    """Without those that came before, in their order."""
    return steps_MG[np.sort(np.unique(steps_MG, axis=0, return_index=True)[1])]
