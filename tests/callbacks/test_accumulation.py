"""A run resumed with other micro-batches takes the same steps, on the same samples, as the straight run."""

from itertools import chain
from pathlib import Path

import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightspan.callbacks.resilience.accumulation import Accumulation
from lightspan.core.errors import UserError
from lightspan.datamodules.loading.loader import EvaluationLoader, ExactLoader
from lightspan.datamodules.loading.ranks import train_loader


class Numbers:
    def __len__(self) -> int:
        return 27

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        return {"index": torch.tensor(index)}


class Data(LightningDataModule):
    def train_dataloader(self) -> ExactLoader:
        return train_loader(Numbers(), 8, 3, 0, self.trainer)

    def val_dataloader(self) -> EvaluationLoader:
        return EvaluationLoader(Numbers(), 27)


class Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.steps: dict[int, list[int]] = {}
        self.validated: list[tuple[int, int]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.steps.setdefault(self.global_step, []).extend(batch["index"].tolist())
        return (self.weight - batch["index"].double()).square().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validated.append((self.current_epoch, self.global_step))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def fit(folder: Path, steps: int, accumulate: int, resume: Path | None = None, **more: object) -> Recorder:
    module = Recorder()
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        num_sanity_val_steps=0,
        logger=False,
        default_root_dir=folder,
        callbacks=[saver, Accumulation()],
        enable_progress_bar=False,
        enable_model_summary=False,
        **more,  # type: ignore[arg-type]
    )
    trainer.fit(module, datamodule=Data(), ckpt_path=resume, weights_only=True)
    return module


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 1), (1, 8)])
def test_steps_samples_weights_and_validations_are_those_of_the_straight_run(
    tmp_path: Path, before: int, after: int
) -> None:
    """27 samples in batches of 8 make 3 steps an epoch: every stop inside one, on its edge, and beyond."""
    straight = fit(tmp_path / "straight", 8, 2)
    fit(tmp_path, 5, before)
    for stop in range(1, 6):
        rest = fit(tmp_path / f"from-{stop}", 8, after, tmp_path / f"step={stop}.ckpt")
        assert rest.steps == {step: samples for step, samples in straight.steps.items() if step >= stop}
        assert rest.weight.item() == pytest.approx(straight.weight.item(), rel=1e-12)
        assert [seen for seen in rest.validated if seen[1] > stop] == [
            seen for seen in straight.validated if seen[1] > stop
        ]
    assert len(set(chain.from_iterable(straight.steps[step] for step in range(3)))) == 24


def test_a_limited_epoch_is_refused_since_it_would_end_elsewhere(tmp_path: Path) -> None:
    fit(tmp_path, 1, 2, limit_train_batches=4)
    with pytest.raises(UserError, match=r"data accumulate 2, but this run has 4.*trainer\.accumulate_grad_batches"):
        fit(tmp_path, 2, 4, tmp_path / "step=1.ckpt", limit_train_batches=4)
