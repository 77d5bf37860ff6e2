"""How good are the features so far? Measured while a model trains, without affecting its training."""

from collections.abc import Iterable
from itertools import product
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from lightspan.callbacks.watching.detached import detached, ends_with_epoch, log_now
from lightspan.callbacks.watching.encoding import Columns, Encoding
from lightspan.callbacks.watching.run_warnings import warn
from lightspan.core.errors import UserError, print_notes
from lightspan.evaluation.geometry.spectra import effective_rank, singular_values
from lightspan.evaluation.labels import kind_of
from lightspan.evaluation.probes.probes import KNN, LinearProbe, Probe
from lightspan.nn.labels import require_labelled


class OnlineProbes(Callback):
    """Logs probe/NAME_SCORE of each probe, and probe/effective_rank, every few epochs or steps and after the last.

    For any LightningModule with `features(batch)` -> float [B D] and any datamodule whose `bank_dataloader()` and
    `val_dataloader()` yield mappings with "index" and what the probes read: "label" (`ImageBatch`), or fields that a
    probe names (`lightspan.evaluation.dense.dense_probes`). Probes are fitted on the bank (training samples, no
    augmentation) and scored on the validation samples. Labels are classes, tags or numbers by their dtype
    (`lightspan.evaluation.labels.kind_of`), and so scores are accuracy, mean_average_precision, or r2 and mae. A probe
    that is given several settings chooses on the bank, mostly on a fifth of it, never by what it reports, and what it
    chose is logged as probe/NAME_SETTING. Where all samples have one class, a probe of it has no score,
    and a note says so. The effective rank is that of the centred validation features, in [1, min(M -
    1, D)] for M of them.

    Detached: features are taken in evaluation mode without gradients, from its own loaders; the mode of every
    submodule and the state of every random generator are restored. Weights, buffers, optimiser and the order of the
    data are bit for bit what they would be without it, also if it runs within an epoch.

    With several ranks (DDP, FSDP2), each encodes the samples of its loaders; features are then gathered and put in the
    order of "index" without repeats, so all ranks log the same numbers as a single rank would. `lightspan validate`
    logs the same.

    Args:
        probes: by the name under which each logs; None is KNN() as knn and LinearProbe() as linear. One that reads
            tokens, such as AttentiveProbe, needs a module with `token_features` (`Method` has it), and memory for all
            tokens of the bank.
        layers: read these instead of `features`, each as its tokens' mean, and log with /layer_L behind the name;
            counted as in `lightspan.nn.tokens`. Without them, tokens are the last layer's.
        every_n_epochs: >= 1.
        every_n_steps: optimiser steps between two measurements, >= 1, instead of epochs.
        bank_samples, val_samples: so many of the bank or the validation samples, evenly spaced, instead of all; >= 1.
            For this the loader needs `some(count)`, as lightspan's have.
    Raises: UserError for settings out of range, and before the first step for a module or datamodule without what is
        read, for data that have found no labels where a probe reads them, or labels of no known kind.
    """

    alters_training = False  # see config.identity

    def __init__(
        self,
        probes: dict[str, Probe] | None = None,
        layers: list[int] | None = None,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        bank_samples: int | None = None,
        val_samples: int | None = None,
    ) -> None:
        for name, value in (
            ("every_n_epochs", every_n_epochs),
            ("every_n_steps", every_n_steps),
            ("bank_samples", bank_samples),
            ("val_samples", val_samples),
        ):
            if value is not None and value < 1:
                raise UserError(
                    f"OnlineProbes {name}={value} must be at least 1; to switch probes off, set them to null"
                )
        for name, empty in (("probes", probes == {}), ("layers", layers == [])):
            if empty:
                raise UserError(
                    f"OnlineProbes {name} is empty; leave it out for the usual, or set the callback to null"
                )
        self.probes = {"knn": KNN(), "linear": LinearProbe()} if probes is None else probes
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        reads = {split: _reads(self.probes.values(), split) for split in ("bank", "val")}
        self.encoding = Encoding(
            layers,
            any(probe.reads_tokens for probe in self.probes.values()),
            {"bank": bank_samples, "val": val_samples},
            {split: fields for split, fields in reads.items() if fields},
        )
        self._probed: int | None = None
        self._left_out: set[str] = set()
        self._diverged: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.encoding.require(trainer, pl_module)
        if stage == "fit" and any("label" in fields for fields in self.encoding.fields.values()):
            data = getattr(trainer, "datamodule", None)
            require_labelled(data, "OnlineProbes", "set these probes to null, as trainer.callbacks.probes=null")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # One batch of each before the first step, so that what cannot work fails now and not after an epoch.
        self._probed = None
        with detached(pl_module):
            for split in self.encoding.fields:
                first = self.encoding.first(trainer, pl_module, split)
                for layer, probe in product(first.layers, self.probes.values()):
                    if split == "val" or probe.reads_bank:
                        probe.require(first.of(layer, probe.reads_tokens))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.every_n_steps is None or step % self.every_n_steps or step in (0, self._probed):
            return  # the last one inside an accumulation
        log_now(trainer, self._measured(trainer, pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due = self.every_n_steps is None and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        # The end may be all that a killed run still has to do, so `_probed` does not know of this step's turn.
        had_its_turn = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if (due or ends_with_epoch(trainer)) and not had_its_turn and trainer.global_step != self._probed:
            self._log(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = self._measured(trainer, pl_module)
        pl_module.log_dict(metrics, batch_size=1, sync_dist=trainer.world_size > 1)

    def _measured(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        self._probed = trainer.global_step
        metrics: dict[str, float] = {}
        with detached(pl_module):
            splits = {split: self.encoding.all(trainer, pl_module, split) for split in self.encoding.fields}
            val = splits["val"]
            bank = splits.get("bank", val)  # no probe reads it then
            for layer in val.layers:
                end = "" if layer is None else f"/layer_{layer}"
                for name, probe in self.probes.items():
                    if (field := _told_apart_by_none(probe, bank, val)) is not None:
                        self._say_none(name, field)
                        continue
                    try:
                        found = probe.fit(bank.of(layer, probe.reads_tokens), val.of(layer, probe.reads_tokens))
                    except UserError as error:
                        if trainer.state.fn != "fit" or all(
                            _usual(one.columns[layer, probe.reads_tokens]) for one in (bank, val)
                        ):
                            raise
                        self._say_diverged(trainer, name, str(error))
                        continue
                    named = found.scores | found.chosen
                    metrics |= {f"probe/{name}_{what}{end}": float(value) for what, value in named.items()}
                rank = effective_rank(singular_values(val.of(layer).rows(), center=True))
                metrics[f"probe/effective_rank{end}"] = rank.item()
        return metrics

    def _say_none(self, name: str, field: str) -> None:
        if name not in self._left_out:
            self._left_out.add(name)
            rank_zero_only(print_notes)([f"all samples have one {field}, so the probe {name} has no score"])

    def _say_diverged(self, trainer: Trainer, name: str, why: str) -> None:
        """Whether a run ends is not for its watchers to say."""
        if name not in self._diverged:
            self._diverged.add(name)
            warn(trainer, f"OnlineProbes, step {trainer.global_step}: the probe {name} has no score: {why}")


def _usual(features: Tensor) -> bool:
    """Whether float32 holds the features and their squares."""
    return bool(features.float().square().isfinite().all())


def _told_apart_by_none(probe: Probe, bank: Columns, val: Columns) -> str | None:
    """The field that a probe reads, if it has one class in all samples: every encoder would be right of all of them."""
    for name in probe.reads:
        labels = bank.fields.get(name)
        if labels is None or labels.ndim > 1 or kind_of(labels) != "classes":
            continue
        if len(torch.cat([labels, val.fields[name].to(labels)]).unique()) == 1:
            return name
    return None


def _reads(probes: Iterable[Probe], split: str) -> tuple[str, ...]:
    """The fields of a split that some probe reads; none of the bank if no probe learns from it."""
    return tuple(dict.fromkeys(name for probe in probes if split == "val" or probe.reads_bank for name in probe.reads))
