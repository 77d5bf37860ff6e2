"""The numbers of a batch's images: no step reads them back from the device, be it one that has no values at all."""

import contextlib
import importlib
from pathlib import Path
from typing import Any

import method_runs
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightspan.nn.image_numbers import image_numbers
from lightspan.nn.pretext import Jigsaw
from lightspan.training.method import Method

META = torch.device("meta")
DRAWING: dict[str, dict[str, Any]] = {
    "masked.mae": {}, "masked.cae": {"codes": None}, "masked.croco": {}, "masked.cropmae": {}, "masked.i_jepa": {},
    "distillation.dinov2": {}, "distillation.ibot": {}, "distillation.mmc": {}, "distillation.poa": {},
    "contrastive.supremix": {"most_pairs": 9},
}  # fmt: skip


class Plain(Method):
    def __init__(self) -> None:
        super().__init__(torch.optim.SGD)
        self.layer = nn.Linear(1, 1)


def sent(model: Method, batch: dict[str, Any]) -> dict[str, Any]:
    """As a Trainer sends it."""
    return model._apply_batch_transfer_handler(model._on_before_batch_transfer(batch), META)


def made(name: str) -> tuple[Any, dict[str, Any]]:
    """A small method and a batch from its own tests."""
    family, _, own = name.partition(".")
    tests = importlib.import_module(f"tests.methods.{family}.test_{own}")
    return tests.method(**DRAWING[name]), getattr(tests, "batch", method_runs.batch)()


@pytest.mark.parametrize("name", DRAWING)
def test_each_step_draws_anew_for_each_image(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (model, given), drawn, generator = made(name), list[tuple[int, tuple[int, ...]]](), np.random.default_rng
    images = given["index"].tolist()

    def watched(seed: Any = None) -> np.random.Generator:
        if isinstance(seed, tuple) and len(seed) >= 4 and seed[2] in images:  # (seed, step, image, view, ...)
            drawn.append((model.global_step, seed))
        return generator(seed)

    monkeypatch.setattr(np.random, "default_rng", watched)
    method_runs.fit(model, [given] * 2, tmp_path)
    assert all(seed[1] == step for step, seed in drawn)
    assert {(step, seed[2]) for step, seed in drawn} == {(step, image) for step in range(2) for image in images}


@pytest.mark.parametrize("name", DRAWING)
def test_a_step_runs_where_nothing_can_be_read_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *given, **options: contextlib.nullcontext())  # which "meta" lacks
    model, given = made(name)
    model.to(META).log_training = lambda *given, **options: None
    batch = sent(model, given)
    assert batch.keys() == given.keys()
    assert all(view.is_meta for view in batch["views"])
    loss = model.training_step(batch, 0)
    assert loss.is_meta
    with pytest.raises((NotImplementedError, RuntimeError)):
        model.training_step(
            batch | {"index": batch["index"].clone()}, 0
        )  # without the host's: else it would say nothing


def test_they_are_those_of_the_loader() -> None:
    given = {"index": torch.tensor([7, 3])}
    index_B = sent(Plain(), given)["index"]
    assert index_B.is_meta
    assert image_numbers(index_B) == [7, 3]
    expected = Jigsaw(4, permutations=9).drawn(given["index"], step=2)
    assert torch.equal(Jigsaw(4, permutations=9).drawn(index_B, step=2), expected)


@pytest.mark.parametrize("batch", [[torch.zeros(2)], {"image": torch.zeros(2, 1)}, {"index": [1, 2]}])
def test_batches_without_numbers_of_images_go_as_they_are(batch: Any) -> None:
    moved = sent(Plain(), batch)
    tensors = [part for part in (moved.values() if isinstance(moved, dict) else moved) if isinstance(part, Tensor)]
    assert all(tensor.is_meta for tensor in tensors)


def test_a_batch_that_stays_on_the_host_is_read_there() -> None:
    given = {"index": torch.tensor([7, 3])}
    moved = Plain()._apply_batch_transfer_handler(given, torch.device("cpu"))
    assert image_numbers(moved["index"]) == [7, 3]
