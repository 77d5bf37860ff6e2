"""CoDyRA's schedule: gates shrink along a ladder of thresholds, and a task's end merges what is left into the weights.

Source: arXiv 2412.01004; the operators and the gated adapter are in `lightspan.adapters.codyra`.
"""

from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer

from lightspan.adapters.codyra import GatedLoRAUpdate, shrink_then_cut, soft_threshold
from lightspan.adapters.inject import adapted_layers
from lightspan.core.distributed import rank
from lightspan.core.errors import UserError
from lightspan.optim.steps import steps_taken

OPERATORS = {"soft": soft_threshold, "cut": shrink_then_cut}


def threshold(step: int, steps: int, kappa_max: float, dense: float, levels: int) -> float:
    """kappa after optimiser step `step` of `steps`: 0 for the share `dense` of them, then `levels` even steps from 0 to
    `kappa_max`, all equally long.
    """
    climbed = (step - dense * steps) / (steps - dense * steps)
    return kappa_max * min(max(int(climbed * levels), 0), levels - 1) / (levels - 1)


class RankSelection(Callback):
    """Chooses ranks of `GatedLoRA` adapters while they train: one `fit` is one task.

    After every optimiser step the gates take a proximal step outside the optimiser, whose moments do not see it. At
    the end, components whose gate is zero are removed, the others are merged into the layers' weights, and the adapters
    are reset for the next task; nothing else is stored.

    Args:
        kappa_max: last threshold, >= 0, in units of a gate. It trades new against old: 500 steps at 0.005 take 0.6 from
            every gate, more than half of the gates drawn from N(0, 1) start with.
        dense: share of the steps before any gate shrinks, in [0, 1).
        levels: steps of the ladder, >= 2.
        operator: "soft" is the paper's; "cut" that of the authors' code, with a dead zone twice as wide.
        merge: whether to merge into the weights and reset; otherwise the pruned adapters stay.
        name: of the adapters.
    Attributes:
        ranks: components kept at the end of the last fit, by layer.
    Raises: UserError when fitting starts, for a module without such adapters or a run of unknown length.
    """

    def __init__(
        self,
        kappa_max: float = 0.005,
        dense: float = 0.5,
        levels: int = 50,
        operator: Literal["soft", "cut"] = "soft",
        merge: bool = True,
        name: str = "default",
    ) -> None:
        if kappa_max < 0 or not 0 <= dense < 1 or levels < 2:
            raise UserError(
                f"RankSelection kappa_max={kappa_max} must be at least 0, dense={dense} in [0, 1), levels={levels} at "
                "least 2"
            )
        if operator not in OPERATORS:
            raise UserError(f"RankSelection operator={operator!r} must be one of {', '.join(OPERATORS)}")
        self.kappa_max, self.dense, self.levels = kappa_max, dense, levels
        self.operator, self.merge, self.name = operator, merge, name
        self.ranks: dict[str, int] = {}
        self._steps, self._taken = 0, 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._gated(pl_module):
            raise UserError(
                f"RankSelection finds no GatedLoRA adapter named {self.name!r} in {type(pl_module).__name__}; add "
                "callbacks.adaptation with spec lightspan.adapters.codyra.GatedLoRA"
            )
        for layer in self._gated(pl_module) if self.merge else ():  # found now, not at the end of the run
            adapted_layers(pl_module)[layer].require_mergeable([self.name])
        steps = trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise UserError("RankSelection needs the run's length; set trainer.max_steps or trainer.max_epochs")
        self._steps = int(steps)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._taken = sum(map(steps_taken, trainer.optimizers))

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        taken = sum(map(steps_taken, trainer.optimizers))
        if taken == self._taken:  # gradients are being accumulated, or the step was skipped
            return
        self._taken = taken
        kappa = threshold(trainer.global_step, self._steps, self.kappa_max, self.dense, self.levels)
        gates = [adapter.gate_R for adapter in self._gated(pl_module).values()]
        if kappa > 0:
            for gate_R in gates:
                gate_R.copy_(OPERATORS[self.operator](gate_R, kappa))
        kept = torch.stack([(gate_R.detach() != 0).float().mean() for gate_R in gates]).mean()
        pl_module.log_dict({"train/kappa": kappa, "train/kept_components": kept})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        gated = self._gated(pl_module)
        self.ranks = {layer: adapter.kept_rank for layer, adapter in gated.items()}
        if rank() == 0:
            self._print({layer: len(adapter.gate_R) for layer, adapter in gated.items()})
        for layer, module in adapted_layers(pl_module).items():
            if layer not in gated:
                continue
            if self.merge:
                module.write([self.name])
                gated[layer].reset()
            else:
                gated[layer].prune()

    def _gated(self, module: LightningModule) -> dict[str, GatedLoRAUpdate]:
        named = {layer: m.adapters[self.name] for layer, m in adapted_layers(module).items() if self.name in m.adapters}
        return {layer: adapter for layer, adapter in named.items() if isinstance(adapter, GatedLoRAUpdate)}

    def _print(self, before: dict[str, int]) -> None:
        from rich.table import Table

        from lightspan.core.console import SafeConsole

        table = Table(title="RankSelection: components kept", title_justify="left")
        table.add_column("layer")
        table.add_column("kept", justify="right")
        for layer, kept in self.ranks.items():
            table.add_row(layer, f"{kept} of {before[layer]}")
        SafeConsole().print(table)
