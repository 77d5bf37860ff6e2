"""What must be set up between a Trainer and this project's optimisers before the first step."""

import gc
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adafactor, Muon, Optimizer

from lightspan.core.distributed import world_size
from lightspan.core.errors import UserError
from lightspan.optim.low_rank.gradients import attach
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.low_rank.reduction import ddp_has_no_parameters, exclude_from_ddp
from lightspan.optim.matrices.matrix_optimizer import MatrixOptimizer
from lightspan.optim.random_subspace import RandomSubspace
from lightspan.optim.riemannian import RiemannianSGD
from lightspan.training.wiring.report import print_report

MATRIX_OPTIMIZERS = (MatrixOptimizer, Muon, Adafactor, RiemannianSGD)
"""Optimisers for which a matrix is more than the numbers in it."""


class SharesSteps(ABC):
    """A strategy whose ranks share the steps of optimisers in its own way."""

    @abstractmethod
    def share_steps(self, optimizers: Sequence[Optimizer]) -> None:
        """Prepares the optimisers for it, before anything reads what they will do. Raises: UserError for one that
        cannot be shared so.
        """


class ExchangesOptimizers(ABC):
    """A callback that replaces the optimisers that Lightning has built. A strategy whose engine takes them before
    fitting starts lets it do so first.
    """

    @abstractmethod
    def exchange_optimizers(
        self, pl_module: LightningModule, old: list[Optimizer], configs: Sequence[LRSchedulerConfig]
    ) -> list[Optimizer]:
        """The optimisers in place of the old ones, in their order; the schedulers of `configs` follow."""


def wire(trainer: Trainer, module: LightningModule, optimizers: list[Optimizer]) -> None:
    """Prints what each parameter gets, lets the optimisers clip instead of the Trainer, and attaches backward passes.

    What Lightning clips by norm, for `trainer.gradient_clip_val` or a module's `clip_gradients`, a `MatrixOptimizer`
    clips inside its next step: that costs no extra pass over the gradients, and works for gradients that exist only in
    coordinates.

    Raises: UserError for settings of the Trainer that coordinates cannot honour.
    """
    share_steps(trainer.strategy, optimizers)
    for optimizer in optimizers:
        _require_frames_kept(optimizer)
    for optimizer in optimizers:
        print_report(optimizer)
    if any(isinstance(optimizer, MatrixOptimizer) for optimizer in optimizers):
        clip_in_the_step(trainer)
    kept = [each for each in optimizers if isinstance(each, LowRank) and each.backward != "whole"]
    if kept and trainer.precision == "16-mixed":
        raise UserError(
            f"backward={kept[0].backward!r} cannot unscale the loss scaling of trainer.precision=16-mixed; use "
            "bf16-mixed, or backward='whole'"
        )
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm not in (None, "norm"):
        for optimizer in kept:
            _require_whole(optimizer)
    if kept and world_size() > 1:
        _attach_under_ddp(trainer, module, kept)
    else:
        for optimizer in kept:
            attach(module, optimizer)


def share_steps(strategy: Strategy | None, optimizers: Sequence[Optimizer]) -> None:
    """Prepares optimisers for a strategy that shares their steps in its own way; nothing under any other.

    Raises: UserError for an optimiser of matrices that the strategy cannot share.
    """
    if isinstance(strategy, SharesSteps):
        strategy.share_steps(optimizers)
    else:
        refuse_flat_partitions(strategy, [type(optimizer) for optimizer in optimizers])


def refuse_flat_partitions(strategy: Strategy | None, optimizers: Sequence[type[Optimizer]]) -> None:
    """Raises: UserError for an optimiser to which Lightning's DeepSpeedStrategy would give vectors, not matrices."""
    if not isinstance(strategy, DeepSpeedStrategy) or isinstance(strategy, SharesSteps):
        return
    for kind in optimizers:
        if issubclass(kind, MATRIX_OPTIMIZERS):
            raise UserError(
                f"{kind.__name__} works on matrices, but {type(strategy).__name__} has DeepSpeed concatenate all "
                "parameters and give each rank one flat range of numbers; set "
                "trainer.strategy.class_path=lightspan.training.deepspeed.ZeRO, which divides them by matrices in its "
                "stages 1 and 2"
            )


def _require_frames_kept(optimizer: Optimizer) -> None:
    if any(group.get("frames") for group in optimizer.param_groups) and not isinstance(optimizer, RiemannianSGD):
        raise UserError(
            f"the module has orthonormal frames, which a step of {type(optimizer).__name__} would not leave "
            "orthonormal; set optimizer.class_path=lightspan.optim.riemannian.RiemannianSGD, with "
            f"{type(optimizer).__name__} as its `rest`"
        )


def average_in_coordinates(trainer: Trainer, module: LightningModule, optimizer: RandomSubspace) -> None:
    """Under DDP ranks then exchange d numbers per step instead of D gradients; does nothing under other strategies.

    DDP still does what is needed: for clipping, which must see mean gradients, and for buffers, which it
    copies from the first rank.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy) or not isinstance(strategy.model, DistributedDataParallel):
        return
    if trainer.gradient_clip_val or any(True for _ in module.buffers()):
        return
    optimizer.averages = True
    exclude_from_ddp(module, optimizer.slice.names)
    _build_ddp_anew(strategy, module)


def _attach_under_ddp(trainer: Trainer, module: LightningModule, kept: list[LowRank]) -> None:
    """Lightning builds DDP before it asks for optimisers, so DDP is rebuilt without what `kept` reduces."""
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
    if not ddp_has_no_parameters(module):
        strategy.configure_ddp()


def clip_in_the_step(trainer: Trainer) -> None:
    """From now on, instead of Lightning clipping the gradients of a `MatrixOptimizer` by norm, its next step does.

    The change is in what Lightning calls to clip, which checks the kind of each optimiser. None of the Trainer's own
    settings is changed: a module's `configure_gradient_clipping` sees them, other optimisers are clipped as usual, and
    the same Trainer can fit again with anything.
    """
    plugin = trainer.precision_plugin
    if isinstance(plugin.clip_gradients, _Clip):
        return
    plugin.clip_gradients = _Clip(plugin.clip_gradients)  # type: ignore[method-assign]


@dataclass(frozen=True)
class _Clip:
    """Replaces `Precision.clip_gradients`, which it gets as an argument."""

    otherwise: Callable[..., None]

    def __call__(
        self, optimizer: Optimizer, clip_val: float = 0.0, gradient_clip_algorithm: str | None = "norm"
    ) -> None:
        optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        if not isinstance(optimizer, MatrixOptimizer) or clip_val <= 0:
            self.otherwise(optimizer, clip_val, gradient_clip_algorithm)
        elif gradient_clip_algorithm == "norm":
            optimizer.clips_next_at = min(float(clip_val), optimizer.clips_next_at or math.inf)
        else:
            _require_whole(optimizer)
            self.otherwise(optimizer, clip_val, gradient_clip_algorithm)


def _require_whole(optimizer: MatrixOptimizer) -> None:
    if optimizer.backward != "whole":
        raise UserError(
            f"backward={optimizer.backward!r} keeps only coordinates of the gradient, which can only be clipped by "
            "norm; set trainer.gradient_clip_algorithm=norm, or backward='whole'"
        )
