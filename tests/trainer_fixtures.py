"""A small stochastic model, a loader that resumes, and a trainer that writes nowhere but tmp_path."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

FEATURES, CLASSES = 6, 3


class Net(LightningModule):
    """Dropout and batch norm, so that both random numbers and buffers show in the weights."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(width, CLASSES)

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        return self.body(batch["image"].flatten(1))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.head(self.features(batch)), batch["label"])
        self.log("train/loss_nats", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits = self.head(self.features(batch))
        self.log("val/loss_nats", nn.functional.cross_entropy(logits, batch["label"]) + 0 * torch.rand(()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Batches:
    """`count` fixed batches an epoch, different in every epoch, with a position that a checkpoint keeps."""

    def __init__(self, count: int, size: int = 4) -> None:
        self.count, self.size, self.served = count, size, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            generator = torch.Generator().manual_seed(self.served)
            label = torch.randint(CLASSES, (self.size,), generator=generator)
            image = torch.randn(self.size, FEATURES, generator=generator) + label[:, None]
            index = torch.arange(self.size) + self.served * self.size
            self.served += 1
            yield {"image": image, "label": label, "index": index}
            if self.served % self.count == 0:
                return

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.served = state["served"]


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    def make(**options: Any) -> Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "default_root_dir": str(tmp_path),
        }
        return Trainer(**{**defaults, **options})

    return make


class Clock:
    """Stands in for the clocks of `time`: it moves only when told to, so that durations are exact."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


class Slow(Callback):
    """Takes 1 s in each batch, 7 s in each validation and 3 s in each checkpoint, by the clock above."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_before_backward(self, *args: Any) -> None:
        self.clock.advance(1)

    def on_validation_batch_start(self, *args: Any) -> None:
        self.clock.advance(7)

    def on_save_checkpoint(self, *args: Any) -> None:
        self.clock.advance(3)


@pytest.fixture
def slow(clock: Clock) -> Slow:
    return Slow(clock)


@pytest.fixture
def net() -> Callable[..., Net]:
    def make(width: int = 8) -> Net:
        torch.manual_seed(0)
        return Net(width)

    return make


@pytest.fixture
def batches() -> type[Batches]:
    return Batches
