from functools import partial

import pytest
import torch
from torch import nn

from lightspan.backbones.vision import MLP, LeNet
from lightspan.callbacks.training.intrinsic_dimension import IntrinsicDimension
from lightspan.config.build import build
from lightspan.config.resolve import resolve
from lightspan.errors import UserError
from lightspan.methods.supervised.classifier import Classifier
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
