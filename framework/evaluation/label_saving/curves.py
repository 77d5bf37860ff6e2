"""Risks over numbers of labels, read the other way round: how many labels a risk takes. Shapes: K numbers of labels."""

from collections.abc import Sequence

import numpy as np

LEAST_SHARE = 1e-3
"""Of the largest risk: a smaller one counts as this, since the logarithm of nothing is infinite."""
ROUNDING = 1e-9
"""Share by which equal risks may differ, such as means with other weights."""


def labels_for(labels_K: Sequence[int], risk_K: np.ndarray, wanted: float) -> tuple[float, str]:
    """(with how many labels a curve first comes down to a risk, what bounds that number).

    Between two numbers the curve is a straight line of logarithms, and it never rises: a risk that was reached with
    fewer labels counts as reached. The bound is "at most" where the fewest labels suffice, "at least" where all do
    not, and else "".

    Args:
        labels_K: ascending, above 0.
        risk_K: at least 0.
    """
    least = max(LEAST_SHARE * float(np.max(risk_K)), float(np.finfo(float).tiny))
    falling_K, wanted = np.maximum(np.minimum.accumulate(risk_K), least), max(wanted, least)
    reached_K = falling_K <= wanted * (1 + ROUNDING)
    if reached_K[0]:
        return float(labels_K[0]), "at most"
    if not reached_K[-1]:
        return float(labels_K[-1]), "at least"
    k = int(np.argmax(reached_K))
    above, below = np.log(falling_K[k - 1]), np.log(min(falling_K[k], wanted))
    share = (above - np.log(wanted)) / (above - below)
    return float(np.exp(np.log(labels_K[k - 1]) + share * np.log(labels_K[k] / labels_K[k - 1]))), ""


def worth(labels_K: Sequence[int], reference_K: np.ndarray, risk_K: np.ndarray) -> list[tuple[float, str]]:
    """For each number of labels: (with how many the reference has that risk, over that number, and what bounds it).

    Curves never rise, as in `labels_for`. Where the reference is flat, it has one risk with several numbers of labels,
    of which the nearest counts: a reference is worth exactly 1 of itself.
    """
    flat_K, found = np.minimum.accumulate(reference_K), []
    for labels, risk in zip(labels_K, np.minimum.accumulate(risk_K), strict=True):
        equal = [n for n, own in zip(labels_K, flat_K, strict=True) if np.isclose(own, risk, rtol=ROUNDING, atol=0)]
        needed, bound = (min(max(labels, equal[0]), equal[-1]), "") if equal else labels_for(labels_K, flat_K, risk)
        found.append((needed / labels, bound))
    return found


def saving(labels_K: Sequence[int], reference_K: np.ndarray, risk_K: np.ndarray) -> tuple[float, str]:
    """(how many times as many labels the reference needs, what bounds it: "", "at least" or "at most").

    At the least risk that both curves come down to, each with the fewest labels that suffice: the factor is below 1 for
    a curve that never has the reference's least risk, or has it later, and exactly 1 for the reference itself.
    """
    wanted = float(max(np.min(reference_K), np.min(risk_K)))
    (own, of_own), (needed, of_needed) = (labels_for(labels_K, each_K, wanted) for each_K in (reference_K, risk_K))
    # Where both have it with the fewest labels already, neither is known to need fewer.
    bound = "" if of_own == of_needed else "at most" if of_own else "at least"
    return own / needed, bound
