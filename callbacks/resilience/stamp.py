"""What a checkpoint says of the run that wrote it, and what the run that goes on takes from that."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer

from lightspan import __version__
from lightspan.callbacks.resilience.random_state import random_states, restore_random_states
from lightspan.core.distributed import rank, world_size
from lightspan.core.errors import UserError
from lightspan.training.checkpoints.fit import class_path
from lightspan.training.checkpoints.manifest import FORMAT
from lightspan.training.checkpoints.pending_work import log_position

KEY = "lightspan"
"""Where it lies in a checkpoint."""


def stamp(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Every rank must call it; what all ranks draw next is inside."""
    return {
        "version": __version__,
        "format": FORMAT,
        "model": class_path(module),
        "optimizers": [class_path(optimizer) for optimizer in trainer.optimizers],
        "loggers": run_ids(trainer),
        "log": log_position(trainer),
        "random_states": _of_every_rank(random_states()),
        "trained": [name for name, parameter in module.named_parameters() if parameter.requires_grad],
    }


def run_ids(trainer: Trainer) -> dict[str, str]:
    return {class_path(logger): str(logger.version) for logger in trainer.loggers if logger.version}


def _of_every_rank(states: dict[str, Any]) -> list[dict[str, Any]]:
    gathered: list[Any] = [states] * world_size()
    if world_size() > 1:
        dist.all_gather_object(gathered, states)
    return gathered


def refuse_other_optimizers(trainer: Trainer, stamp: Mapping[str, Any]) -> None:
    before, now = stamp.get("optimizers"), [class_path(optimizer) for optimizer in trainer.optimizers]
    if before is not None and before != now:
        raise UserError(
            f"checkpoint {trainer.ckpt_path} was trained with {', '.join(before)}, this run uses {', '.join(now)}: "
            "their states do not fit; resume with the optimiser that wrote it"
        )


def go_on_drawing(states: Sequence[dict[str, Any]] | None) -> None:
    if states is None:
        return
    if len(states) == world_size():
        restore_random_states(states[rank()])
    elif rank() == 0:
        warnings.warn(
            f"the checkpoint holds the random states of {len(states)} ranks and this run has {world_size()}: they are "
            "not restored; with the callback RandomState every step draws the same on any machine",
            stacklevel=2,
        )
