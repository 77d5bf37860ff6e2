"""Loaders whose order of samples is exact: the same on any number of ranks and workers, and after a resume.

Why not torch's DataLoader alone: Lightning replaces its sampler by a padded, rank-strided one, and neither knows where
in an epoch it is. Lightning does not touch a loader of our own, and saves its `state_dict` with the loops.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lightspan.core.errors import UserError
from lightspan.datamodules.loading.order import Order, packed, sample_seeds
from lightspan.datamodules.loading.subset import SubsetSamples
from lightspan.datamodules.loading.workers import Dataset, Fetcher, Key, Replacement


def _keys(indices: np.ndarray, seeds: np.ndarray) -> list[Key]:
    return list(zip(indices.tolist(), seeds.tolist(), strict=True))


class ExactLoader:
    """Training batches: reshuffled each epoch, resumable at any batch, one stream of samples on any number of ranks.

    An optimiser step consumes `batch_size` consecutive samples of the epoch's order; they are divided first into
    `accumulate` parts, then into ranks, so the union over ranks is what one rank would see. What happens to the tail of
    an epoch that does not fill a batch depends on the order. All ranks get equally many batches. The position counts
    samples of returned batches, never those that workers have prefetched, and does not depend on ranks or workers.

    Attributes:
        consumed: samples returned since the first epoch began, over all ranks together.
        round_samples: samples that all ranks together consume for one micro-batch each.
        replaced: damaged samples in the batches returned on this rank since the loader was made.
        waited_s: seconds for which this rank waited for its batches since the loader was made; without workers, those
            that it took to make them.

    Args:
        dataset: the samples.
        batch_size: samples of one optimiser step over all ranks; at least 1, at most len(dataset).
        seed: seed of the order and of the per-sample randomness; >= 0.
        rank, world_size: this rank among those that see different data.
        accumulate: micro-batches of one optimiser step on one rank.
        num_workers: processes that fetch; 0 fetches in this process. Batches are bit-equal for any number.
        limit_batches: Trainer(limit_train_batches=...): the epoch ends there. A count, or a fraction of the epoch.
        pin_memory: return batches in page-locked memory.
        order: order of the samples; None mixes them all and drops the tail.

    Raises: UserError for a batch size that does not divide or leaves no full batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        num_workers: int = 0,
        limit_batches: int | float = 1.0,
        pin_memory: bool = False,
        order: Order | None = None,
    ) -> None:
        self.micro_batch = split_batch(batch_size, world_size, accumulate)
        if batch_size > len(dataset):
            raise UserError(
                f"batch_size={batch_size} is larger than the training set of {len(dataset)} samples, so no batch would "
                "ever be full; lower data.init_args.batch_size or give more data"
            )
        if seed < 0:
            raise UserError(f"data seed {seed} is negative; use a whole number from 0 up")
        assert 0 <= rank < world_size
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self._fetcher = Fetcher(dataset, num_workers, pin_memory, keeps_workers=True)
        self.order = Order((len(dataset),)) if order is None else order
        assert len(self.order) == len(dataset)
        self.order.require_micro_batch(self.micro_batch)
        limited = min(limit_batches, len(self)) if isinstance(limit_batches, int) else int(limit_batches * len(self))
        self.round_samples = self.micro_batch * world_size
        self._between_epochs = self.round_samples * limited  # samples from one `iter` to the next
        self._epoch_samples = len(dataset) if self.order.carries else self._between_epochs
        self.consumed = 0
        self.waited_s = 0.0
        self.replaced: list[Replacement] = []
        self._drawn: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Micro-batches of a whole epoch on this rank; constant, also after a resume in the middle of an epoch."""
        return len(self.dataset) // self.batch_size * self.accumulate

    def __iter__(self) -> Iterator[Any]:
        """The rest of the current epoch; the next epoch if the current one is finished."""
        if not self._between_epochs:
            return
        consumed = self.consumed
        end = (consumed // self._between_epochs + 1) * self._between_epochs
        asked_s = time.perf_counter()
        for batch, replaced in self._fetcher.fetch(self._batches(consumed, end)):
            self.waited_s += time.perf_counter() - asked_s
            consumed += self.round_samples
            # Before the yield: a checkpoint is written while the consumer still works on this batch.
            self.consumed = consumed
            self.replaced += replaced
            yield batch
            asked_s = time.perf_counter()

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(epoch, first, last) of the samples from `start` to `stop` of the whole stream: order(epoch)[first:last]."""
        while start < stop:
            epoch, first = divmod(start, self._epoch_samples)
            last = min(self._epoch_samples, first + stop - start)
            yield epoch, first, last
            start += last - first

    def drawn(self, epoch: int) -> np.ndarray:
        """The sample at each place of an epoch, int64 [N]. Two epochs are kept, since samples are fetched ahead."""
        if epoch not in self._drawn:
            self._drawn = dict([*self._drawn.items()][-1:]) | {epoch: self.order.epoch(self.seed, epoch)}
        return self._drawn[epoch]

    def _batches(self, start: int, stop: int) -> Iterator[list[Key]]:
        drawn, order, seeds = -1, np.empty(0, np.int64), np.empty(0, np.int64)  # seeds: of each place of the order
        for at in range(start + self.rank * self.micro_batch, stop, self.round_samples):
            keys: list[Key] = []
            for epoch, first, last in self.spans(at, at + self.micro_batch):
                if epoch != drawn:
                    drawn, order = epoch, self.drawn(epoch)
                    seeds = self.order.seeds(self.seed, epoch, order)
                keys += _keys(order[first:last], seeds[first:last])
            yield keys

    def description(self) -> dict[str, Any]:
        """What determines the whole stream of samples, in JSON's types: with it, a position can be looked up if `order`
        is `Order`. `part` says which samples of the data the training set has, if not all of them.
        """
        part = {}
        if isinstance(self.dataset, SubsetSamples):
            numbers, count = self.dataset.numbers()
            part = {"part": {"of": count, "samples": packed(numbers, count)}}
        return {
            "order": type(self.order).__name__,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "epoch_samples": self._epoch_samples,
            "sizes": list(self.order.sizes),
            "window": self.order.window,
            "content": self.order.content,
            "skips_damaged": self.order.skips_damaged,
            "damage": list(self.order.damage),
            **part,
        }

    def state_dict(self) -> dict[str, Any]:
        """The position: `samples` consumed of `epoch` by all ranks together, and what is needed to resume it."""
        epoch = max(self.consumed - 1, 0) // max(self._epoch_samples, 1)
        state = {
            "epoch": epoch,
            "samples": self.consumed - epoch * self._epoch_samples,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "length": len(self.dataset),
            "accumulate": self.accumulate,
        }
        return state | ({"content": self.order.content, "window": self.order.window} if self.order.content else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a position, on any number of ranks and workers.

        Raises: UserError if the order is not the one that was saved, or is cut into another number of micro-batches:
            Lightning's own progress counts those.
        """
        here = self.state_dict()
        for name, setting in (
            ("seed", "data.init_args.seed"),
            ("batch_size", "data.init_args.batch_size"),
            ("length", "the data (its number of training samples)"),
            ("content", "the data that it had"),
            ("window", "data.init_args.window"),
            ("accumulate", "trainer.accumulate_grad_batches (the number of devices may change)"),
        ):
            if state_dict.get(name) != here.get(name):
                raise UserError(
                    f"the checkpoint has data {name} {state_dict.get(name)}, but this run has {here.get(name)}, so "
                    f"it cannot continue with the next sample; restore {setting}, or start a new run"
                )
        # An epoch that is now limited to fewer samples has ended.
        self.consumed = state_dict["epoch"] * self._epoch_samples + min(state_dict["samples"], self._epoch_samples)


class EvaluationLoader:
    """Every sample exactly once over all ranks, in order: rank r takes samples r, r + world_size, ...

    All ranks get the same number of batches, none of them empty, since a rank that ran ahead would leave the others
    waiting in the next collective: of a sharded model's forward pass, of a loss or of a metric. Nothing is padded, so
    means over samples are exact; if samples do not divide evenly, last batches are smaller than `batch_size`. Only
    batches of one sample, which cannot be divided, become batches of two there. Each pass is the same; there is no
    position.

    Args:
        dataset: the samples.
        batch_size: samples of one batch on this rank.
        rank, world_size, num_workers, pin_memory: as in `ExactLoader`.
        indices: the samples to evaluate on, in this order; all of them when None.

    Raises: UserError for fewer samples than ranks, unless there are none.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        indices: Sequence[int] | None = None,
    ) -> None:
        assert batch_size >= 1
        assert 0 <= rank < world_size
        self.dataset, self.batch_size, self.num_workers, self.pin_memory = dataset, batch_size, num_workers, pin_memory
        self._fetcher = Fetcher(dataset, num_workers, pin_memory)
        chosen = np.arange(len(dataset)) if indices is None else np.asarray(indices, dtype=np.int64)
        self._chosen, self._rank, self._world_size = chosen, rank, world_size
        if 0 < len(chosen) < world_size:
            raise UserError(
                f"validation or test data of {len(chosen)} samples leave some of the {world_size} ranks with nothing "
                f"to do while the others evaluate; give at least {world_size} samples, lower trainer.devices, or set "
                "trainer.limit_val_batches=0 to skip validation"
            )
        self.indices = chosen[rank::world_size]
        fewest, most = len(chosen) // world_size, -(-len(chosen) // world_size)  # samples per rank
        self._length = min(-(-most // batch_size), fewest)

    def some(self, count: int) -> "EvaluationLoader":
        """A loader of `count` of these samples, >= 1, evenly spaced over all ranks'; of all if there are no more."""
        places = np.linspace(0, len(self._chosen) - 1, min(count, len(self._chosen))).round().astype(np.int64)
        return EvaluationLoader(
            self.dataset,
            self.batch_size,
            self._rank,
            self._world_size,
            self.num_workers,
            self.pin_memory,
            self._chosen[places].tolist(),
        )

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        for batch, _ in self._fetcher.fetch(self._batches()):
            yield batch

    def _batches(self) -> Iterator[list[Key]]:
        seeds = sample_seeds(0, 0, len(self.dataset))  # fixed, so that a random view is the same in every evaluation
        start = 0
        for left in range(self._length, 0, -1):
            samples = len(self.indices) - start
            # Full batches first, as long as each remaining batch keeps a sample.
            size = min(max(self.batch_size, -(-samples // left)), samples - left + 1)
            places = self.indices[start : start + size]
            yield _keys(places, seeds[places])
            start += size


def split_batch(batch_size: int, world_size: int, accumulate: int) -> int:
    """Samples of one micro-batch on one rank. Raises: UserError if `batch_size` does not divide evenly."""
    parts = world_size * accumulate
    if batch_size < 1 or batch_size % parts:
        raise UserError(
            f"batch_size={batch_size} (samples of one optimiser step over all ranks) does not divide into "
            f"{world_size} ranks x {accumulate} accumulated micro-batches = {parts} equal parts; set "
            f"data.init_args.batch_size to a multiple of {parts}, or change trainer.devices or "
            "trainer.accumulate_grad_batches"
        )
    return batch_size // parts
