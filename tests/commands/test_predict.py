"""`lightspan predict`: of which samples, and which methods have no predictions."""

from functools import partial

import pytest
import torch
from lightning import Trainer

from lightspan.backbones.vision import MLP
from lightspan.commands.evaluate import _let_predict
from lightspan.datamodules.images.small import Digits
from lightspan.errors import UserError
from lightspan.method import Method
from lightspan.methods.supervised.classifier import Classifier


def classifier() -> Classifier:
    return Classifier(MLP((1, 8, 8), (4,)), 10, optimizer=partial(torch.optim.SGD, lr=0.1))


def test_predictions_are_for_the_test_samples_in_their_order() -> None:
    model = classifier()
    data = Digits(batch_size=64)
    _let_predict(model, data)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    found = torch.cat(trainer.predict(model, datamodule=data))  # type: ignore[arg-type]
    images = [batch["image"] for batch in data.test_dataloader()]
    with torch.no_grad():
        wanted = torch.cat([model.predict_step({"image": image}, 0) for image in images])  # type: ignore[typeddict-item]
    assert torch.equal(found, wanted)


def test_what_a_data_module_says_to_predict_for_stays() -> None:
    class Told(Digits):
        def predict_dataloader(self) -> str:
            return "told"

    data = Told(batch_size=64)
    _let_predict(classifier(), data)
    assert data.predict_dataloader() == "told"


def test_a_method_without_predictions_is_named() -> None:
    with pytest.raises(UserError, match="Method has no predict_step, so it predicts nothing"):
        _let_predict(Method(optimizer=partial(torch.optim.SGD, lr=0.1)), Digits(batch_size=64))
