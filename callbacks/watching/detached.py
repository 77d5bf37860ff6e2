"""Looks at a model during training without changing it.

Shapes: B rows of this rank's batch, D features, N rows of all ranks.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics.utilities.distributed import gather_all_tensors

from lightspan.core.errors import UserError


@contextmanager
def detached(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside; afterwards restores the modes of submodules and all random states."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        with torch.no_grad(), isolate_rng():
            module.eval()
            yield
    finally:
        for part, training in modes:
            part.training = training


def features_of(trainer: Trainer, module: LightningModule, batch: Any, name: str = "features") -> Tensor:
    """What `module.features` gives for a batch on its device, [B D], in float32. For use inside `detached`.

    Args:
        name: of another method of the same form.
    Raises: UserError for features of another form.
    """
    with trainer.precision_plugin.forward_context():
        features_BD = getattr(module, name)(batch)
    if not isinstance(features_BD, Tensor) or features_BD.ndim != 2:
        got = list(features_BD.shape) if isinstance(features_BD, Tensor) else type(features_BD).__name__
        raise UserError(f"{type(module).__name__}.{name}(batch) returned {got}, but probes need a tensor [B, D]")
    return features_BD.detach().float()


def index_of(trainer: Trainer, batch: Any, rows: int, before: int) -> Tensor:
    """The samples' numbers, int64 [B]: the batch's "index", or where it has none a different one for every row.

    Args:
        before: rows of this rank's earlier batches.
    """
    given = batch.get("index") if isinstance(batch, Mapping) else None
    own = torch.arange(before, before + rows) * trainer.world_size + trainer.global_rank
    return own if given is None else given


def of_all_ranks(trainer: Trainer, columns: Sequence[Tensor], index_B: Tensor) -> list[Tensor]:
    """Columns [B ...] of all ranks joined to [N ...], in the order of "index", each index once."""
    index_N, *gathered = (
        torch.cat(gather_all_tensors(column.contiguous())) if trainer.world_size > 1 else column
        for column in (index_B, *columns)
    )
    order_N = index_N.argsort(stable=True)
    first_N = torch.ones_like(order_N, dtype=torch.bool)
    first_N[1:] = index_N[order_N].diff() != 0
    return [column[order_N[first_N]] for column in gathered]


def is_logged(trainer: Trainer) -> bool:
    """Whether loggers record the step under way, as Lightning counts; the same on all ranks."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # a connector of the trainer sets it
    return bool(every) and (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0


def ends_with_epoch(trainer: Trainer) -> bool:
    """At the end of a training epoch, complete or cut: whether none follows."""
    return trainer.should_stop or at_full_length(trainer)


def at_full_length(trainer: Trainer) -> bool:
    """At the end of a training epoch, complete or cut: whether the run is as long as it was meant to be."""
    return trainer.current_epoch + 1 == trainer.max_epochs or 0 < trainer.max_steps <= trainer.global_step


def steps_of_run(trainer: Trainer) -> float:
    """Optimiser steps that a fit that has begun will have at its end; infinite where nothing bounds it."""
    try:
        steps = trainer.estimated_stepping_batches
    except MisconfigurationException:  # a schedule of accumulation has other steps in each epoch
        steps = trainer.max_steps
    return steps if steps > 0 else math.inf


def log_now(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """One line of the loggers for the step that has just ended, and what callbacks read.

    Not with `log`, which keeps quiet in most steps and repeats the figures in the lines of all others.
    """
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.fit_loop.epoch_loop._batches_that_stepped)
