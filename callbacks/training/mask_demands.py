"""What `MaskLearning` asks of parameters and of other callbacks, said before the first step."""

import math
from collections.abc import Iterable
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import expanded, make_folder


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


def refuse_scaled_gradients(trainer: Trainer, optimizer: Optimizer) -> None:
    """Raises: UserError for a GradScaler whose factor an optimiser takes out inside its step: masks would learn from
    gradients that are as many times too large.
    """
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    if scaled and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise UserError(
            "MaskLearning needs gradients without the factor of the GradScaler, and a fused "
            f"{type(optimizer).__name__} takes it out only inside its step; set fused=False, or "
            "trainer.precision=bf16-mixed"
        )


def masks_file(path: str | Path) -> Path:
    """Where masks can be written once the run ends; its folder is made. Raises: UserError if they cannot."""
    file = expanded(path, "path of MaskLearning")
    if file.is_dir():
        raise UserError(f"MaskLearning path={path} is a folder; name a file in it, such as masks.safetensors")
    make_folder(file.parent, "path of MaskLearning")
    return file


def early_choices(trainer: Trainer, steps: int) -> list[str]:
    """What to say of callbacks that choose a checkpoint by a figure before the mask is fixed, after this many steps:
    the figure is that of the masked network, and the checkpoint holds all weights.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # a connector of the trainer sets it
    return [
        f"{type(callback).__name__} chooses by {callback.monitor}, but before step {steps}, at which MaskLearning "
        "fixes its masks, a checkpoint holds all weights, and the figure is that of the masked network; keep all with "
        "save_top_k=-1 and choose among those from that step on, or lower until of MaskLearning"
        for callback in callbacks
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None
    ]


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
