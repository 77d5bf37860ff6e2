"""Loaders whose order of samples is exact: the same on any number of ranks and workers, and after a resume.

Why not torch's DataLoader alone: Lightning replaces its sampler by a padded, rank-strided one, and neither knows where
in an epoch it stands. Lightning leaves a loader of our own alone, and saves its `state_dict` with the loops.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

from lightspan.errors import UserError

Key = tuple[int, int]  # (index, seed) of one sample


class Dataset(Protocol):
    """Samples by number. `sample` must be a pure function of its arguments: that is what makes runs repeatable.

    `seed`, in [0, 2**63), is all the randomness a sample may use (augmentation, masking).
    """

    def __len__(self) -> int: ...

    def sample(self, index: int, seed: int) -> Mapping[str, Any]: ...


def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order of one epoch: a permutation of range(length), a pure function of its arguments, int64 [length]."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, 0]))).permutation(length)


def sample_seeds(seed: int, epoch: int, length: int) -> np.ndarray:
    """One seed a sample, by sample index: a pure function of (seed, epoch, index), int64 [length]."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, 1]))).integers(2**63, size=length)


class _Samples:
    """What a DataLoader worker indexes: the order is decided in the main process, so workers hold no state."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: Key) -> Mapping[str, Any]:
        return self.dataset.sample(*key)


class _Keys:
    """The keys of the batches to come, as DataLoader wants them."""

    def __init__(self, batches: Iterator[list[Key]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[Key]]:
        return self.batches


def _load(dataset: Dataset, batches: Iterator[list[Key]], num_workers: int, pin_memory: bool) -> Iterator[Any]:
    loader: DataLoader[Any] = DataLoader(
        _Samples(dataset),  # type: ignore[arg-type]
        batch_sampler=_Keys(batches),
        num_workers=num_workers,
        collate_fn=default_collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # DataLoader would draw from the global generator otherwise
    )
    return iter(loader)


def _keys(indices: np.ndarray, seeds: np.ndarray) -> list[Key]:
    return list(zip(indices.tolist(), seeds[indices].tolist(), strict=True))


class ExactLoader:
    """Training batches: shuffled anew each epoch, resumable at any batch, one stream of samples on any number of ranks.

    An optimiser step consumes `batch_size` consecutive samples of the epoch's order; they are cut first into
    `accumulate` parts, then into ranks, so the union over ranks is what one rank would see. The tail of an epoch that
    does not fill a batch is dropped; it is another tail each epoch. The position counts samples of batches handed out,
    never those that workers have fetched ahead, and says nothing of ranks or workers.

    Args:
        dataset: the samples.
        batch_size: samples of one optimiser step over all ranks; at least 1, at most len(dataset).
        seed: of the order and of the per-sample randomness; >= 0.
        rank, world_size: this rank among those that see different data.
        accumulate: micro-batches of one optimiser step on one rank.
        num_workers: processes that fetch; 0 fetches in this process. Batches are bit-equal for any number.
        limit_batches: Trainer(limit_train_batches=...): the epoch ends there. A count, or a fraction of the epoch.
        pin_memory: hand out batches in page-locked memory.

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
        self.num_workers, self.limit_batches, self.pin_memory = num_workers, limit_batches, pin_memory
        self.epoch, self.samples = 0, 0

    def __len__(self) -> int:
        """Micro-batches of a whole epoch on this rank; constant, also after a resume in the middle of an epoch."""
        return len(self.dataset) // self.batch_size * self.accumulate

    def __iter__(self) -> Iterator[Any]:
        """The rest of the current epoch; the next epoch where the current one is finished."""
        round_samples = self.micro_batch * self.world_size  # consumed by all ranks together for one micro-batch each
        limit = self.limit_batches
        end = round_samples * (min(limit, len(self)) if isinstance(limit, int) else int(limit * len(self)))
        epoch, samples = (self.epoch, self.samples) if self.samples < end else (self.epoch + 1, 0)
        for batch in _load(self.dataset, self._batches(epoch, samples, end), self.num_workers, self.pin_memory):
            samples += round_samples
            # Before the yield: a checkpoint is written while the consumer still works on this batch.
            self.epoch, self.samples = epoch, samples
            yield batch

    def _batches(self, epoch: int, start: int, end: int) -> Iterator[list[Key]]:
        order = epoch_order(self.seed, epoch, len(self.dataset))
        seeds = sample_seeds(self.seed, epoch, len(self.dataset))
        first = self.rank * self.micro_batch
        for at in range(start + first, end, self.micro_batch * self.world_size):
            yield _keys(order[at : at + self.micro_batch], seeds)

    def state_dict(self) -> dict[str, int]:
        """The position: `samples` consumed of `epoch` by all ranks together, and what it can be resumed with."""
        return {
            "epoch": self.epoch,
            "samples": self.samples,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "length": len(self.dataset),
            "accumulate": self.accumulate,
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from a position, on any number of ranks and workers.

        Raises: UserError where the order is not the one that was saved, or is cut into another number of micro-batches:
            Lightning's own progress counts those.
        """
        here = self.state_dict()
        for name, setting in (
            ("seed", "data.init_args.seed"),
            ("batch_size", "data.init_args.batch_size"),
            ("length", "the data (its number of training samples)"),
            ("accumulate", "trainer.accumulate_grad_batches (the number of devices may change)"),
        ):
            if state_dict.get(name) != here[name]:
                raise UserError(
                    f"the checkpoint has data {name} {state_dict.get(name)}, this run has {here[name]}, so "
                    f"it cannot go on with the next sample; set {setting} back to what it was, or start a new run"
                )
        self.epoch, self.samples = state_dict["epoch"], state_dict["samples"]


class EvaluationLoader:
    """Every sample exactly once over all ranks, in order: rank r takes samples r, r + world_size, ...

    Nothing is padded, so ranks may differ by one sample and by one batch. Each pass is the same; there is no position.

    Args:
        dataset: the samples.
        batch_size: samples of one batch on this rank.
        rank, world_size, num_workers, pin_memory: as in `ExactLoader`.
        indices: the samples to evaluate on, in this order; all of them when None.
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
        chosen = np.arange(len(dataset)) if indices is None else np.asarray(indices, dtype=np.int64)
        self.indices = chosen[rank::world_size]

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        return _load(self.dataset, self._batches(), self.num_workers, self.pin_memory)

    def _batches(self) -> Iterator[list[Key]]:
        seeds = sample_seeds(0, 0, len(self.dataset))  # fixed, so that a random view is the same in every evaluation
        for at in range(0, len(self.indices), self.batch_size):
            yield _keys(self.indices[at : at + self.batch_size], seeds)


def split_batch(batch_size: int, world_size: int, accumulate: int) -> int:
    """Samples of one micro-batch on one rank. Raises: UserError where `batch_size` does not divide."""
    parts = world_size * accumulate
    if batch_size < 1 or batch_size % parts:
        raise UserError(
            f"batch_size={batch_size} (samples of one optimiser step over all ranks) does not divide into "
            f"{world_size} ranks x {accumulate} accumulated micro-batches = {parts} equal parts; set "
            f"data.init_args.batch_size to a multiple of {parts}, or change trainer.devices or "
            "trainer.accumulate_grad_batches"
        )
    return batch_size // parts
