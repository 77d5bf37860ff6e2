"""Random numbers of many samples at once, each a function of (seed, index, place) alone.

A sample's numbers are therefore the same in any batch, on any worker and on any rank. No generator is made for it,
which would take as long as half a small picture. The hash is that of `lightspan.core.noise`, which a test holds it to;
for so many small arrays on a CPU, NumPy is eight times as fast as torch.
Shapes: B samples.
"""

import functools

import numpy as np
import torch

GAMMA = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's step; without it, 0 would be hashed to 0


class Draws:
    """The numbers of B samples, in the order in which they are asked for.

    Args:
        seed: of the data set.
        index: of the samples, int64 [B].
        streams: tell several uses of one sample apart, each >= 0; one may be int64 [B], such as a seed of each row.
    """

    def __init__(self, seed: int, index: np.ndarray, *streams: int | np.ndarray) -> None:
        self.count = len(index)
        key = np.asarray(index).astype(np.uint64)
        for other in (seed, *streams):
            key = _hashed(key + GAMMA) + np.asarray(other).astype(np.uint64)
        self._key = _hashed(key + GAMMA)
        self._next = 0

    def uniform(self, *shape: int) -> np.ndarray:
        """float32 [B, *shape] in [0, 1), multiples of 2**-24."""
        return ((self._bits(shape) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)).reshape(
            self.count, *shape
        )

    def between(self, least: float, most: float, *shape: int) -> np.ndarray:
        """float32 [B, *shape] in [least, most)."""
        return np.float32(least) + np.float32(most - least) * self.uniform(*shape)

    def integers(self, end: int, *shape: int) -> np.ndarray:
        """int64 [B, *shape] in [0, end), equally likely up to end / 2**32; end <= 2**31."""
        high = self._bits(shape) >> np.uint64(32)
        return (high * np.uint64(end) >> np.uint64(32)).astype(np.int64).reshape(self.count, *shape)

    def normal(self, *shape: int) -> np.ndarray:
        """float32 [B, *shape], of mean 0 and deviation 1, one of 65,536 values: four numbers of one hash, for grain."""
        size = int(np.prod(shape))
        sixteens = self._bits((-(-size // 4),)).view(np.uint16)
        # Not "raise", which would check and copy.
        return np.take(_quantiles(), sixteens[:, :size].astype(np.intp), mode="clip").reshape(self.count, *shape)

    def _bits(self, shape: tuple[int, ...]) -> np.ndarray:
        """64 random bits for each of the next places, uint64 [B, product of shape]."""
        size = int(np.prod(shape))
        start, self._next = self._next, self._next + size
        return _hashed(self._key[:, None] + np.arange(start, start + size, dtype=np.uint64))


def _hashed(x: np.ndarray) -> np.ndarray:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


@functools.cache
def _quantiles() -> np.ndarray:
    """Of the normal distribution, in the middle of 65,536 equal parts, scaled to a deviation of 1."""
    values = torch.special.ndtri((torch.arange(65536, dtype=torch.float64) + 0.5) / 65536)
    return (values / values.square().mean().sqrt()).float().numpy()
