"""Looks at a model during training without changing it.

Shapes: B rows of this rank's batch, D features, N rows of all ranks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics.utilities.distributed import gather_all_tensors

from lightspan.errors import UserError


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


def features_of(trainer: Trainer, module: LightningModule, batch: Any) -> Tensor:
    """What `module.features` gives for a batch on its device, [B D], in float32. For use inside `detached`.

    Raises: UserError for features of another form.
    """
    with trainer.precision_plugin.forward_context():
        features_BD = module.features(batch)  # type: ignore[operator]
    if not isinstance(features_BD, Tensor) or features_BD.ndim != 2:
        got = list(features_BD.shape) if isinstance(features_BD, Tensor) else type(features_BD).__name__
        raise UserError(f"{type(module).__name__}.features(batch) returned {got}, but probes need a tensor [B, D]")
    return features_BD.detach().float()


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
