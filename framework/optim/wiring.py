"""What has to be arranged between a Trainer and a `LowRank` optimiser before the first step."""

from lightning import LightningModule, Trainer
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightspan.errors import UserError
from lightspan.optim.gradients import attach
from lightspan.optim.low_rank import LowRank
from lightspan.optim.report import print_report


def wire(trainer: Trainer, module: LightningModule, optimizers: list[Optimizer]) -> None:
    """Prints what each parameter gets, lets the optimisers clip in the Trainer's place, and attaches backward passes.

    Clipping by norm moves from `trainer.gradient_clip_val` into the optimisers if all of them are `LowRank`: it then
    costs no pass over the gradients of its own, and holds for gradients that exist in coordinates only.

    Raises: UserError for settings of the Trainer that coordinates cannot honour.
    """
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
    for optimizer in kept:
        attach(module, optimizer)


def _take_over_clipping(trainer: Trainer, optimizers: list[Optimizer], low_rank: list[LowRank], must: bool) -> None:
    sharded = any(isinstance(p, DTensor) for o in optimizers for group in o.param_groups for p in group["params"])
    by_norm = trainer.gradient_clip_algorithm in (None, "norm")
    if len(low_rank) == len(optimizers) and by_norm and not sharded and trainer.precision != "16-mixed":
        for optimizer in low_rank:
            optimizer.max_norm = float(trainer.gradient_clip_val or 0)
        trainer.gradient_clip_val = None
    elif must:
        raise UserError(
            "a backward pass that keeps only coordinates can be clipped by norm alone, by optimisers that are all "
            "LowRank; set trainer.gradient_clip_algorithm=norm, or backward='whole'"
        )
