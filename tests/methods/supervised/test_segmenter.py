"""Segmenter: the published loss of two classes, pixels without a class, its scores, resume, and what it refuses."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from method_runs import SILENT, fit, resumes, stays_finite
from torch import nn
from torch.nn import functional as F

from lightspan.backbones.dense import UNet
from lightspan.backbones.scanned_unet import ScannedUNet
from lightspan.core.errors import UserError
from lightspan.evaluation.dense.segmentation_scores import segmentation_scores
from lightspan.methods.supervised.segmenter import Segmenter
from lightspan.nn.class_overlap import overlap

SGD = partial(torch.optim.SGD, lr=0.1)


def method(axes: int = 2, classes: int = 3, **settings: Any) -> Segmenter:
    torch.manual_seed(0)
    network = ScannedUNet([2] * axes, 1, 8, (1, 1), (1, 1), ["snake", "diagonal"], 2, drop_path=0.0)
    return Segmenter(network, classes, **{"optimizer": SGD, **settings})


def batch(rows: int = 2, sides: tuple[int, ...] = (8, 8), seed: int = 0, classes: int = 3) -> dict[str, Any]:
    draws = torch.Generator().manual_seed(seed)
    name, labels = ("image", "semantic") if len(sides) == 2 else ("volume", "segmentation")
    return {
        name: torch.randn(rows, 1, *sides, generator=draws),
        labels: torch.randint(-1, classes, (rows, *sides), generator=draws),
        "index": torch.arange(rows),
    }


def test_of_two_classes_it_is_the_published_loss_of_their_difference() -> None:
    model = method(classes=2).eval()
    given = batch(3, classes=2)
    given["semantic"] = given["semantic"].clamp_min(0)
    losses, logits, label = model.losses(given)
    p, truth = (logits[:, 1] - logits[:, 0]).sigmoid().flatten(1), label.flatten(1).float()
    dice = (2 * (p * truth).sum(1) + 1) / (p.sum(1) + truth.sum(1) + 1)
    torch.testing.assert_close(losses["cross_entropy_nats"], F.binary_cross_entropy(p, truth))
    torch.testing.assert_close(losses["dice_loss"], 1 - dice.mean())
    weighted = method(classes=2, cross_entropy=0.4, dice=0.6).eval()
    torch.testing.assert_close(
        weighted.training_step(given, 0), 0.4 * losses["cross_entropy_nats"] + 0.6 * losses["dice_loss"]
    )


def test_pixels_without_a_class_are_not_learned() -> None:
    model, given = method().eval(), batch()
    losses, logits, label = model.losses(given)
    expected = F.cross_entropy(logits, label, ignore_index=-1)
    torch.testing.assert_close(losses["cross_entropy_nats"], expected)
    unknown = given | {"semantic": torch.full_like(given["semantic"], -1)}
    found, *_ = model.losses(unknown)
    assert found["cross_entropy_nats"].item() == 0
    model.training_step(unknown, 0).backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


def test_scores_of_counts_are_those_of_pixels() -> None:
    draws = np.random.default_rng(0)
    guess, truth = (torch.from_numpy(draws.integers(0, 4, (6, 7))) for _ in range(2))
    truth[0] = -1
    truth[truth == 3] = 0
    guess[guess == 3] = 0
    counts = torch.zeros(4, 4).long()
    for row, column in zip(truth[truth >= 0], guess[truth >= 0], strict=True):
        counts[row, column] += 1
    found = overlap(counts)
    dice = segmentation_scores(guess, truth, 4).dice
    assert np.isnan(dice[3])
    assert found["dice"].item() == pytest.approx(dice[1:3].mean())
    assert found["iou"].item() == pytest.approx((dice[1:3] / (2 - dice[1:3])).mean())
    assert overlap(counts, first=0)["iou"].item() == pytest.approx((dice[:3] / (2 - dice[:3])).mean())
    assert [each.item() for each in overlap(torch.tensor([[5, 0], [0, 0]])).values()] == [1, 1]
    assert [each.item() for each in overlap(torch.tensor([[5, 2], [0, 0]])).values()] == [0, 0]


def test_validation_logs_the_scores_of_all_its_pixels(tmp_path: Path) -> None:
    model, seen = method(), [batch(seed=seed) for seed in range(3)]
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", **SILENT)
    (logged,) = trainer.validate(model, torch.utils.data.DataLoader(seen, batch_size=None), verbose=False)
    guesses = torch.cat([model.eval()(each["image"]).argmax(dim=1) for each in seen])
    truth = torch.cat([each["semantic"] for each in seen])
    assert logged["val/dice"] == pytest.approx(segmentation_scores(guesses, truth, 3).dice[1:].mean())
    assert {"val/loss", "val/iou"} <= logged.keys()


def test_it_learns_labels_of_pixels_and_of_voxels(tmp_path: Path) -> None:
    for sides, field in (((8, 8), "semantic"), ((4, 8, 8), "segmentation")):
        model = method(len(sides), field=field, optimizer=partial(torch.optim.AdamW, lr=0.02))
        given = batch(2, sides)
        sample = given["image" if len(sides) == 2 else "volume"]
        given[field] = (sample[:, 0] > 0).long() + (sample[:, 0] > 1)
        losses = fit(model, [given] * 25, tmp_path)
        assert losses[-1] < losses[0] / 2
        assert model.features(given).shape == (2, 4)
        assert model.predict_step(given, 0).shape == (2, 3, *sides)


def test_a_run_that_resumes_ends_as_one_that_did_not_stop(tmp_path: Path) -> None:
    resumes(lambda: method(optimizer=partial(torch.optim.AdamW, lr=0.01)), [batch(seed=n) for n in range(4)], tmp_path)


def test_it_stays_finite_on_constant_pictures_one_class_and_one_row(tmp_path: Path) -> None:
    flat = batch() | {"image": torch.zeros(2, 1, 8, 8), "semantic": torch.zeros(2, 8, 8).long()}
    stays_finite(method(), [flat, batch(1), batch() | {"semantic": torch.ones(2, 8, 8).long()}], tmp_path)
    stays_finite(method(), [batch(), flat], tmp_path, precision="bf16-mixed")


def test_what_it_cannot_train_is_refused() -> None:
    with pytest.raises(UserError, match="num_classes=1"):
        method(classes=1)
    with pytest.raises(UserError, match="dice=-1"):
        method(dice=-1.0)
    with pytest.raises(UserError, match="Identity has no num_features"):
        Segmenter(nn.Identity(), 3, optimizer=SGD)
    given = batch()
    with pytest.raises(UserError, match="field=organs"):
        method(field="organs").training_step(given, 0)
    for wrong in (given["semantic"][:, :4], given["semantic"].float(), given["semantic"] > 0, given["semantic"][:1]):
        with pytest.raises(UserError, match="whole number for each pixel"):
            method().training_step(given | {"semantic": wrong}, 0)
    with pytest.raises(UserError, match="semantic has the class 3, and Segmenter num_classes=3"):
        method()._on_before_batch_transfer(given | {"semantic": given["semantic"] + 1})
    shrunk: Any = nn.Sequential(UNet(1, 4, 2), nn.AvgPool2d(2))
    shrunk.num_features = 4
    half = Segmenter(shrunk, 3, optimizer=SGD)
    with pytest.raises(UserError, match="maps of their size"):
        half.training_step(given, 0)
