"""How large gradients are, for every optimiser, in the steps that loggers record."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightspan.callbacks.watching.detached import is_logged
from lightspan.core.sharded import gradient_norm
from lightspan.optim.matrices.matrix_optimizer import MatrixOptimizer
from lightspan.optim.random_subspace import RandomSubspace


class GradientNorm(Callback):
    """Logs train/gradient_norm: the Euclidean norm of all gradients that the optimiser gets, before clipping.

    With `trainer.gradient_clip_val` the norm after clipping is the smaller of the two. Several optimisers, of manual
    optimisation, are numbered in the trainer's order: train/gradient_norm_0. Mean over ranks, sum over micro-batches
    and unscaling of 16-mixed have been done by then, and gradients that FSDP2 shards count as a whole. This
    project's optimisers of matrices have
    the norm of its gradients from the projection, so that they are not read again; of those that it keeps in
    coordinates (backward="hooks" or "projected") it is the norm inside the frames.

    Only in steps in which `trainer.log_every_n_steps` is due does it cost anything: one pass over the gradients of
    other optimisers, one small sum over ranks if they are sharded, and one number more that the logger reads.

    Nothing is logged where gradients are out of reach: under DeepSpeed, and where a `RandomSubspace` averages its few
    coordinates over ranks instead of gradients.
    """

    alters_training = False  # see config.identity

    def __init__(self) -> None:
        self._norms: dict[int, Tensor | MatrixOptimizer] = {}  # of this step, by the optimiser's number

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not is_logged(trainer) or trainer.strategy.handles_gradient_accumulation:
            return
        if isinstance(optimizer, RandomSubspace) and optimizer.averages:
            return
        number = next((n for n, one in enumerate(trainer.optimizers) if one is optimizer), 0)
        if isinstance(optimizer, MatrixOptimizer):
            optimizer.measures_norm = True
            self._norms[number] = optimizer
        else:
            self._norms[number] = gradient_norm(p for group in optimizer.param_groups for p in group["params"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        norms, self._norms = self._norms, {}
        for number, norm in norms.items():
            name = "train/gradient_norm" if len(trainer.optimizers) == 1 else f"train/gradient_norm_{number}"
            figure = norm.gradient_norm if isinstance(norm, MatrixOptimizer) else norm
            if figure is not None:
                pl_module.log(name, figure.float(), on_step=True, on_epoch=False, batch_size=1)
