"""The console: one line a validation, and a bar where somebody looks, both with the training loss."""

import pytest
import torch
from lightning.pytorch import LightningModule

from lightspan.callbacks.watching.progress import ProgressLine


class Silent(LightningModule):
    """Trains by a loss that it only logs, as contrastive methods do."""

    def __init__(self, loss: str) -> None:
        super().__init__()
        self.layer, self.loss = torch.nn.Linear(1, 1), loss

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.layer.weight.square().sum() * 0 + 1.25
        self.log_dict({self.loss: loss, "train/temperature": loss})
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("val/accuracy", 0.5)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("loss", ["train/loss", "train/loss_nats"])
def test_a_line_after_each_validation_has_the_training_loss_and_what_was_validated(
    loss, make_trainer, batches, capsys
) -> None:
    trainer = make_trainer(max_epochs=2, callbacks=[ProgressLine()], enable_progress_bar=True)
    trainer.fit(Silent(loss), batches(3), batches(1))
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line[1] for line in lines] == ["3", "6"]
    assert [line[4:] for line in lines] == [[loss, "1.2500", "val/accuracy", "0.5000"]] * 2


def test_the_bar_has_the_training_loss_of_a_method_that_does_not_show_it(make_trainer, batches) -> None:
    shown = list[dict]()

    class Watched(ProgressLine):
        def get_metrics(self, *arguments):
            shown.append(super().get_metrics(*arguments))
            return shown[-1]

    bar = Watched()
    bar._refresh_rate = 1  # as on a terminal
    make_trainer(max_epochs=1, callbacks=[bar], enable_progress_bar=True).fit(Silent("train/loss"), batches(3))
    assert shown[-1]["train/loss"] == 1.25
    assert "train/temperature" not in shown[-1]
