"""What data modules share whose samples can be had by number: one set to train on, and others to look at in order."""

from abc import ABC, abstractmethod

from lightning import LightningDataModule

from lightspan.datamodules.loading.loader import EvaluationLoader, ExactLoader
from lightspan.datamodules.loading.order import Order
from lightspan.datamodules.loading.ranks import evaluation_loader, train_loader
from lightspan.datamodules.loading.workers import Dataset


class SampleSets(LightningDataModule, ABC):
    """Loaders of `train`, `bank` and `val`, which `setup` of a subclass makes; the first is None before.

    Attributes:
        bank: the training samples as they are, without anything random: what probes fit on.
        batch_size: samples of one optimiser step over all ranks.
        seed: of the order and of what is random in a training sample.
        num_workers: processes that fetch batches.
    """

    train: Dataset | None = None
    bank: Dataset
    val: Dataset
    batch_size: int
    seed: int
    num_workers: int

    @abstractmethod
    def setup(self, stage: str | None = None) -> None:
        """Makes the sets, once."""

    def training_order(self) -> Order | None:
        """How training samples are shuffled; None is all of them in one order."""
        return None

    def train_dataloader(self) -> ExactLoader:
        assert self.train is not None
        return train_loader(
            self.train, self.batch_size, self.seed, self.num_workers, self.trainer, self.training_order()
        )

    def bank_dataloader(self) -> EvaluationLoader:
        """The bank in order."""
        return self._evaluate(self.bank)

    def val_dataloader(self) -> EvaluationLoader:
        return self._evaluate(self.val)

    def _evaluate(self, samples: Dataset) -> EvaluationLoader:
        return evaluation_loader(samples, self.batch_size, self.num_workers, self.trainer)
