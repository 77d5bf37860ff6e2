"""One line that turns any LightningModule's Adam into a low-rank optimiser."""

from lightning import Callback, LightningModule, Trainer

from lightspan.optim.bases import Basis
from lightspan.optim.convert import hand_over, to_low_rank
from lightspan.optim.report import print_report
from lightspan.optim.residuals import Fira


class SubspaceProjection(Callback):
    """Trainer(callbacks=[SubspaceProjection(rank=64)]): the moments of matched matrices move into a subspace of rank
    64.

    The optimisers are exchanged after Lightning has built them and before a checkpoint is loaded into them. They keep
    groups, rates, betas and weight decay, and their schedulers go on. Gradients are accumulated and clipped whole, as
    without the callback; the projection happens inside the step.

    Args:
        rank: dimension of the subspace, >= 1 and below the shorter side of at least one matched matrix.
        match: shell-style patterns of parameter names; matched parameters that are vectors or too small keep AdamW, as
            the printed table says. Leave out embeddings and the output head where you can.
        basis, residual, refresh, seed: see `lightspan.optim.low_rank.LowRank`.
    Raises: UserError when fitting starts: for a pattern without a match, a rank too large, or an optimiser other than
    Adam and AdamW.
    """

    def __init__(
        self,
        rank: int = 64,
        match: list[str] | None = None,
        basis: Basis | None = None,
        residual: Fira | None = Fira(),  # noqa: B008 - frozen
        refresh: int = 50,
        seed: int = 0,
    ) -> None:
        self.match = match or ["*"]
        self.options = {"rank": rank, "basis": basis, "residual": residual, "refresh": refresh, "seed": seed}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        low_rank = {id(old): to_low_rank(old, pl_module, self.match, **self.options) for old in trainer.optimizers}
        for config in trainer.lr_scheduler_configs:
            hand_over(config.scheduler, low_rank[id(config.scheduler.optimizer)])
        trainer.strategy.optimizers = [low_rank[id(old)] for old in trainer.optimizers]
        for optimizer in trainer.optimizers:
            print_report(optimizer)
