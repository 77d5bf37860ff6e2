"""A module of one's own with everything that is awkward to resume: it ends as the straight run from any checkpoint."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics import MeanMetric

from lightspan.callbacks.resilience.checkpoint import Checkpoint
from lightspan.callbacks.resilience.random_state import RandomState

AN_EPOCH, STEPS = 3, 14  # each batch takes one or two steps


class Gan(LightningModule):
    """Two optimisers by hand, of which one steps every second batch, and a schedule; a frozen part, tied weights, a
    teacher that follows, a metric over all epochs, a buffer that is not stored.
    """

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.generator = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.BatchNorm1d(6))
        self.critic = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.critic.weight
        self.teacher = nn.Linear(6, 6).requires_grad_(False)
        self.seen = MeanMetric()
        self.seen.persistent(True)
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def configure_optimizers(self):
        generator = torch.optim.AdamW(self.generator.parameters(), lr=0.01)
        critic = torch.optim.RMSprop([*self.critic.parameters(), self.tied.bias], lr=0.01)
        return [generator, critic], [torch.optim.lr_scheduler.StepLR(generator, 2)]

    def training_step(self, batch, batch_idx):
        image = batch["image"].flatten(1)
        generator, critic = self.optimizers()
        fake = self.generator(self.frozen(image))
        self._step(generator, self.critic(fake).mean() + self.teacher(fake).square().mean())
        if batch_idx % 2:
            self._step(critic, self.tied(self.critic(fake.detach())).square().mean() - self.critic(image).mean())
        self.lr_schedulers().step()
        self._follow()
        self.seen.update(fake.detach().mean())
        self.scratch += 1
        self.log("seen", self.seen.compute())

    def _step(self, optimizer, loss):
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.untoggle_optimizer(optimizer)

    def _follow(self) -> None:
        for teacher, student in zip(self.teacher.parameters(), self.critic.parameters(), strict=True):
            teacher.data.lerp_(student.data, 0.5)


@pytest.fixture
def fit(make_trainer, batches, tmp_path):
    def fit(name, steps, ckpt_path=None):
        torch.manual_seed(0)
        module = Gan()
        saver = Checkpoint(dirpath=str(tmp_path / name), every_n_train_steps=1, save_top_k=-1)
        options = {"max_steps": steps, "enable_checkpointing": True, "callbacks": [RandomState(0), saver]}
        trainer = make_trainer(**options)
        trainer.fit(module, batches(AN_EPOCH), ckpt_path=ckpt_path, weights_only=True)
        optimizers = [str(optimizer.state_dict()) for optimizer in trainer.optimizers]
        weights = {name: value.tolist() for name, value in module.state_dict().items()}
        return weights, optimizers, trainer.callback_metrics["seen"].item()

    return fit


def test_from_any_checkpoint_it_ends_as_the_straight_run(fit, tmp_path):
    straight = fit("straight", STEPS)
    checkpoints = sorted((tmp_path / "straight").glob("step=*.ckpt"))
    assert len(checkpoints) >= 9
    for path in checkpoints:
        assert fit(f"from {path.stem}", STEPS, path) == straight, path.name
