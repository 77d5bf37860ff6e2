"""How good are the features so far? Measured while a model trains, without affecting its training.

Shapes: N bank rows, M validation rows, D features.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightspan.analysis.knn import knn_accuracy
from lightspan.analysis.linear_probe import linear_probe_accuracy
from lightspan.analysis.spectra import effective_rank, singular_values
from lightspan.callbacks.watching.detached import detached, features_of, of_all_ranks
from lightspan.errors import UserError


class OnlineProbes(Callback):
    """Logs probe/knn_accuracy, probe/linear_accuracy and probe/effective_rank every few epochs and after the last.

    For any LightningModule with `features(batch)` -> float [B D] and any datamodule whose `bank_dataloader()` and
    `val_dataloader()` yield mappings with "label" and "index" (`ImageBatch`). Probes are fitted on the bank (training
    samples, no augmentation) and scored on the validation samples; the effective rank is that of the centred
    validation features, in [1, min(M - 1, D)].

    Detached: features are taken in evaluation mode without gradients, from its own loaders; the mode of every
    submodule and the state of every random generator are restored. Weights, buffers and optimiser are bit for bit what
    they would be without it.

    With several ranks, each encodes the samples of its loaders; features are then gathered, put in the order of
    "index" without repeats, so all ranks log the same numbers as a single rank would. The weights must be whole on
    every rank (one device, DDP). `lightspan validate` logs the same.

    Args:
        knn_k: neighbours of the kNN probe.
        knn_temperature: of the votes, as in `knn_accuracy`; None for equal votes.
        linear: also fit the linear probe, which takes longer.
        linear_l2: its penalty, as in `fit_linear_probe`.
        every_n_epochs: >= 1.
    """

    alters_training = False  # see config.identity

    def __init__(
        self,
        knn_k: int = 20,
        knn_temperature: float | None = 0.07,
        linear: bool = True,
        linear_l2: float = 1.0,
        every_n_epochs: int = 1,
    ) -> None:
        if knn_k < 1:
            raise UserError(f"knn_k={knn_k}: a vote needs at least 1 neighbour")
        if every_n_epochs < 1:
            raise UserError(
                f"every_n_epochs={every_n_epochs} must be at least 1; to switch the probes off, set them to null"
            )
        self.knn_k, self.knn_temperature = knn_k, knn_temperature
        self.linear, self.linear_l2 = linear, linear_l2
        self.every_n_epochs = every_n_epochs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not callable(getattr(pl_module, "features", None)):
            raise UserError(
                f"{type(pl_module).__name__} has no features(batch), which OnlineProbes reads; add a method that "
                "returns float [B D], or remove the callback"
            )
        for name in ("bank_dataloader", "val_dataloader"):
            if not callable(getattr(trainer.datamodule, name, None)):  # type: ignore[attr-defined]
                raise UserError(
                    f"OnlineProbes reads {name}() of the datamodule, but "
                    f"{type(trainer.datamodule).__name__ if trainer.datamodule else 'this run'} has none; "  # type: ignore[attr-defined]
                    "train with a datamodule that has it, or remove the callback"
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # One batch of each before the first step, so that what cannot work fails now and not after an epoch.
        with detached(pl_module):
            for name in ("bank_dataloader", "val_dataloader"):
                loader, encoded = getattr(trainer.datamodule, name)(), False  # type: ignore[attr-defined]
                for _ in _encoded(trainer, pl_module, loader):
                    encoded = True
                    break
                if not encoded:
                    raise UserError(
                        f"OnlineProbes reads {name}() of the datamodule, which gives no batch; give it samples (with "
                        "shards: data.init_args.val_shards), or remove the callback"
                    )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epochs = trainer.current_epoch + 1
        last = epochs == trainer.max_epochs or trainer.should_stop or 0 < trainer.max_steps <= trainer.global_step
        if last or epochs % self.every_n_epochs == 0:
            self._probe(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._probe(trainer, pl_module)

    def _probe(self, trainer: Trainer, pl_module: LightningModule) -> None:
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        with detached(pl_module):
            bank_ND, bank_labels_N = _features(trainer, pl_module, datamodule.bank_dataloader)
            val_MD, val_labels_M = _features(trainer, pl_module, datamodule.val_dataloader)
            sides = (bank_ND, bank_labels_N, val_MD, val_labels_M)
            metrics = {
                "probe/knn_accuracy": knn_accuracy(*sides, k=self.knn_k, temperature=self.knn_temperature),
                "probe/effective_rank": effective_rank(singular_values(val_MD, center=True)).item(),
            }
            if self.linear:
                metrics["probe/linear_accuracy"] = linear_probe_accuracy(*sides, l2=self.linear_l2)
        pl_module.log_dict(metrics, batch_size=1, sync_dist=trainer.world_size > 1)


def _encoded(
    trainer: Trainer, module: LightningModule, loader: Iterable[Any]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(features [B D], label [B], index [B]) of each batch."""
    for batch in loader:
        batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), module.device)
        features_BD = features_of(trainer, module, batch)
        missing = [name for name in ("label", "index") if name not in batch]
        if missing:
            raise UserError(f"a batch for the probes has no {' and no '.join(missing)}: it contains {sorted(batch)}")
        yield features_BD, batch["label"], batch["index"]


def _features(
    trainer: Trainer, module: LightningModule, make_loader: Callable[[], Iterable[Any]]
) -> tuple[Tensor, Tensor]:
    """(features [N D], labels [N]) of all ranks' samples, in the order of their index, each once."""
    columns = [torch.cat(parts) for parts in zip(*_encoded(trainer, module, make_loader()), strict=True)]
    features_ND, labels_N = of_all_ranks(trainer, columns[:2], columns[2])
    return features_ND, labels_N
