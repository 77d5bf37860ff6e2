"""`lightspan predict`: of which samples, and which methods have no predictions."""

from functools import partial
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from lightspan.backbones.vision import MLP
from lightspan.cli.commands.evaluate import let_predict
from lightspan.core.errors import UserError
from lightspan.methods.supervised.classifier import Classifier
from lightspan.training.method import Method

BATCHES = [{"image": torch.randn(3, 1, 4, 4)}, {"image": torch.randn(2, 1, 4, 4)}]


class Data(LightningDataModule):
    """With a loader for each task, or one."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.tasks = tasks

    def test_dataloader(self) -> Any:
        loaders = [DataLoader(BATCHES[place :: self.tasks], batch_size=None) for place in range(self.tasks)]
        return loaders if self.tasks > 1 else loaders[0]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader([], batch_size=None)


def classifier() -> Classifier:
    return Classifier(MLP((1, 4, 4), (4,)), 10, optimizer=partial(torch.optim.SGD, lr=0.1))


@pytest.mark.parametrize("tasks", [1, 2])
def test_predictions_are_for_the_test_samples_in_their_order(tasks: int) -> None:
    model, data = classifier(), Data(tasks)
    let_predict(model, data)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    found = trainer.predict(model, datamodule=data)
    with torch.no_grad():
        wanted = [model.predict_step(batch, place) for place, batch in enumerate(BATCHES)]  # type: ignore[arg-type]
    assert [*map(len, found)] == [3, 2]  # type: ignore[arg-type]
    assert torch.equal(torch.cat(found), torch.cat(wanted))  # type: ignore[arg-type]


def test_what_a_data_module_says_to_predict_for_stays() -> None:
    class Told(Data):
        def predict_dataloader(self) -> str:
            return "told"

    data = Told(1)
    let_predict(classifier(), data)
    assert data.predict_dataloader() == "told"


def test_a_method_without_predictions_is_named() -> None:
    with pytest.raises(UserError, match="Method has no predict_step, so it predicts nothing"):
        let_predict(Method(optimizer=partial(torch.optim.SGD, lr=0.1)), Data(1))
