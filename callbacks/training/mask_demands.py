"""What `MaskLearning` asks of parameters and of other callbacks, said before the first step."""

import math
from collections.abc import Iterable

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightspan.errors import UserError


def require_maskable(module: LightningModule, names: Iterable[str]) -> None:
    """Raises: UserError for one of these parameters that has no shape yet, is complex, or gets sparse gradients."""
    named = dict(module.named_parameters())
    sparse = {
        id(part.weight): type(part).__name__
        for part in module.modules()
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse
    }
    for name in names:
        parameter = named[name]
        if isinstance(parameter, UninitializedParameter):
            raise UserError(
                f"MaskLearning needs the shape of {name}, which a lazy module finds in its first pass; run one pass "
                "before the fit, or give its sizes"
            )
        if not parameter.is_floating_point():
            raise UserError(f"MaskLearning takes real parameters, and {name} is {parameter.dtype}; leave it out")
        if id(parameter) in sparse:
            raise UserError(
                f"MaskLearning needs a gradient for every entry of {name}, and its {sparse[id(parameter)]} gives "
                "sparse ones; set sparse=False or leave it out"
            )


def refuse_early_averages(trainer: Trainer, steps: int) -> None:
    """Raises: UserError for an average of weights that begins before the mask is fixed, after this many steps: entries
    that closed since would not be zero in it.
    """
    batches = trainer.num_training_batches
    epoch = math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else math.inf
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # a connector of the trainer sets it
        if _averages_before(callback, steps, epoch):
            raise UserError(
                f"{type(callback).__name__} averages weights from before step {steps}, at which MaskLearning fixes its "
                "masks, so that the average would not be zero outside of them; begin it there, as with "
                f"EMAWeightAveraging(update_starting_at_step={steps}), or lower until of MaskLearning"
            )


def _averages_before(callback: Callback, steps: int, epoch: float) -> bool:
    """Args:
    epoch: optimiser steps in one.
    """
    if isinstance(callback, StochasticWeightAveraging):  # takes the weights when an epoch begins
        return callback.swa_start * epoch < steps
    if not isinstance(callback, WeightAveraging):
        return False
    # After the step it counts from 0, and when an epoch ends.
    ended = range(math.ceil(steps / epoch) - 1)
    return any(callback.should_update(step_idx=step) for step in range(steps - 1)) or any(
        callback.should_update(epoch_idx=one) for one in ended
    )
