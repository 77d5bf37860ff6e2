"""The canonical order: complete, mixed inside windows of blocks, and the same stream of samples on any ranks."""

from collections.abc import Iterator
from itertools import chain

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightspan.datamodules.loading.loader import ExactLoader
from lightspan.datamodules.loading.order import Order

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=8).map(tuple)


class Numbers:
    """Sample i is i."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        return {"index": torch.tensor(index)}


@given(sizes=SIZES, window=st.integers(1, 9), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_an_epoch_sees_every_sample_once_and_each_window_before_the_next(
    sizes: tuple[int, ...], window: int, seed: int, epoch: int
) -> None:
    order = Order(sizes, window)
    samples = order.epoch(seed, epoch)
    assert sorted(samples) == list(range(len(order)))
    assert np.array_equal(samples, order.epoch(seed, epoch))
    block_of = np.repeat(np.arange(len(sizes)), sizes)
    places = {block: np.flatnonzero(block_of[samples] == block) for block in range(len(sizes)) if sizes[block]}
    for first, last in ((int(place[0]), int(place[-1])) for place in places.values()):
        assert len(set(block_of[samples[first : last + 1]])) <= window  # all that is read while a block is in use


def test_blocks_and_their_samples_are_both_mixed_anew_in_each_epoch() -> None:
    order = Order((50, 50, 50), window=1)
    epochs = [order.epoch(0, epoch) for epoch in range(20)]
    assert len({tuple(epoch // 50)[::50] for epoch in epochs}) > 3
    assert len({tuple(epoch) for epoch in epochs}) == 20


def test_the_order_of_windows_is_pinned_so_that_old_checkpoints_stay_resumable() -> None:
    assert Order((3, 0, 2, 4), window=2).epoch(7, 1).tolist() == [2, 1, 4, 3, 0, 6, 5, 7, 8]


def endless(loader: ExactLoader) -> Iterator[list[int]]:
    while True:
        for batch in loader:
            yield batch["index"].tolist()


def stream(loaders: list[ExactLoader], steps: int) -> list[list[int]]:
    """Samples of each optimiser step, over all ranks in the canonical order; epochs follow one another."""
    ranks, parts = [endless(loader) for loader in loaders], range(loaders[0].accumulate)
    return [list(chain.from_iterable(next(rank) for _ in parts for rank in ranks)) for _ in range(steps)]


@settings(deadline=None, max_examples=30)
@given(
    sizes=SIZES.filter(lambda sizes: sum(sizes) >= 24),
    window=st.integers(1, 4),
    saved=st.sampled_from([1, 2, 3, 4]),
    resumed=st.sampled_from([1, 2, 3, 4, 6]),
    accumulate=st.sampled_from([1, 2]),
    stop=st.integers(0, 5),
)
def test_a_carried_stream_is_every_epoch_whole_and_goes_on_anywhere_on_any_ranks(
    sizes: tuple[int, ...], window: int, saved: int, resumed: int, accumulate: int, stop: int
) -> None:
    order = Order(sizes, window, carries=True)

    def loaders(ranks: int) -> list[ExactLoader]:
        data = Numbers(len(order))
        return [ExactLoader(data, 24, 3, rank, ranks, accumulate, order=order) for rank in range(ranks)]

    steps = max(6, -(-2 * len(order) // 24))
    straight = stream(loaders(1), steps)
    flat = list(chain.from_iterable(straight))
    for epoch in range(len(flat) // len(order)):
        assert flat[epoch * len(order) :][: len(order)] == order.epoch(3, epoch).tolist()
    before, after = loaders(saved), loaders(resumed)
    assert stream(before, stop) == straight[:stop]
    for loader in after:
        loader.load_state_dict(before[0].state_dict())
    assert stream(after, steps - stop) == straight[stop:]
