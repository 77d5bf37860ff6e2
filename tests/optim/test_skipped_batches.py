"""A `training_step` that returns None skips its batch, as Lightning documents, and nothing more."""

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightspan.callbacks.training.intrinsic_dimension import IntrinsicDimension
from lightspan.callbacks.training.subspace_projection import SubspaceProjection

EPOCHS, BATCHES = 2, 8


class Skips(lightning.LightningModule):
    """Returns None for one batch of each epoch."""

    def __init__(self, skipped: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.skipped, self.seen = nn.Linear(6, 5), skipped, []
        self.moved: list[bool] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch_idx)
        return None if batch_idx == self.skipped else self.net(batch).square().mean()

    def optimizer_step(self, *args, **kwargs):
        before = self.net.weight.detach().clone()
        super().optimizer_step(*args, **kwargs)
        self.moved.append(not torch.equal(before, self.net.weight))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.0)


def fit(skipped: int, callbacks: list, tmp_path, **options) -> tuple[list[int], int, list[bool]]:
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=EPOCHS, callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, **options,
    )  # fmt: skip
    module = Skips(skipped)
    trainer.fit(
        module, DataLoader(torch.randn(4 * BATCHES, 6, generator=torch.Generator().manual_seed(1)), batch_size=4)
    )
    return module.seen, trainer.global_step, module.moved


@pytest.mark.sample(4)
@pytest.mark.parametrize("skipped", [0, 5])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize(
    "callback",
    [
        lambda: SubspaceProjection(rank=2),
        lambda: SubspaceProjection(rank=2, residual=None, backward="projected"),
        lambda: IntrinsicDimension(dim=5),
    ],
    ids=["whole", "projected", "random subspace"],
)
def test_a_skipped_batch_costs_neither_other_batches_nor_steps(callback, clip, skipped, tmp_path) -> None:
    plain = fit(skipped, [], tmp_path, gradient_clip_val=clip)
    low = fit(skipped, [callback()], tmp_path, gradient_clip_val=clip)
    assert low == plain
    assert low[0] == list(range(BATCHES)) * EPOCHS
    assert low[2] == [i != skipped for i in range(BATCHES)] * EPOCHS
