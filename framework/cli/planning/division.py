"""How a strategy divides one training step among ranks, and what each rank still needs whole for a while."""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import nn
from torch.optim import Optimizer

from lightspan.cli.planning.step_memory import StepMemory, nbytes
from lightspan.core.blocks import blocks
from lightspan.core.errors import UserError
from lightspan.optim.matrices.matrix_optimizer import MatrixOptimizer
from lightspan.training.strategies import FSDP2
from lightspan.training.wiring.optimizers import share_steps


@dataclasses.dataclass(frozen=True)
class Division:
    """Among how many ranks each part of a step is divided; sizes in bytes on one rank.

    Attributes:
        ranks: processes that see different samples.
        weights, gradients, optimizer_state: ranks that share one copy of each; 1 if every rank has its own.
        extra: what a rank needs beside its shares at the worst moment: gathered weights, communication buffers.
        extra_name: description of that, for people.
        strategy: what divides it, if that prepares optimisers for it.
        by_matrix: how the strategy divides the step of an optimiser whose matrices stay whole; None if in the same way.
    """

    ranks: int = 1
    weights: int = 1
    gradients: int = 1
    optimizer_state: int = 1
    extra: int = 0
    extra_name: str = ""
    strategy: Strategy | None = None
    by_matrix: "Division | None" = None

    def prepare(self, optimizers: Sequence[Optimizer]) -> "Division":
        """Prepares optimisers as the strategy does, and says how it divides their step. Raises: UserError for an
        optimiser that it refuses.
        """
        share_steps(self.strategy, optimizers)
        matrices = any(isinstance(optimizer, MatrixOptimizer) for optimizer in optimizers)
        return self.by_matrix if matrices and self.by_matrix is not None else self

    def of(self, step: StepMemory) -> StepMemory:
        """A step's memory on one rank.

        What exists only for a moment (temporaries, and whatever of gradients and activations is alive at the peak) is
        not divided.
        """
        standing = step.weights + step.gradients + step.optimizer_state
        moment = max(step.peak - standing, step.activations + step.batch)
        parts = {name: -(-getattr(step, name) // getattr(self, name)) for name in _DIVIDED}
        host_state = -(-step.host_state // self.optimizer_state)
        peak = step.peak if self.whole else sum(parts.values()) + moment
        return dataclasses.replace(step, **parts, peak=peak + self.extra, host_state=host_state)

    @property
    def figures(self) -> dict[str, Any]:
        """Among how many ranks what is divided, and what a rank needs beside, by name."""
        return {name: getattr(self, name) for name in ("ranks", *_DIVIDED, "extra", "extra_name")}

    @property
    def whole(self) -> bool:
        """Whether every rank has all of it."""
        return all(getattr(self, name) == 1 for name in _DIVIDED)


_DIVIDED = ("weights", "gradients", "optimizer_state")


def strategy_of(setting: Any) -> Strategy | None:
    """The strategy that `trainer.strategy` of a recipe names, not connected to anything; None for "auto".

    Raises: UserError for a name that Lightning does not know, or a strategy whose package is missing.
    """
    if setting is None or setting == "auto":
        return None
    try:
        if isinstance(setting, str):
            return StrategyRegistry.get(setting)
        module, _, name = setting["class_path"].rpartition(".")
        return getattr(importlib.import_module(module), name)(**setting.get("init_args", {}))
    except (KeyError, ImportError) as error:
        raise UserError(f"trainer.strategy={setting!r} cannot be planned: {error}") from error


def division(strategy: Strategy | None, module: nn.Module, ranks: int, nodes: int = 1) -> Division:
    """How `strategy` divides a training step of `module` over `ranks` processes on `nodes` machines.

    Raises: UserError if it is unknown how it divides, or replicas do not divide the ranks.
    """
    weights = nbytes(module.parameters())
    gradients = nbytes(p for p in module.parameters() if p.requires_grad)
    if strategy is None or ranks == 1:
        return Division(ranks)
    if isinstance(strategy, DeepSpeedStrategy):  # before DDP, whose subclass it is
        return _zero(strategy, weights, gradients, ranks)
    if isinstance(strategy, DDPStrategy):
        views = strategy._ddp_kwargs.get("gradient_as_bucket_view", False)
        return Division(ranks, extra=0 if views else gradients, extra_name="gradient buckets of DDP")
    if isinstance(strategy, FSDP2):
        replicas = nodes if strategy.replicas == "nodes" else strategy.replicas
        if ranks % replicas:
            raise UserError(f"FSDP2 replicas={replicas} does not divide {ranks} ranks; choose a divisor")
        shards = ranks // replicas
        return Division(ranks, shards, shards, shards, _gathered(module), "blocks gathered whole")
    kind = "splits the model as its module says" if isinstance(strategy, ModelParallelStrategy) else "is unknown"
    raise UserError(
        f"{type(strategy).__name__} {kind}, so the memory of a rank cannot be planned; plan with -c scale/ddp, "
        "scale/fsdp2, scale/hsdp or scale/deepspeed_zero1 to 3"
    )


def _gathered(module: nn.Module) -> int:
    """FSDP2 keeps the root's own weights whole from forward to backward, two neighbouring blocks, one of which is
    fetched while the other runs, and the gradient of one block twice, once as it is sent.
    """
    inside = blocks(module)
    of_blocks = {id(p) for block in inside for p in block.parameters()}
    root = nbytes(p for p in module.parameters() if id(p) not in of_blocks)
    sizes = sorted((nbytes(block.parameters()) for block in inside), reverse=True)
    return root + sum(sizes[:2]) + 2 * max([root, *sizes[:1]])


def _zero(strategy: DeepSpeedStrategy, weights: int, gradients: int, ranks: int) -> Division:
    """ZeRO keeps a float32 copy of each rank's range of the weights, and one bucket of gradients in transit."""
    assert isinstance(strategy.config, dict)
    settings = strategy.config["zero_optimization"]
    stage = settings["stage"]
    bucket = min(gradients, 4 * int(settings.get("reduce_bucket_size", 0)))
    shares = ranks if stage >= 2 else 1
    under_way, name = (bucket, "gradients on their way") if stage >= 2 else (gradients, "gradients laid end to end")
    return Division(
        ranks,
        ranks if stage >= 3 else 1,
        shares,
        ranks if stage >= 1 else 1,
        weights // ranks + bucket,
        "ZeRO's own copy of its weights, and a bucket of gradients",
        strategy,
        Division(ranks, 1, shares, 1, under_way, name, strategy),  # owners' state is counted by itself
    )
