"""One line that trains any LightningModule in a random d-dimensional slice through its initial weights."""

import inspect
from functools import partial
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.optim import Optimizer

from lightspan.core.distributed import broadcast_first_rank, world_size
from lightspan.core.errors import UserError, printable
from lightspan.core.files.places import RunPath
from lightspan.core.files.runs import SUBSPACE
from lightspan.optim.convert import hand_over
from lightspan.optim.random_subspace import RandomSubspace
from lightspan.optim.subspace_file import save_subspace
from lightspan.subspaces.projections import Fastfood, ProjectionCallable
from lightspan.training.wiring.optimizers import average_in_coordinates


class IntrinsicDimension(Callback):
    """Trainer(callbacks=[IntrinsicDimension(dim=750)]): the module's optimiser updates 750 numbers, and all its weights
    follow (Li et al. 2018, arXiv 1804.08838; SAID with `layer_scales`, Aghajanyan et al. 2021, arXiv 2012.13255).

    The optimiser is replaced by `RandomSubspace` around one of its own class and settings, after Lightning has built
    it and before a checkpoint is loaded into it; its schedulers continue. Rates must suit the coordinates, 10 to
    100 times the usual ones. Weight decay acts on the full weights. Under DDP ranks exchange d numbers per step,
    unless gradients are clipped or the module has buffers.

    A checkpoint contains the coordinates, not the initial weights: a run is resumed with the same module (same
    seed or same pretrained weights), which is checked. When fitting ends, the run is written as a seed and d numbers to
    `path`, and `lightspan.optim.subspace_file.apply_subspace` makes its weights from it.

    Args:
        dim: d, layer scales included.
        projection, seed, per_tensor, layer_scales: see `lightspan.optim.random_subspace.RandomSubspace`.
        path: file for the d numbers; None means subspace.safetensors in the Trainer's default_root_dir.
    Raises: UserError when fitting starts, for several optimisers, for one that is a subspace already, under DeepSpeed.
    """

    prepares_optimizers = True  # on_fit_start does nothing else, so a plan may call it

    def __init__(
        self,
        dim: int,
        projection: ProjectionCallable = Fastfood,
        seed: int = 0,
        per_tensor: bool = False,
        layer_scales: bool = False,
        path: RunPath | None = None,
    ) -> None:
        self.make = partial(
            RandomSubspace,
            dim=dim,
            projection=projection,
            seed=seed,
            per_tensor=per_tensor,
            layer_scales=layer_scales,
        )
        self.path = path
        self._start: dict[str, Tensor] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Most strategies load weights before they build optimisers, and no hook tells in advance whether they will.
        if stage == "fit" and not trainer.strategy.restore_checkpoint_after_setup:
            self._start = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise UserError(
                "IntrinsicDimension writes whole parameters, but DeepSpeed's ZeRO divides them among its ranks; "
                "train with --config scale/fsdp2 or scale/ddp"
            )
        if len(trainer.optimizers) != 1:
            raise UserError(
                f"{type(pl_module).__name__} has {len(trainer.optimizers)} optimisers, IntrinsicDimension trains with "
                "one; return one from configure_optimizers"
            )
        old = trainer.optimizers[0]
        if isinstance(old, RandomSubspace):
            raise UserError("the module's optimiser is already a RandomSubspace; remove it or IntrinsicDimension")
        start, self._start = self._start if trainer.ckpt_path else None, None
        new = to_random_subspace(old, pl_module, self.make, start)
        for config in trainer.lr_scheduler_configs:
            hand_over(config.scheduler, new)
        trainer.strategy.optimizers = [new]
        average_in_coordinates(trainer, pl_module, new)
        _announce(new)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        assert isinstance(optimizer, RandomSubspace)
        if trainer.is_global_zero:
            save_subspace(optimizer, self.path or Path(trainer.default_root_dir) / SUBSPACE)


def to_random_subspace(
    optimizer: Optimizer, module: nn.Module, make: partial[RandomSubspace], start: dict[str, Tensor] | None = None
) -> RandomSubspace:
    """A `RandomSubspace` with the groups of `optimizer`, around an optimiser of its class and settings.

    Args:
        make: binds all of RandomSubspace but `params` and `inner`.
        start: initial weights by name, if the module has already been trained.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    first = optimizer.param_groups[0]
    taken = inspect.signature(type(optimizer)).parameters
    settings = {key: first[key] for key in optimizer.defaults if key in taken and key != "weight_decay"}
    groups = [
        {**group, "params": [(names.get(id(p), ""), p) for p in group["params"]]} for group in optimizer.param_groups
    ]
    for group in groups:
        group.pop("param_names", None)
    theta_0 = None
    if start is not None and start.keys() >= set(names.values()):
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        theta_0 = [start[names[id(p)]].to(device=p.device, dtype=p.dtype) for p in trained]
        if world_size() > 1:
            broadcast_first_rank(theta_0)  # as DDP did with the weights themselves
    return make(groups, partial(type(optimizer), **settings), start=theta_0)


@rank_zero_only
def _announce(optimizer: RandomSubspace) -> None:
    moved = optimizer.slice
    d, scales, weights = moved.projection.dim, moved.scales_count, moved.projection.size
    scaled = f" and {scales} layer scales" if scales else ""
    print(
        printable(
            f"IntrinsicDimension: {d:,} coordinates{scaled} move {weights:,} weights, one number for "
            f"{weights / (d + scales):.0f}"
        )
    )
