"""One linear layer, and rows to fit it to."""

import time

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightspan.core.batches import batch_type_of
from lightspan.core.collate import separated
from lightspan.training.strategies import shard


class Tiny(LightningModule):
    def __init__(self, width: int, optimizer: OptimizerCallable, layer: nn.Module | None = None) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width={width} must be at least 1")
        self.layer, self.optimizer = layer or nn.Linear(4, width), optimizer

    def configure_model(self) -> None:
        shard(self)

    def forward(self, x_B4: Tensor) -> Tensor:
        return self.layer(x_B4)

    def training_step(self, x_B4: Tensor, batch_idx: int) -> Tensor:
        loss = self(x_B4).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, x_B4: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self(x_B4).square().mean())

    test_step = validation_step

    def predict_step(self, x_B4: Tensor, batch_idx: int) -> Tensor:
        return self(x_B4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


class Means(LightningModule):
    """Fits the mean of a field of each sample to 1, whatever the samples are."""

    def __init__(self, field: str) -> None:
        super().__init__()
        self.field, self.weight = field, nn.Parameter(torch.zeros(()))

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        data = self.trainer.datamodule
        samples = separated(batch, batch_type_of(data, self.trainer.train_dataloader.dataset))
        mean_B = torch.stack([sample[self.field].to(self.weight).mean() for sample in samples])
        return (self.weight * mean_B - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Rows(LightningDataModule):
    """64 rows; `pause_s` slows every batch down, so that a test can interrupt a run."""

    def __init__(self, batch_size: int = 8, pause_s: float = 0.0) -> None:
        super().__init__()
        self.batch_size, self.pause_s = batch_size, pause_s

    def collate(self, rows: list[Tensor]) -> Tensor:
        time.sleep(self.pause_s)
        return torch.stack(rows)

    def train_dataloader(self) -> DataLoader:
        rows = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(list(rows), batch_size=self.batch_size, collate_fn=self.collate)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader
