"""ledger.json: which samples a run consumed, as ranges of the canonical order, the same for any number of ranks."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightspan.core.distributed import world_size
from lightspan.core.files.atomic import write_atomic
from lightspan.core.files.places import RunPath

FORMAT = 1  # runs/ledger.py reads it without the imports of this module


@runtime_checkable
class ExactOrder(Protocol):
    """A loader that knows its position in a stream of samples, such as lightspan's training loaders."""

    consumed: int  # samples of the stream returned so far, over all ranks
    round_samples: int  # of them in one micro-batch of all ranks
    replaced: list[Any]  # (damaged, by, reason) of each damaged sample met on this rank

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]: ...

    def drawn(self, epoch: int) -> np.ndarray: ...

    def description(self) -> dict[str, Any]: ...


class Ledger(Callback):
    """Writes `path`: {"format", "data", "ranges": [[epoch, first, last], ...], "replaced": [...], "times"}.

    `data` describes the order (seed, sizes of its blocks, ...) and what was left out of it as unreadable. A range says
    that positions [first, last) of that epoch's order were trained on. `replaced` names each damaged sample, the
    sample that replaced it, and the step. `times` is how often each training sample was drawn, where `data` does not
    say what stands at a position: samples with weights, and batches that go by class or task. `lightspan ledger RUN`
    reads and summarises this.

    The ledger is a part of the checkpoint, so a resumed run drops what the steps after its checkpoint consumed: their
    effect is lost. The file is written with every checkpoint and when training ends or fails; rank 0
    writes. A run that replaces damaged samples logs their number as `data/replaced`. A loader without such an order
    gives a warning and no ledger.

    Args:
        path: the file, usually ${run}/ledger.json.
    """

    alters_training = False  # see config.identity

    def __init__(self, path: RunPath) -> None:
        self.path = Path(path)
        self._loader: ExactOrder | None = None
        self._may_replace = False
        self._seen = 0  # entries of this rank's loader.replaced that are in the ledger
        self._ranges: list[list[int]] = []
        self._replaced: list[dict[str, Any]] = []
        self._times: np.ndarray | None = None  # int64 [N]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loader = None
        loader = trainer.train_dataloader
        if not isinstance(loader, ExactOrder):
            rank_zero_info(
                f"no ledger is kept: a {type(loader).__name__} has no order independent of ranks; use the loader "
                "from lightspan.datamodules.loading.ranks.train_loader"
            )
            return
        self._loader, self._seen = loader, len(loader.replaced)
        data = loader.description()
        self._may_replace = data["skips_damaged"]
        if data["order"] != "Order" and self._times is None:
            self._times = np.zeros(sum(data["sizes"]), np.int64)
            for span in self._ranges:  # of a checkpoint that did not count
                self._count(*span)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._loader is None:
            return
        # Before the step, since a checkpoint may be written any time after it. Only the last batch, and not all since
        # training began: at that moment the loader may not have its position yet.
        for span in self._loader.spans(self._loader.consumed - self._loader.round_samples, self._loader.consumed):
            self._add(*span)
            self._count(*span)
        if not self._may_replace:
            return
        new = self._loader.replaced[self._seen :]
        self._seen += len(new)
        everywhere = [found for found in _from_all_ranks(new) if found]
        for damaged, by, reason in (replacement for found in everywhere for replacement in found):
            self._replaced.append({"step": trainer.global_step, "damaged": damaged, "by": by, "reason": reason})
        if everywhere:
            pl_module.log("data/replaced", float(len(self._replaced)), rank_zero_only=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._write(trainer)

    def state_dict(self) -> dict[str, Any]:
        state = {"ranges": [list(span) for span in self._ranges], "replaced": [dict(entry) for entry in self._replaced]}
        return state if self._times is None else state | {"times": torch.from_numpy(self._times.copy())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._ranges = [list(span) for span in state_dict["ranges"]]
        self._replaced = [dict(entry) for entry in state_dict["replaced"]]
        self._times = state_dict["times"].numpy().copy() if "times" in state_dict else None

    def _add(self, epoch: int, first: int, last: int) -> None:
        if self._ranges and self._ranges[-1][0] == epoch and self._ranges[-1][2] == first:
            self._ranges[-1][2] = last
        else:
            self._ranges.append([epoch, first, last])

    def _count(self, epoch: int, first: int, last: int) -> None:
        if self._times is not None and self._loader is not None:
            np.add.at(self._times, self._loader.drawn(epoch)[first:last], 1)

    def _write(self, trainer: Trainer) -> None:
        if self._loader is None or not trainer.is_global_zero:
            return
        document = {"format": FORMAT, "data": self._loader.description(), **self.state_dict()}
        if self._times is not None:
            document["times"] = self._times.tolist()
        write_atomic(self.path, json.dumps(document) + "\n")


def _from_all_ranks(new: list[Any]) -> list[list[Any]]:
    """`new` from every rank. Every rank must call it."""
    if world_size() == 1:
        return [new]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, new)
    return gathered
