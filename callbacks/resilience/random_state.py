"""Random numbers that depend only on seed, step and rank, so that a resumed run draws what it would have drawn."""

import hashlib
import os
import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class RandomState(Callback):
    """Seeds Python, NumPy and torch (CPU and GPUs) again before every training batch, every epoch and every validation.

    The generators' states that `Checkpoint` keeps for every rank are not enough: between the step where they are taken
    and the next batch, validation and new data iterators draw numbers too, and another number of ranks needs others.
    Here the state is instead a
    pure function: of (seed, batches trained, rank) for a training batch, of (seed, epoch, rank) for the start
    of an epoch, and of (seed, rank) for validation, so that every validation draws the same. Uninterrupted, stopped
    anywhere and resumed, with or without validation: dropout and all other draws of a step are bit-identical.

    Put it first among the callbacks: hooks of callbacks before it see the old state.

    Args:
        seed: by default that of `seed_everything`, else torch's initial seed on rank 0. A resumed run keeps the seed of
            its checkpoint, whatever is given here.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._seed is None:
            global_seed = os.environ.get("PL_GLOBAL_SEED")  # where Lightning's seed_everything leaves it
            self._seed = int(global_seed) if global_seed else torch.initial_seed()
        self._seed = int(trainer.strategy.broadcast(self._seed))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reseed("epoch", trainer.current_epoch, trainer.global_rank)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._reseed("batch", trainer.fit_loop.epoch_loop.total_batch_idx, trainer.global_rank)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reseed("validation", 0, trainer.global_rank)

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self._seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seed = state_dict["seed"]

    def _reseed(self, phase: str, index: int, rank: int) -> None:
        seed = derived_seed(self._seed, phase, index, rank)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """The states of this process's generators (Python, NumPy, torch, every GPU) as tensors and plain values."""
    version, words, gauss = random.getstate()
    name, key, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(key, dtype=np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Sets the generators to what `random_states` returned; GPUs only if their number is the same."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, key, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, key.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def derived_seed(*key: int | str | None) -> int:
    """An integer in [0, 2**63) that looks random and depends only on `key`, on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1
