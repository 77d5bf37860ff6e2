from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightspan.backbones.vision import MLP, LeNet
from lightspan.callbacks.training.intrinsic_dimension import IntrinsicDimension
from lightspan.cli.config.build import build
from lightspan.cli.config.resolve import resolve
from lightspan.core.errors import UserError
from lightspan.methods.supervised.classifier import Classifier
from lightspan.nn.heads.grassmann_head import GrassmannHead
from lightspan.optim.riemannian import RiemannianSGD
from lightspan.subspaces.projections import Fastfood

SGD = partial(torch.optim.SGD, lr=0.1)


def logged(model: Classifier) -> dict[str, torch.Tensor]:
    model.log_dict = lambda values, **options: model.__dict__.update(seen=values)
    return model


def batch(rows: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"image": torch.randn(rows, 1, 8, 8, generator=generator), "label": torch.arange(rows) % 3}


def test_loss_and_accuracy_are_those_of_logits_worked_by_hand() -> None:
    model = logged(Classifier(MLP((1, 8, 8), (5,)), 3, optimizer=SGD))
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([0.0, 1.0, 2.0]).log_softmax(0))
    loss = model.training_step(batch(), 0)
    expected = -torch.tensor([0.0, 1.0, 2.0]).log_softmax(0).mean()
    torch.testing.assert_close(loss, expected)
    assert model.seen["train/accuracy"] == pytest.approx(1 / 3)  # class 2 alone is ever named
    model.validation_step(batch(), 0)
    assert set(model.seen) == {"val/loss_nats", "val/accuracy"}


def test_features_are_what_the_classifier_reads() -> None:
    model = Classifier(MLP((1, 8, 8), (5,)), 3, optimizer=SGD)
    features = model.features(batch())
    assert features.shape == (6, 5)
    assert torch.equal(model.head(features), model.predict_step(batch(), 0))


def test_it_trains_on_images_or_on_one_view_of_each() -> None:
    model, given = logged(Classifier(MLP((1, 8, 8), (5,)), 3, optimizer=SGD)), batch()
    viewed = {"views": [given["image"]], "label": given["label"]}
    assert torch.equal(model.training_step(given, 0), model.training_step(viewed, 0))
    with pytest.raises(UserError, match="Classifier needs 1 view of each image, and this batch gives 2"):
        model.training_step({**viewed, "views": [given["image"]] * 2}, 0)


def test_a_head_of_the_recipe_takes_the_place_of_the_linear_one() -> None:
    head = GrassmannHead(5, 3, rank=2)
    model = Classifier(MLP((1, 8, 8), (5,)), 3, head, optimizer=SGD)
    assert torch.equal(model.predict_step(batch(), 0), head(model.features(batch())))
    with pytest.raises(UserError, match=r"head.in_features=6, but MLP gives 5"):
        Classifier(MLP((1, 8, 8), (5,)), 3, GrassmannHead(6, 3, rank=2), optimizer=SGD)
    with pytest.raises(UserError, match="GrassmannHead tells 4 classes apart, but num_classes=3"):
        Classifier(MLP((1, 8, 8), (5,)), 3, GrassmannHead(5, 4, rank=2), optimizer=SGD)


def test_frames_train_by_the_optimiser_that_keeps_them_and_by_no_other() -> None:
    def fit(optimizer: Any) -> Classifier:
        model = Classifier(MLP((1, 8, 8), (5,)), 3, GrassmannHead(5, 3, rank=2), optimizer=optimizer)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
        trainer = Trainer(max_steps=3, enable_model_summary=False, **quiet)
        trainer.fit(model, DataLoader([batch()] * 3, batch_size=None))
        return model

    frame = fit(partial(RiemannianSGD, rest=SGD)).head.frame_KFR.detach()
    torch.testing.assert_close(frame.mT @ frame, torch.eye(2).expand(3, 2, 2))
    assert not torch.equal(frame, GrassmannHead(5, 3, rank=2).frame_KFR)
    with pytest.raises(UserError, match=r"a step of SGD would not leave orthonormal.*RiemannianSGD, with SGD as its"):
        fit(SGD)


@pytest.mark.parametrize(
    ("backbone", "weights"),
    [(MLP(), 199_210), (LeNet(), 44_426), (LeNet((3, 32, 32)), 62_006), (MLP((1, 8, 8), (100, 100)), 17_610)],
)
def test_the_nets_of_the_paper_have_its_numbers_of_weights(backbone, weights) -> None:
    model = Classifier(backbone, 10, optimizer=SGD)
    assert sum(p.numel() for p in model.parameters()) == weights
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_what_cannot_be_classified_is_refused() -> None:
    with pytest.raises(UserError, match="Linear has no attribute num_features"):
        Classifier(nn.Linear(3, 3), 3, optimizer=SGD)
    with pytest.raises(UserError, match="num_classes=1 must be at least 2"):
        Classifier(MLP(), 1, optimizer=SGD)


def test_the_recipe_trains_750_numbers_and_differs_from_its_baseline_in_them_and_the_rate_alone() -> None:
    inside, direct = (resolve(f"subspace/{name}").config for name in ("intrinsic_dimension_mnist", "direct_mnist"))
    callback = inside["trainer"]["callbacks"].pop("subspace")
    assert callback["init_args"]["dim"] == 750
    for config in (inside, direct):
        config.pop("about", None)
        config["model"]["init_args"]["optimizer"]["init_args"].pop("lr")
    assert inside == direct
    built = build(resolve("subspace/intrinsic_dimension_mnist"))
    (found,) = [c for c in built.trainer.callbacks if isinstance(c, IntrinsicDimension)]
    assert isinstance(found.make.keywords["projection"](10, 2, 0), Fastfood)
    assert sum(p.numel() for p in built.model.parameters()) == 199_210
