"""Batches that are finished where the model is: what was drawn in the workers is made there, of a whole batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning import LightningDataModule

Finish = Callable[[Mapping[str, Any]], dict[str, Any]]
"""A batch with numbers `drawn` -> the batch that they stand for."""


def finish_on_device(data: LightningDataModule, finish: Finish) -> None:
    """Lets `data` finish batches that have `drawn` when they are on the device."""
    # Not a method of the class: Lightning would take this hook away from every module that has one.
    data.on_after_batch_transfer = _Finisher(data, finish).on_after_batch_transfer  # type: ignore[method-assign]


@dataclass(frozen=True)
class _Finisher:
    data: LightningDataModule
    finish: Finish

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        trainer = self.data.trainer
        if isinstance(batch, Mapping) and "drawn" in batch:
            batch = self.finish(batch)
            batch = batch if trainer is None else trainer.precision_plugin.convert_input(batch)
        return batch if trainer is None else trainer.lightning_module.on_after_batch_transfer(batch, dataloader_idx)
