"""How many dimensions a run uses while it trains: of its gradients, its weights and its features.

Shapes: B matrices of one size, M rows (longer side), N columns (shorter side), m rows of this rank, S singular values,
D features.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from lightspan.callbacks.watching.detached import detached, features_of, index_of, of_all_ranks
from lightspan.core.errors import UserError
from lightspan.core.patterns import matches, require_matches
from lightspan.core.sharded import Ranks
from lightspan.evaluation.geometry.dimension import two_nn_fit
from lightspan.evaluation.geometry.spectra import (
    centred,
    effective_rank,
    energy_shares,
    gram_singular_values,
    leading_energy,
    participation_ratio,
    stable_rank,
)
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.matrices.shapes import canonical, canonical_gradient, shards_of

MEASURES = ("effective_rank", "stable_rank", "top_energy")
GRAM_NUMBERS = 2**25
"""The most numbers in Grams that are decomposed together: 256 MiB in float64."""

Key = tuple[str, str]
"""("gradient" or "weight", name of the parameter)."""


class DimensionTracker(Callback):
    """Logs the dimensions of gradients and weights every few steps, those of features with every validation.

    For any LightningModule. Of the gradient and the weight (KIND) of every trained parameter with two or more axes that
    `match` names (convolutions as out x rest):

    - dimension/KIND_effective_rank, dimension/KIND_stable_rank, dimension/KIND_top_energy (share of the energy in the
      `rank` strongest directions): means over the parameters, and the same with /NAME for each.
    - spectrum/KIND/I: share of the energy in direction I, mean over the parameters.

    With every validation, if the module has `features(batch)` -> [B D], of up to `samples` validation samples:
    dimension/features_two_nn (`two_nn_fit`; NaN where features have collapsed or are not finite),
    dimension/features_participation_ratio of the centred features, and their spectrum/features/I. `lightspan report`
    plots all of it.

    Gradients are those that the optimiser gets, before the Trainer clips them, so under DDP they are the means over all
    ranks. Under FSDP2 the Grams [N N] of the ranks' rows are summed; no matrix is gathered. Grams are formed in
    float64, the decomposition of one costs N^3, and figures leave the device in one transfer. Training is not affected:
    weights, moments and random states are bit for bit the same as without it.

    Args:
        every_n_steps: optimiser steps between two measurements, >= 1.
        match: shell-style patterns of parameter names; None for all.
        rank: of the share of energy, >= 1; the rank that you would give a low-rank optimiser.
        spectrum: leading values of each spectrum that are logged, >= 0.
        samples: validation samples over all ranks, >= 0; 0 measures no features.
    Raises: UserError when fitting starts, for a pattern without a match, and if no rank sees whole gradients:
    DeepSpeed, and LowRank with another backward than "whole".
    """

    alters_training = False  # see config.identity

    def __init__(
        self,
        every_n_steps: int = 50,
        match: list[str] | None = None,
        rank: int = 8,
        spectrum: int = 16,
        samples: int = 1024,
    ) -> None:
        for name, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("rank", rank, 1),
            ("spectrum", spectrum, 0),
            ("samples", samples, 0),
        ):
            if value < least:
                raise UserError(f"DimensionTracker {name}={value} must be at least {least}")
        self.every_n_steps, self.match, self.rank = every_n_steps, match or ["*"], rank
        self.spectrum, self.samples = spectrum, samples
        self._seen: list[tuple[Tensor, Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise UserError(
                "DimensionTracker reads whole gradients, but DeepSpeed's ZeRO gives each rank a flat part of them; "
                "train with --config scale/ddp or scale/fsdp2, or remove the callback"
            )
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, LowRank) and optimizer.backward != "whole":
                raise UserError(
                    f"DimensionTracker reads whole gradients, but LowRank(backward={optimizer.backward!r}) keeps only "
                    "their coordinates; set backward='whole', or remove the callback"
                )
        names = [name for name, p in pl_module.named_parameters() if p.requires_grad and p.ndim > 1]
        require_matches(self.match, names, f"trained matrix of {type(pl_module).__name__}")

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if (trainer.global_step + 1) % self.every_n_steps:
            return
        found = self._of_matrices(pl_module)
        means = {name: value for name, value in found.items() if name.count("/") == 1}
        pl_module.log_dict(means, logger=False)
        _log(trainer, found, trainer.global_step)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        rows = sum(len(features) for features, _ in self._seen)
        if dataloader_idx or rows * trainer.world_size >= self.samples or not hasattr(pl_module, "features"):
            return
        with detached(pl_module):
            features_BD = features_of(trainer, pl_module, batch)
        index_B = index_of(trainer, batch, len(features_BD), rows).to(features_BD.device)
        self._seen.append((features_BD, index_B))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._seen or trainer.sanity_checking:
            return
        features_BD, index_B = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        (features_ND,) = of_all_ranks(trainer, [features_BD], index_B)
        metrics, shares = self._of_features(features_ND[: self.samples])
        pl_module.log_dict(metrics, batch_size=1, sync_dist=trainer.world_size > 1)
        _log(trainer, shares, max(0, trainer.global_step - 1))  # the line of the step that validation followed

    def _of_matrices(self, module: nn.Module) -> dict[str, float]:
        weights = {
            name: p
            for name, p in module.named_parameters()
            if p.requires_grad and p.ndim > 1 and matches(name, self.match)
        }
        parts = {("weight", name): (canonical(p), p) for name, p in weights.items()}
        parts |= {
            ("gradient", name): (canonical_gradient(p.grad, p), p) for name, p in weights.items() if p.grad is not None
        }
        found: dict[str, float] = {}
        rows = self._rows(parts)
        for kind in ("gradient", "weight"):
            own = {name: row for (of, name), row in rows.items() if of == kind}
            means = [sum(column) / len(own) for column in zip(*own.values(), strict=True)]
            found |= {f"dimension/{kind}_{what}": mean for what, mean in zip(MEASURES, means, strict=False)}
            found |= {
                f"dimension/{kind}_{what}/{name}": value
                for name, row in own.items()
                for what, value in zip(MEASURES, row, strict=False)
            }
            found |= {f"spectrum/{kind}/{i}": mean for i, mean in enumerate(means[len(MEASURES) :])}
        return found

    def _rows(self, parts: Mapping[Key, tuple[Tensor, Tensor]]) -> dict[Key, list[float]]:
        """MEASURES and leading energies of whole matrices, from this rank's rows [m N] of each and its parameter."""
        alike: dict[tuple[int, Ranks | None], list[Key]] = {}
        for key, (rows_mN, parameter) in parts.items():
            shards = shards_of(parameter)
            alike.setdefault((rows_mN.shape[1], shards.ranks if shards else None), []).append(key)
        keys, tables = [], []
        for (size, ranks), members in alike.items():
            step = max(1, GRAM_NUMBERS // size**2)
            for start in range(0, len(members), step):
                some = members[start : start + step]
                wide = (parts[key][0].detach().double() for key in some)
                gram_BNN = torch.stack([rows_mN.mT @ rows_mN for rows_mN in wide])
                tables.append(self._table(gram_BNN if ranks is None else ranks.total(gram_BNN)))
                keys += some
        return dict(zip(keys, torch.cat(tables).tolist(), strict=True))  # one transfer for any number of parameters

    def _table(self, gram_BNN: Tensor) -> Tensor:
        values_BS = gram_singular_values(gram_BNN)
        measures = [effective_rank(values_BS), stable_rank(values_BS), leading_energy(values_BS, self.rank)]
        shares = energy_shares(values_BS)[:, : self.spectrum]
        padded = nn.functional.pad(shares, (0, self.spectrum - shares.shape[1]))  # what is missing has no energy
        return torch.cat((torch.stack(measures, dim=1), padded), dim=1)

    def _of_features(self, features_ND: Tensor) -> tuple[dict[str, float], dict[str, float]]:
        centred_ND = centred(features_ND.double())
        tall = len(centred_ND) >= centred_ND.shape[1]
        values_S = gram_singular_values(centred_ND.mT @ centred_ND if tall else centred_ND @ centred_ND.mT)
        try:
            two_nn = two_nn_fit(features_ND).item()
        except UserError:  # a run continues with features that have collapsed; its figures show it
            two_nn = math.nan
        metrics = {"two_nn": two_nn, "participation_ratio": participation_ratio(values_S).item()}
        shares = energy_shares(values_S)[: self.spectrum].tolist()
        return (
            {f"dimension/features_{what}": value for what, value in metrics.items()},
            {f"spectrum/features/{i}": share for i, share in enumerate(shares)},
        )


def _log(trainer: Trainer, values: dict[str, float], step: int) -> None:
    """Only to the loggers: a figure for each matrix would swamp the summary of a run."""
    for logger in trainer.loggers:
        logger.log_metrics(values, step=step)
