"""A small net with AdamW that knows nothing of lightspan, fitted under MaskLearning by every learner."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightspan.optim.masks.by_gradient import ByGradient
from lightspan.optim.masks.by_score import ByScore
from lightspan.optim.masks.drop_and_grow import DropAndGrow
from lightspan.optim.masks.learner import MaskLearner
from lightspan.subspaces.masks.distributions import HardConcrete
from lightspan.subspaces.masks.schedules import Linear
from lightspan.subspaces.masks.scores import Movement

ADAM = partial(torch.optim.Adam, lr=0.1)
LEARNERS: dict[str, Callable[[], MaskLearner]] = {
    "concrete": lambda: ByGradient(optimizer=ADAM),
    "hard concrete": lambda: ByGradient(HardConcrete(), Linear(1.0, 0.3), optimizer=ADAM, start=2.0),
    "the weights' own optimiser": lambda: ByGradient(),
    "magnitude": lambda: ByScore(every=3),
    "movement": lambda: ByScore(Movement(), memory=1.0, every=3),
    "drop and grow": lambda: DropAndGrow(every=3),
}
WEIGHTS = ["net.0.weight", "net.2.weight"]


class Plain(lightning.LightningModule):
    def __init__(self, optimizer: Any = torch.optim.AdamW, lr: float = 0.02, dtype: torch.dtype = torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 4))
        for p in self.parameters():
            p.data = (torch.randn(p.shape, generator=generator) * 0.3).to(dtype)
        self.make, self.losses = partial(optimizer, lr=lr), []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x.to(self.net[0].weight.dtype)), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Watch(lightning.Callback):
    """Calls a function after every batch; after MaskLearning, if it stands behind it."""

    def __init__(self, look: Callable[[lightning.Trainer, Any], None]) -> None:
        self.look = look

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *rest: Any) -> None:
        self.look(trainer, pl_module)


def loader(batch_size: int) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 10, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :4].argmax(dim=1)), batch_size=batch_size)


def fit(module: Any, callbacks: list[Any], tmp_path: Path, batch_size: int = 16, **options: Any) -> lightning.Trainer:
    resumed = {"ckpt_path": path, "weights_only": True} if (path := options.pop("ckpt_path", None)) else {}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=options.pop("max_steps", 20),
        max_epochs=-1,
        callbacks=callbacks,
        logger=options.pop("logger", False),
        enable_checkpointing=options.pop("enable_checkpointing", False),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )
    trainer.fit(module, loader(batch_size), **resumed)
    return trainer


def weights(module: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(weights(a), weights(b), atol=1e-5, rtol=1e-4)
