"""A proxy as the paper of CLIMB has it: a small network that is trained for some steps on the mixture."""

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from lightspan.core.distributed import world_size
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.datamodules.loading.selection import DataSelection
from lightspan.evaluation.features.encoded import split_loader
from lightspan.evaluation.features.identity import data_identity, module_identity
from lightspan.selection.proxies import Losses, Proxy, TrainedOn


class LoadedBatches:
    """Batches that are loaded."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class TrainedProxy(Proxy):
    """A method that is trained on the mixture and validated on the target, of which the batches are searched by and
    reported by turns. Every proxy begins with the same weights.

    Args:
        method: any LightningModule.
        data: what is mixed, as in the inputs `features` and `samples`; it takes a `selection`.
        target: its validation batches are of the kind that the mixture is to serve. None validates on those of `data`.
        metric: that `validation_step` logs and of which less is better, such as val/loss_nats.
        steps: that a proxy is trained for, at least 1.
    Raises: UserError for steps out of range; when it is loaded on several ranks, for data without selections, or for
        fewer than two batches of the target; and when it is trained for a metric that is not logged.
    """

    def __init__(
        self,
        method: LightningModule,
        data: LightningDataModule,
        target: LightningDataModule | None = None,
        metric: str = "val/loss_nats",
        steps: int = 200,
    ) -> None:
        require_in("[1, inf)", steps=steps)
        self.method, self.data, self.target = method, data, target or data
        self.metric, self.steps = metric, steps

    def trained_on(self) -> TrainedOn:
        if world_size() > 1:
            raise UserError("TrainedProxy trains on one device, and there are several ranks; run it on one")
        if not hasattr(self.data, "selection"):
            raise UserError(
                f"{type(self.data).__name__} takes no selection, so that no mixture of it can be trained on"
            )
        bank, asked = split_loader(self.data, "bank"), split_loader(self.target, "val")
        batches = [*asked]
        if len(batches) < 2:
            raise UserError(
                f"the target of TrainedProxy has {len(batches)} validation batches, and one is searched by and another "
                "reported; give it more, or lower its batch_size"
            )
        identity = {
            "kind": "trained",
            "method": module_identity(self.method),
            "metric": self.metric,
            "steps": self.steps,
            "batch_size": getattr(self.data, "batch_size", None),
            "data": data_identity(self.data, bank),
            "target": data_identity(self.target, asked),
        }
        halves = LoadedBatches(batches[::2]), LoadedBatches(batches[1::2])
        return TrainedOn(identity, lambda selection, seed: self._losses(selection, seed, halves))

    def _losses(self, selection: DataSelection, seed: int, halves: tuple[LoadedBatches, LoadedBatches]) -> Losses:
        with isolate_rng(), tempfile.TemporaryDirectory() as folder:
            lightning.seed_everything(seed, verbose=False)
            data: Any = copy.copy(self.data)
            method = copy.deepcopy(self.method)
            data.selection, data.seed = str(Path(folder, "mixture.safetensors")), seed
            selection.write(Path(folder, "mixture.safetensors"))
            trainer = Trainer(
                max_steps=self.steps,
                max_epochs=-1,
                limit_val_batches=0,
                devices=1,
                num_nodes=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=folder,
            )
            trainer.fit(method, datamodule=data)
            trainer.limit_val_batches = 1.0
            found = [trainer.validate(method, dataloaders=half, verbose=False)[0] for half in halves]
        if self.metric not in found[0]:
            raise UserError(
                f"metric={self.metric!r} is not what {type(method).__name__} logs in validation: {', '.join(found[0])}"
            )
        return Losses(*(float(each[self.metric]) for each in found))
