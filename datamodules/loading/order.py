"""The canonical order of samples: a function of seed and epoch, independent of ranks, workers and micro-batches."""

from dataclasses import dataclass

import numpy as np


def sample_seeds(seed: int, epoch: int, length: int) -> np.ndarray:
    """One seed per sample, by sample index: a pure function of (seed, epoch, index), int64 [length]."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, 1]))).integers(2**63, size=length)


@dataclass(frozen=True)
class Order:
    """In which order the samples of one epoch are seen.

    Samples are in blocks (shards), which are drawn in random order and opened `window` at a time; the samples of an
    open window are mixed. One block mixes everything, which is right if all samples are equally fast to read.

    Args:
        sizes: samples of each block, each >= 0. Sample indices run through the blocks in this order.
        window: blocks whose samples are mixed, >= 1. Reading touches only these until all their samples are used.
        carries: if an epoch does not fill its last batch, True lets the next epoch fill it, so that every sample is
            seen exactly once in each epoch; False drops the rest, which differs in each epoch.
        content: what identifies the samples beyond their number, such as a digest; empty if nothing does.
        skips_damaged: whether the loader may meet damaged samples and replace them.
        damage: what was left out of the blocks because it cannot be read, one line for each; for reports.
    """

    sizes: tuple[int, ...]
    window: int = 1
    carries: bool = False
    content: str = ""
    skips_damaged: bool = False
    damage: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(self.sizes)

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """A permutation of range(len(self)): int64 [len(self)]. It needs 8 bytes per sample."""
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, 0])))
        if len(self.sizes) == 1:
            return generator.permutation(len(self))
        starts = np.concatenate([[0], np.cumsum(self.sizes)])
        blocks = generator.permutation(len(self.sizes))
        windows = [
            np.concatenate([np.arange(starts[block], starts[block + 1]) for block in blocks[at : at + self.window]])
            for at in range(0, len(blocks), self.window)
        ]
        return np.concatenate([generator.permutation(samples) for samples in windows])


@dataclass(frozen=True)
class InSequence(Order):
    """Blocks in their own order, each mixed by itself: tasks that come one after the other."""

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, 0])))
        ends = np.cumsum(self.sizes)
        return np.concatenate(
            [end - size + generator.permutation(size) for size, end in zip(self.sizes, ends, strict=True)]
        )
