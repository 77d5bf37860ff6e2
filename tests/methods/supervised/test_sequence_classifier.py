"""Classification of sequences: pooling, the loss, what is logged, learning."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import fit
from torch import nn
from torch.nn import functional as F

from lightspan.backbones.sequence import sequence_state_space, sequence_transformer
from lightspan.backbones.vision import MLP
from lightspan.core.errors import UserError
from lightspan.methods.supervised.sequence_classifier import SequenceClassifier

ADAM = {"optimizer": partial(torch.optim.Adam, lr=1e-2)}


def method(head: nn.Module | None = None) -> SequenceClassifier:
    torch.manual_seed(0)
    return SequenceClassifier(sequence_transformer(2, width=8, depth=1, heads=2), 3, head, **ADAM)


def values(rows: int = 9, length: int = 7) -> dict[str, Any]:
    """Sequences of class k have k spikes."""
    label = torch.arange(rows) % 3
    place = torch.stack([torch.randperm(length, generator=torch.Generator().manual_seed(row)) for row in range(rows)])
    spikes = (place < label[:, None]).float()
    return {"sequence": torch.stack([spikes, 1 - spikes], dim=2), "label": label, "index": torch.arange(rows)}


def test_features_are_the_mean_of_the_states_and_the_head_has_one_hidden_layer_of_their_width() -> None:
    model, given = method(), values()
    states = model.backbone.encode(model.backbone.embed(given["sequence"]))
    torch.testing.assert_close(model.features(given), states.mean(dim=1))
    first, relu, last = model.head.layers
    assert (first.in_features, first.out_features, type(relu), last.out_features) == (8, 8, nn.ReLU, 3)
    torch.testing.assert_close(model.predict_step(given, 0), last(first(states.mean(dim=1)).relu()))


def test_the_loss_is_the_cross_entropy_and_does_not_depend_on_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given, logged = method(), values(), dict[str, Any]()
    monkeypatch.setattr(model, "log_dict", lambda figures, batch_size, **_: logged.update(figures, size=batch_size))
    logits = model.predict_step(given, 0)
    model.validation_step(given, 0)
    model.test_step({name: field.flip(0) for name, field in given.items()}, 0)
    assert set(logged) == {"val/loss_nats", "val/accuracy", "test/loss_nats", "test/accuracy", "size"}
    torch.testing.assert_close(logged["val/loss_nats"], F.cross_entropy(logits, given["label"]))
    torch.testing.assert_close(logged["test/loss_nats"], logged["val/loss_nats"])
    assert logged["val/accuracy"] == (logits.argmax(dim=1) == given["label"]).float().mean()
    assert logged["size"] == 9


@pytest.mark.parametrize("network", [sequence_transformer, partial(sequence_state_space, states=4)])
def test_it_learns_to_count(network: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(network(2, width=16, depth=1), 3, **ADAM)
    losses = fit(model, [values(30)] * 60, tmp_path)
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SequenceClassifier(MLP((1, 8, 8), (4,)), 3, **ADAM), "needs a network for sequences, and MLP has no"),
        (lambda: SequenceClassifier(sequence_transformer(), 1, **ADAM), "num_classes=1 must"),
        (lambda: method(nn.Linear(7, 3)), "head.in_features=7, but SequenceNetwork gives 8"),
        (lambda: method(nn.Linear(8, 4)), "Linear tells 4 classes apart, but num_classes=3"),
        (lambda: method().features({"image": torch.zeros(2, 1, 8, 8)}), "reads values as sequence, and this batch"),
    ],
)
def test_parts_that_do_not_fit_are_refused(make: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()
