"""Risks over numbers of labels, read the other way round: how many labels a risk takes. Shapes: K numbers of labels."""

from collections.abc import Sequence

import numpy as np

LEAST_SHARE = 1e-3
"""Of the largest risk: a smaller one counts as this, since the logarithm of nothing is infinite."""


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
    if falling_K[0] <= wanted:
        return float(labels_K[0]), "at most"
    if falling_K[-1] > wanted:
        return float(labels_K[-1]), "at least"
    k = int(np.argmax(falling_K <= wanted))
    above, below = np.log(falling_K[k - 1]), np.log(falling_K[k])
    # Risks that differ by rounding may have equal logarithms.
    share = (above - np.log(wanted)) / (above - below) if above > below else 1.0
    return float(np.exp(np.log(labels_K[k - 1]) + share * np.log(labels_K[k] / labels_K[k - 1]))), ""


def saving(labels_K: Sequence[int], reference_K: np.ndarray, risk_K: np.ndarray) -> tuple[float, str]:
    """(how many times as many labels the reference needs, what bounds it: "", "at least" or "at most").

    At the risk that the reference has with all labels, or, for a curve that never comes down to it, at the risk which
    that one has with all labels: the factor is then below 1.
    """
    needed, bound = labels_for(labels_K, risk_K, float(np.min(reference_K)))
    if bound != "at least":
        # The reference may have had its best risk with fewer labels than all.
        own, _ = labels_for(labels_K, reference_K, float(np.min(reference_K)))
        return own / needed, {"at most": "at least"}.get(bound, "")
    own, bound = labels_for(labels_K, reference_K, float(np.min(risk_K)))
    needed, _ = labels_for(labels_K, risk_K, float(np.min(risk_K)))
    return own / needed, bound
