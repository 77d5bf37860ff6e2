"""A proof runs the first steps of the recipe, not a shortened recipe."""

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightspan.callbacks.proof import StopAfter
from lightspan.method import Method
from lightspan.optim.schedules import WarmupCosine


class Scheduled(Method):
    def __init__(self) -> None:
        super().__init__(lambda groups: torch.optim.SGD(groups, lr=1.0), WarmupCosine)
        self.net = nn.Linear(3, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.net(batch).square().mean()


def test_a_run_stops_early_with_a_schedule_of_its_full_length(tmp_path):
    module = Scheduled()
    trainer = Trainer(
        accelerator="cpu", max_steps=100, callbacks=[StopAfter(3)], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.randn(4, 3)))
    assert trainer.global_step == 3
    assert module.lr_schedulers().total_steps == 100
    assert module.lr_schedulers().get_last_lr()[0] == 4 / 11
