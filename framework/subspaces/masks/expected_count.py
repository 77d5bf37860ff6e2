"""Keeps the expected number of open entries at a limit, whatever the loss wants: one shift of all logits.

Of all vectors of probabilities with a sum of K, sigmoid(x - b) with the b that gives this sum is the nearest to
sigmoid(x) in the Kullback-Leibler divergence of independent Bernoulli variables, KL(new || old): its stationarity says
that new and old logits differ by one constant, the multiplier of the sum. ProbMask (Zhou et al., "Effective
Sparsification of Neural Networks with Global Sparsity Constraint", 2021, arXiv 2105.01571) projects probabilities in
the Euclidean distance instead, which leaves many of them at 0 for good.
"""

import math
from collections.abc import Callable

_ROUNDS = 60  # Newton takes three to six; bisection alone would need no more than these
_TOLERANCE = 1e-7  # of the count


def shift_to_count(sums: Callable[[float], tuple[float, float]], count: float, numbers: int, highest: float) -> float:
    """The smallest b >= 0 with sum(sigmoid(x - b)) <= count, to a ten-millionth of the count.

    Args:
        sums: sum(p) and sum(p (1 - p)) of p = sigmoid(x - b), for a b.
        count: K, > 0.
        numbers: of logits.
        highest: the largest logit, finite.
    """
    low, shift = 0.0, 0.0
    total, slope = sums(shift)
    if total <= count * (1 + _TOLERANCE) or count >= numbers:
        return 0.0
    mean = count / numbers
    high = highest - math.log(mean / (1 - mean))  # there even the largest probability is no more than the mean
    for _ in range(_ROUNDS):
        low, high = (shift, high) if total > count else (low, shift)
        newton = shift + (total - count) / slope if slope > 0 else math.inf
        shift = newton if low < newton < high else (low + high) / 2
        total, slope = sums(shift)
        if abs(total - count) <= _TOLERANCE * count:
            break
    return shift
