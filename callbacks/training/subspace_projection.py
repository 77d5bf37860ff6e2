"""One line that turns any LightningModule's Adam into a low-rank optimiser."""

from collections.abc import Sequence
from typing import Literal

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer

from lightspan.core.patterns import require_patterns
from lightspan.optim.convert import hand_over, to_low_rank_where_matched
from lightspan.optim.low_rank.bases import Basis, Trigger
from lightspan.optim.low_rank.inner import Adam, Inner
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.low_rank.residuals import Fira, Residual
from lightspan.optim.matrices.limits import require_valid
from lightspan.optim.matrices.moments import Float32Moments, MomentStorage
from lightspan.training.deepspeed import ZeRO
from lightspan.training.wiring.optimizers import ExchangesOptimizers, refuse_flat_partitions, wire


class SubspaceProjection(Callback, ExchangesOptimizers):
    """Trainer(callbacks=[SubspaceProjection(rank=64)]): the moments of matched matrices move into a subspace of rank
    64.

    The optimisers are replaced after Lightning has built them and before a checkpoint is loaded into them. They keep
    their groups with every key, such as rates, betas and weight decay, and their schedulers continue. Accumulation
    works as without the callback, and what the Trainer or the module's `configure_gradient_clipping` clips by norm is
    clipped inside the step.

    Of several optimisers, those are replaced in which something is projected: `match=["gen.*"]` leaves a GAN's other
    optimiser, of any class, as it is. Groups that have their own `project` (those of `lightspan.optim.groups` do)
    obey it; `match` chooses among what it allows.

    Args:
        rank: dimension of the subspace, >= 1 and below the shorter side of at least one matched matrix.
        match: shell-style patterns of parameter names; matched parameters that are vectors or too small keep AdamW, as
            the printed table says. None: the weights that `lightspan.optim.groups` counts as matrices, so neither
            embeddings nor the output head of a language model.
        inner: the rule in coordinates; by default Adam's with steps of such a length that the rate and the decay of
            the replaced optimiser can stay, see `lightspan.optim.matrices.conventions`.
        basis, residual, moments, refresh, scale, backward, seed, offload, owners: see
            `lightspan.optim.low_rank.optimizer.LowRank`.
    Raises: UserError for a setting out of range; when fitting starts, for a pattern that matches nothing in any
        optimiser, a rank too large for all of them, or a matched optimiser other than Adam and AdamW.
    """

    prepares_optimizers = True  # on_fit_start does nothing else, so a plan may call it

    def __init__(
        self,
        rank: int = 64,
        match: list[str] | None = None,
        basis: Basis | None = None,
        residual: Residual | None = Fira(),  # noqa: B008 - frozen
        inner: Inner = Adam(convention="adamw"),  # noqa: B008 - frozen
        moments: MomentStorage = Float32Moments(),  # noqa: B008 - frozen
        refresh: int | Trigger = 50,
        scale: float = 1.0,
        backward: Literal["whole", "hooks", "projected"] = "whole",
        seed: int = 0,
        offload: bool = False,
        owners: bool = False,
    ) -> None:
        require_patterns(match or [], "SubspaceProjection match")
        own = {
            "rank": rank,
            "scale": scale,
            "backward": backward,
            "seed": seed,
            "offload": offload,
            "owners": owners,
        }
        require_valid("SubspaceProjection", own)
        self.match = match
        self.options = {
            "basis": basis,
            "residual": residual,
            "inner": inner,
            "moments": moments,
            "refresh": refresh,
            **own,
        }

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_flat_partitions(trainer.strategy, [LowRank])
        if not isinstance(trainer.strategy, ZeRO):  # which has exchanged them before its engine took them
            configs = trainer.lr_scheduler_configs
            trainer.strategy.optimizers = self.exchange_optimizers(pl_module, trainer.optimizers, configs)
        wire(trainer, pl_module, trainer.optimizers)

    def exchange_optimizers(
        self, pl_module: LightningModule, old: list[Optimizer], configs: Sequence[LRSchedulerConfig]
    ) -> list[Optimizer]:
        new = to_low_rank_where_matched(old, pl_module, self.match, **self.options)
        exchanged = {id(before): after for before, after in zip(old, new, strict=True) if after is not before}
        for config in configs:
            if id(config.scheduler.optimizer) in exchanged:
                hand_over(config.scheduler, exchanged[id(config.scheduler.optimizer)])
        return new
