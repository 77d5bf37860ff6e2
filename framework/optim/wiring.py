"""What has to be arranged between a Trainer and a `LowRank` optimiser before the first step."""

import gc

from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adafactor, Muon, Optimizer

from lightspan.distributed import world_size
from lightspan.errors import UserError
from lightspan.optim.gradients import attach
from lightspan.optim.low_rank import LowRank
from lightspan.optim.random_subspace import RandomSubspace
from lightspan.optim.reduction import leave_out_of_ddp, nothing_left_for_ddp
from lightspan.optim.report import print_report

MATRIX_OPTIMIZERS = (LowRank, Muon, Adafactor)
"""Optimisers for which a matrix is more than the numbers in it."""


def wire(trainer: Trainer, module: LightningModule, optimizers: list[Optimizer]) -> None:
    """Prints what each parameter gets, lets the optimisers clip in the Trainer's place, and attaches backward passes.

    Clipping by norm moves from `trainer.gradient_clip_val` into the optimisers if all of them are `LowRank`: it then
    costs no pass over the gradients of its own, and holds for gradients that exist in coordinates only.

    Raises: UserError for settings of the Trainer that coordinates cannot honour.
    """
    refuse_flat_partitions(trainer.strategy, [type(optimizer) for optimizer in optimizers])
    low_rank = [optimizer for optimizer in optimizers if isinstance(optimizer, LowRank)]
    for optimizer in low_rank:
        print_report(optimizer)
    kept = [optimizer for optimizer in low_rank if optimizer.backward != "whole"]
    if kept and trainer.precision == "16-mixed":
        raise UserError(
            f"backward={kept[0].backward!r} cannot unscale the loss scaling of trainer.precision=16-mixed; use "
            "bf16-mixed, or backward='whole'"
        )
    if trainer.gradient_clip_val:
        _take_over_clipping(trainer, optimizers, low_rank, bool(kept))
    if kept and world_size() > 1:
        _attach_under_ddp(trainer, module, kept)
    else:
        for optimizer in kept:
            attach(module, optimizer)


def refuse_flat_partitions(strategy: Strategy, optimizers: list[type[Optimizer]]) -> None:
    """Raises: UserError for an optimiser that DeepSpeed's ZeRO would hand vectors where it needs matrices."""
    for kind in optimizers if isinstance(strategy, DeepSpeedStrategy) else ():
        if issubclass(kind, MATRIX_OPTIMIZERS):
            raise UserError(
                f"{kind.__name__} works on matrices, and DeepSpeed's ZeRO lays all parameters end to end and hands "
                "each rank one flat run of numbers; train with --config scale/fsdp2 or scale/ddp, or with an "
                "elementwise optimiser such as torch.optim.AdamW"
            )


def average_in_coordinates(trainer: Trainer, module: LightningModule, optimizer: RandomSubspace) -> None:
    """Under DDP ranks then exchange d numbers a step instead of D gradients; does nothing under other strategies.

    DDP keeps its work where it is needed: for clipping, which has to see mean gradients, and for buffers, which it
    copies from the first rank.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy) or not isinstance(strategy.model, DistributedDataParallel):
        return
    if trainer.gradient_clip_val or any(True for _ in module.buffers()):
        return
    optimizer.averages = True
    leave_out_of_ddp(module, optimizer.slice.names)
    _build_ddp_anew(strategy, module)


def _attach_under_ddp(trainer: Trainer, module: LightningModule, kept: list[LowRank]) -> None:
    """Lightning builds DDP before it asks for optimisers, so DDP is built anew without what `kept` reduces."""
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy) or not isinstance(strategy.model, DistributedDataParallel):
        raise UserError(
            f"backward={kept[0].backward!r} trains in one process or under DDP, not under "
            f"{type(strategy).__name__}; set trainer.strategy=ddp, or backward='whole'"
        )
    for optimizer in kept:
        attach(module, optimizer)
    _build_ddp_anew(strategy, module)


def _build_ddp_anew(strategy: DDPStrategy, module: LightningModule) -> None:
    strategy.model = module
    gc.collect()  # the hooks of the first DDP end with it
    if not nothing_left_for_ddp(module):
        strategy.configure_ddp()


def _take_over_clipping(trainer: Trainer, optimizers: list[Optimizer], low_rank: list[LowRank], must: bool) -> None:
    by_norm = trainer.gradient_clip_algorithm in (None, "norm")
    if len(low_rank) == len(optimizers) and by_norm and trainer.precision != "16-mixed":
        for optimizer in low_rank:
            optimizer.max_norm = float(trainer.gradient_clip_val or 0)
        trainer.gradient_clip_val = None
    elif must:
        raise UserError(
            "a backward pass that keeps only coordinates can be clipped by norm alone, by optimisers that are all "
            "LowRank; set trainer.gradient_clip_algorithm=norm, or backward='whole'"
        )
