"""Mixtures over groups: drawn around a prior, on a grid, with a limit on how often a group is repeated.

Shapes: M mixtures, G groups.
"""

import numpy as np

from lightspan.core.ranges import require_in

GRID = 5_000
"""Shares are multiples of 1 / GRID: what is below the 2e-4 of the paper's code is 0."""
STRENGTHS = np.geomspace(0.1, 5, 15)
ATTEMPTS = 10


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
    """The most steps of each group, int64 [G]: its prior times `repeats`, at least the prior, at most all. Groups to
    which that leaves less than a step get none, unless the others may not have everything.
    """
    most_G = np.clip(np.floor(GRID * repeats * prior_G), np.ceil(GRID * prior_G), GRID).astype(np.int64)
    large_G = GRID * repeats * prior_G >= 1
    return most_G * large_G if most_G[large_G].sum() >= GRID else most_G


def drawn_mixtures(
    prior_G: np.ndarray, count: int, repeats: float, temper: float, generator: np.random.Generator
) -> np.ndarray:
    """Different mixtures around a prior, as steps of the grid, int64 [M G].

        w ~ Dirichlet(s prior^temper / sum),   s one of 15 strengths in [0.1, 5], evenly spaced by logarithm

    A draw in which a group has more than `repeats` times its prior is moved towards the prior until none has: drawn
    again, as in the paper's code, hardly any would be left where `repeats` is low. A group so small that a step of the
    grid would repeat it more often is left out. At most `count`: on a grid of few groups there may be fewer.

    Args:
        prior_G: above 0, with a sum of 1.
        count: at least 1.
        repeats: above 1.
        temper: in [0, 1]; 0 draws around equal shares, 1 around the prior.
    """
    require_in("[1, inf)", count=count)
    require_in("(1, inf)", repeats=repeats)
    require_in("[0, 1]", temper=temper)
    most_G = caps(prior_G, repeats) / GRID
    centre_G = prior_G**temper * (most_G > 0)
    centre_G = centre_G / centre_G.sum()
    if not most_G.all():  # what is left out goes to the others, as they have room
        prior_G = np.minimum(prior_G, most_G)
        prior_G = prior_G + (most_G - prior_G) * ((1 - prior_G.sum()) / (most_G - prior_G).sum())
    found_MG = np.zeros((0, len(prior_G)), np.int64)
    for _ in range(ATTEMPTS):
        # A Dirichlet draw is gammas over their sum; of small strengths all may be 0, which is no draw.
        strength_M1 = generator.choice(STRENGTHS, size=(count, 1))
        gamma_MG = generator.standard_gamma(strength_M1 * centre_G)
        gamma_MG = gamma_MG[gamma_MG.sum(axis=1) > 1e-200]
        way_MG = gamma_MG / gamma_MG.sum(axis=1, keepdims=True) - prior_G
        room_G = most_G - prior_G
        part_MG = np.divide(room_G, way_MG, out=np.ones_like(way_MG), where=way_MG > room_G)
        share_MG = np.minimum(prior_G + part_MG.min(axis=1, keepdims=True) * way_MG, most_G)
        found_MG = distinct(np.concatenate([found_MG, stepped(np.maximum(share_MG, 0))]))
        if len(found_MG) >= count:
            break
    return found_MG[:count]


def distinct(steps_MG: np.ndarray) -> np.ndarray:
    """Without those that came before, in their order."""
    return steps_MG[np.sort(np.unique(steps_MG, axis=0, return_index=True)[1])]
