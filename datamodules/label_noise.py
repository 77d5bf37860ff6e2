"""Wrong labels on purpose: classes that flip at a rate, and captions that change places.

As pre-training sets are made noisy in arXiv 2309.17002. Which samples are wrong is a function of the seed and their
number, and is independent of how many there are; those of a lower rate are among those of a higher one.
Shapes: N samples.
"""

import numpy as np

from lightspan.core.errors import UserError


def require_rate(owner: object, rate: float) -> None:
    """Raises: UserError for a rate outside [0, 1]."""
    if not 0 <= rate <= 1:
        raise UserError(f"{type(owner).__name__} rate={rate} must lie in [0, 1]")


def flipped(labels: np.ndarray, classes: int, rate: float, seed: int) -> np.ndarray:
    """The labels, int64 [N], of which each is another with probability `rate`, all other classes alike.

    A label that flips at two rates flips to the same class. With a single class there is no other, and nothing flips.

    Args:
        labels: in [0, classes).
        rate: in [0, 1].
    """
    drawn, other = _draws(len(labels), seed)
    if classes < 2:
        return labels.copy()
    step = 1 + np.minimum((other * (classes - 1)).astype(np.int64), classes - 2)
    return np.where(drawn < rate, (labels + step) % classes, labels)


def swapped(count: int, rate: float, seed: int) -> np.ndarray:
    """Whose caption each sample gets, a permutation, int64 [N]: each leaves its own with probability `rate`, and gets
    that of another one that leaves its own. A single one keeps it.
    """
    drawn, other = _draws(count, seed)
    chosen = np.flatnonzero(drawn < rate)
    circle = chosen[np.argsort(other[chosen], kind="stable")]
    source = np.arange(count)
    source[circle] = np.roll(circle, 1)
    return source


def _draws(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two numbers in [0, 1) for each sample; those of the first samples do not change with `count`."""
    drawn, other = np.random.default_rng(seed).random((count, 2)).T
    return drawn, other
