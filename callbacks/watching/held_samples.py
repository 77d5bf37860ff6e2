"""A few training samples with their views, drawn once and held while a run trains: what a sentinel looks at.

Shapes: B samples of a batch, Q views of one size, N samples of all ranks.
"""

import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightspan.callbacks.watching.detached import detached, index_of, of_all_ranks
from lightspan.core.batches import batch_type_of, is_packed, read_names, samples_in, single_field, views_field
from lightspan.core.collate import separated
from lightspan.core.errors import UserError


class HeldSamples:
    """The first `count` samples of a fresh `train_dataloader()` of the datamodule, as training would get them.

    Drawn without touching the position or the random states of training, with seeds of their own, so that a resumed run
    holds the same ones. They stay in CPU memory; each rank holds its part.

    Args:
        count: samples over all ranks together.
    Raises: UserError for a run without a datamodule, or one that gives fewer than two samples.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, count: int) -> None:
        self.count, self.batch_type = count, batch_type_of(trainer.datamodule, module)  # type: ignore[attr-defined]
        make = getattr(trainer.datamodule, "train_dataloader", None)  # type: ignore[attr-defined]
        if make is None:
            raise UserError(
                "CollapseSentinel reads train_dataloader() of the datamodule, but this run has none; train with a "
                "datamodule, or remove the callback"
            )
        with detached(module):
            for seed in (random.seed, np.random.seed, torch.manual_seed):
                seed(0)
            batches = iter(make())
            self.batches = [_held(trainer, module, batch) for batch in islice(batches, 1)]
            rows = sum(map(self._rows, self.batches))
            more = -(-count // max(1, rows * trainer.world_size)) - 1
            self.batches += [_held(trainer, module, batch) for batch in islice(batches, more)]
        index_N = self.of_all(trainer, module, lambda batch: torch.zeros(self._rows(batch), 1))
        if len(index_N) < 2:
            raise UserError(
                f"CollapseSentinel compares samples with one another, but got {len(index_N)} of training; give it at "
                "least 2"
            )

    def of_all(self, trainer: Trainer, module: LightningModule, look: Callable[[Any], Tensor]) -> Tensor:
        """What `look` gives for each of the samples, [N ...], the same on every rank. For use inside `detached`.

        Args:
            look: a batch on the module's device -> a row for each of its samples.
        """
        rows, index, before = [], [], 0
        for batch in self.batches:
            rows.append(look(move_data_to_device(batch, module.device)))
            index.append(index_of(trainer, batch, len(rows[-1]), before))
            before += len(rows[-1])
        (of_all,) = of_all_ranks(trainer, [torch.cat(rows)], torch.cat(index).to(rows[0].device))
        return of_all[: self.count]

    def complaints(self, trainer: Trainer, module: LightningModule) -> tuple[list[str], float]:
        """What is wrong with the samples themselves, whatever the network makes of them; and the share of samples that
        equal another. For use inside `detached`.
        """
        ids_NQ = self.of_all(trainer, module, lambda batch: self._ids(batch).to(module.device))
        counts = ids_NQ[:, 0].unique(return_counts=True)[1]
        found, distinct = [], len(counts)
        if distinct <= len(ids_NQ) / 2:
            found.append(
                f"of {len(ids_NQ)} training samples only {distinct} differ after augmentation; weaken the "
                "augmentation, or look at the data"
            )
        elif ids_NQ.shape[1] > 1 and (ids_NQ == ids_NQ[:, :1]).all():
            found.append(
                "the views of each sample are all equal, so to make them agree teaches nothing; set "
                "data.init_args.views to one that draws at random"
            )
        return found, int(counts[counts > 1].sum()) / len(ids_NQ)

    def _rows(self, batch: Any) -> int:
        known = samples_in(batch, self.batch_type)
        return len(images_of(batch, self.batch_type)[0]) if known is None else known

    def _ids(self, batch: Any) -> Tensor:
        """A number for each sample and view that equal ones share, int64 [B Q]."""
        name = next(iter(read_names(batch, self.batch_type)), "") if isinstance(batch, Mapping) else ""
        if self.batch_type is not None and name and is_packed(name, batch, self.batch_type):
            rows = [[sample[name] for sample in separated(batch, self.batch_type)]]
        else:
            rows = [list(image) for image in images_of(batch, self.batch_type)]
        numbers = [[zlib.crc32(row.detach().float().cpu().contiguous().numpy().tobytes()) for row in q] for q in rows]
        return torch.tensor(numbers).T


def single_views(batch: Any, batch_type: type | None = None) -> Iterator[Any]:
    """The batch once for each view of the size of the first one, in place of the views; as it is without."""
    if not _views(batch, batch_type):
        yield batch
        return
    rest = {name: value for name, value in batch.items() if name != views_field(batch_type)}
    for view in images_of(batch, batch_type):
        yield {**rest, single_field(batch_type): view}


def images_of(batch: Any, batch_type: type | None = None) -> list[Tensor]:
    """Views of the size of the first; without views what a network reads, or the first tensor of two axes or more."""
    if views := _views(batch, batch_type):
        return [view for view in views if view.shape == views[0].shape]
    if isinstance(batch, Mapping):
        parts: Any = [batch[name] for name in read_names(batch, batch_type)] or batch.values()
    else:
        parts = batch if isinstance(batch, list | tuple) else [batch]
    tensors = [part for part in parts if isinstance(part, Tensor) and part.ndim > 1]
    if not tensors:
        raise UserError("CollapseSentinel needs batches with a tensor of samples; remove the callback for these data")
    return tensors[:1]


def _views(batch: Any, batch_type: type | None) -> list[Tensor]:
    """The views of a batch, a list of tensors or a mapping of names to them; none of a batch without such."""
    views = batch.get(views_field(batch_type), ()) if isinstance(batch, Mapping) else ()
    views = list(views.values()) if isinstance(views, Mapping) else views
    sound = isinstance(views, list | tuple) and all(isinstance(view, Tensor) and view.ndim for view in views)
    return list(views) if sound else []


def _held(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """A batch as the module gets it, hooks of the transfer included, brought back to the CPU."""
    batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), module.device)
    return move_data_to_device(batch, torch.device("cpu"))
