"""Predictions are drawn beside the truth, of the same samples at every validation, and change no training."""

import pytest
import torch
from lightning import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightspan.callbacks.pictures import sample_predictions
from lightspan.callbacks.pictures.sample_predictions import RIGHT, WRONG, SamplePredictions
from lightspan.core.errors import UserError


class Guesses(LightningModule):
    """Always says the class 1, with a probability of 0.75 of four."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output, self.weight = output, nn.Parameter(torch.ones(()))

    def predict_step(self, batch, batch_idx):
        return self.output.expand(len(batch["label"] if "label" in batch else batch["target"]), *self.output.shape)

    def training_step(self, batch, batch_idx):
        return self.weight.square()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


LOGITS = torch.tensor([0.0, 2.1972246, 0.0])  # softmax 1/11, 9/11, 1/11


@pytest.fixture
def drawn(monkeypatch):
    figures = []
    monkeypatch.setattr(sample_predictions, "png", lambda figure: figures.append(figure) or b"\x89PNG")
    return figures


def fit(make_trainer, module, data, callback, **options):
    make_trainer(max_steps=2, callbacks=[callback], val_check_interval=1, **options).fit(
        module, DataLoader(data, batch_size=None), DataLoader(data, batch_size=None)
    )


def test_each_picture_is_titled_with_truth_guess_and_probability(make_trainer, drawn, tmp_path):
    data = [{"image": torch.rand(3, 1, 4, 4), "label": torch.tensor([1, 0, 1])}] * 2
    fit(make_trainer, Guesses(LOGITS), data, SamplePredictions(str(tmp_path), 2, ["cat", "d$og", "cow"]))
    assert len(drawn) == 2  # one a validation
    titles = [(axis.title.get_text(), axis.title.get_color()) for axis in drawn[0].axes]
    assert titles == [("d$og\nsaid d$og 0.82", RIGHT), ("cat\nsaid d$og 0.82", WRONG)]
    assert all(len(axis.images) == 1 for axis in drawn[0].axes)
    assert (tmp_path / "predictions.png").read_bytes() == b"\x89PNG"


def test_without_pictures_the_probabilities_of_truth_and_guess_are_bars(make_trainer, drawn, tmp_path):
    data = [{"tokens": torch.ones(2, 3), "label": torch.tensor([1, 2])}] * 2
    fit(make_trainer, Guesses(LOGITS), data, SamplePredictions(str(tmp_path)))
    heights = [[round(bar.get_height(), 2) for bar in axis.patches] for axis in drawn[0].axes]
    assert heights == [[0.82, 0.82], [0.09, 0.82]]


@pytest.mark.parametrize("shape", [(), (1,)])
def test_numbers_are_points_of_truth_and_prediction(make_trainer, drawn, tmp_path, shape):
    data = [{"table": torch.rand(3, 2), "target": torch.tensor([1.0, 2.0, torch.nan])}] * 2
    fit(make_trainer, Guesses(torch.full(shape, 4.0)), data, SamplePredictions(str(tmp_path)))
    assert drawn[0].axes[0].collections[0].get_offsets().tolist() == [[1, 4], [2, 4]]


def test_training_is_the_same_with_and_without_it(make_trainer, net, batches, tmp_path):
    ends = []
    for watching in ([], [SamplePredictions(str(tmp_path))]):
        module = net()
        module.predict_step = lambda batch, batch_idx, own=module: own.head(own.features(batch))
        torch.manual_seed(1)
        trainer = make_trainer(max_steps=3, callbacks=watching, val_check_interval=1)
        trainer.fit(module, batches(3), batches(1))
        ends.append([value.clone() for value in module.state_dict().values()])
    assert all(map(torch.equal, *ends))
    assert (tmp_path / "predictions.png").exists()


@pytest.mark.parametrize(
    ("output", "batch", "message"),
    [
        (torch.ones(2, 2), {"label": torch.tensor([0])}, r"needs logits \[B, K\] or numbers \[B\], but Guesses gave"),
        (LOGITS, {"target": torch.ones(2, 2)}, r"finds no label \[B\] or target \[B\]"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make_trainer, tmp_path, output, batch, message):
    with pytest.raises(UserError, match=message):
        fit(make_trainer, Guesses(output), [batch], SamplePredictions(str(tmp_path)))


def test_a_module_that_predicts_nothing_is_refused_before_training(make_trainer, net, batches, tmp_path):
    with pytest.raises(UserError, match="Net has no predict_step"):
        make_trainer(max_steps=1, callbacks=[SamplePredictions(str(tmp_path))]).fit(net(), batches(2), batches(1))
    with pytest.raises(UserError, match="count=0"):
        SamplePredictions("folder", 0)
