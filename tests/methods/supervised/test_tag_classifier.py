"""TagClassifier: torch's binary cross-entropy, over what is known, and the precision of what was learned."""

from functools import partial
from typing import Any

import pytest
import torch
from method_cases import Pooled, tagged
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.evaluation.scores.tag_precision import TagPrecision
from lightspan.methods.supervised.tag_classifier import TagClassifier


def method() -> TagClassifier:
    torch.manual_seed(0)
    return TagClassifier(Pooled(), nn.Linear(8, 3), optimizer=partial(torch.optim.SGD, lr=0.1))


def batch() -> dict[str, Any]:
    return tagged(6, 1)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_with_all_labels_the_loss_and_its_gradients_are_torchs(scale: float) -> None:
    model, given = method(), batch()
    with torch.no_grad():
        model.tagger.weight.mul_(scale)
    loss, logits_BG = model.loss(given)
    torchs = F.binary_cross_entropy_with_logits(logits_BG, given["tags"].float())
    assert torch.allclose(loss, torchs, rtol=1e-6)
    weights = [p for p in model.parameters() if p.requires_grad]
    both = (torch.autograd.grad(x, weights, retain_graph=True) for x in (loss, torchs))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*both, strict=True))


def test_tags_that_are_not_known_have_no_say() -> None:
    model, given = method(), batch()
    known = torch.tensor([[1, 1, 0]] * 5 + [[0, 0, 0]])
    loss, logits_BG = model.loss(given | {"tags": given["tags"] * known, "tags_known": known})
    assert torch.allclose(
        loss, F.binary_cross_entropy_with_logits(logits_BG[:5, :2], given["tags"][:5, :2].float()), rtol=1e-6
    )
    nothing, _ = model.loss(given | {"tags_known": torch.zeros(6, 3)})
    assert nothing == 0


def test_validation_reports_the_precision_of_known_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = method().eval(), batch()
    logged: dict[str, Any] = {}
    monkeypatch.setattr(model, "log", lambda name, value, **_: logged.__setitem__(name, value))
    model.validation_step(given, 0)
    expected = TagPrecision(3)
    expected.update(model(given["image"]), given["tags"].bool(), torch.ones(6, 3, dtype=torch.bool))
    assert torch.equal(logged["val/mean_average_precision"].compute(), expected.compute())
    assert logged["val/loss_nats"] == model.loss(given)[0]


def test_features_are_those_before_the_head() -> None:
    model, given = method().eval(), batch()
    features: Tensor = model.features(given)
    assert torch.equal(model.tagger(features), model(given["image"]))


def test_bfloat16_stays_finite() -> None:
    loss, _ = method().to(torch.bfloat16).loss(batch() | {"image": batch()["image"].bfloat16()})
    assert loss.isfinite()
    assert loss.dtype == torch.float32


def test_a_head_of_another_width_and_batches_of_other_tags_are_refused() -> None:
    with pytest.raises(UserError, match="in_features"):
        TagClassifier(Pooled(), nn.Linear(9, 3), optimizer=partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(UserError, match="TagClassifier has a head of 3 tags"):
        method().loss(batch() | {"tags": torch.zeros(6, 4)})
    with pytest.raises(UserError, match="TagClassifier needs the tags"):
        method().loss({"image": batch()["image"]})
