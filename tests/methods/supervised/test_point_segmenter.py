"""PointSegmenter: the loss over known points, its scores, clouds of any size, transfer, and what it refuses."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_cases import labelled_clouds
from method_runs import fit
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_jaccard_index

from lightspan.backbones.sparse_unet import SparseUNet
from lightspan.backbones.swin3d import Swin3D, Swin3DEncoder
from lightspan.backbones.voxel_points import VoxelPoints
from lightspan.core.errors import UserError
from lightspan.methods.supervised.point_segmenter import PointSegmenter

ADAM = partial(torch.optim.AdamW, lr=1e-2)


def method(hidden: int | None = 5, **settings: Any) -> PointSegmenter:
    torch.manual_seed(0)
    encoder = Swin3DEncoder(
        widths=(4, 6), depths=(2, 1), heads=(2, 2), windows=(2, 2), strides=(2,), neighbours=3, drop_path=0.0
    )
    return PointSegmenter(VoxelPoints(Swin3D(encoder), 0.2), 3, hidden=hidden, **{"optimizer": ADAM} | settings)


def loss_of(model: PointSegmenter, given: dict[str, Any]) -> Tensor:
    model.log_training = lambda figures, **options: None  # type: ignore[method-assign]
    return model.training_step(given, 0)


def test_the_loss_is_the_cross_entropy_of_points_whose_class_is_known() -> None:
    model, given = method().eval(), labelled_clouds(6, 0)
    expected = F.cross_entropy(model(given), given["classes"], ignore_index=-1)
    torch.testing.assert_close(loss_of(model, given), expected)
    unknown = given | {"classes": torch.full_like(given["classes"], -1)}
    loss = loss_of(method(), unknown)
    loss.backward()
    assert loss == 0


def test_scores_are_those_of_all_points_of_an_epoch_together() -> None:
    model, logged = method().eval(), dict[str, float]()
    model.log = lambda name, value, **options: None  # type: ignore[method-assign]
    model.log_dict = lambda figures, **options: logged.update(figures)  # type: ignore[method-assign]
    guesses, truths = [], []
    for seed in range(3):
        given = labelled_clouds(4, seed)
        model.validation_step(given, 0)
        guesses.append(model(given).argmax(1))
        truths.append(given["classes"])
    model.on_validation_epoch_end()
    guess, truth = torch.cat(guesses), torch.cat(truths)
    expected = multiclass_jaccard_index(guess, truth, 3, average="none", ignore_index=-1)
    there = torch.tensor([((guess == k) | (truth == k))[truth >= 0].any() for k in range(3)])
    assert logged["val/iou"] == pytest.approx(float(expected[there].mean()))
    assert logged["val/accuracy"] == pytest.approx(float((guess == truth)[truth >= 0].float().mean()))


def test_features_are_means_over_the_points_of_a_cloud() -> None:
    model, given = method().eval(), labelled_clouds(4, 0)
    each = model.point_features(given).split(given["offsets"].diff().tolist())
    expected = torch.stack([rows.mean(0) if len(rows) else torch.zeros(4) for rows in each])
    torch.testing.assert_close(model.features(given), expected)


def test_clouds_without_points_and_of_one_are_ordinary() -> None:
    for counts in ([0, 0, 0], [0, 1, 1]):
        points = counts[-1]
        given = {
            "xyz": torch.zeros(points, 3), "colour": torch.zeros(points, 3), "offsets": torch.tensor(counts),
            "classes": torch.zeros(points, dtype=torch.int64), "index": torch.arange(2),
        }  # fmt: skip
        for precision in (torch.float32, torch.bfloat16):
            model = method().train()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                loss = loss_of(model, given)
            loss.backward()
            assert loss.isfinite()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def coloured(seed: int) -> dict[str, Any]:
    """Points of a plane, red ones and green ones, and points above it."""
    generator = torch.Generator().manual_seed(seed)
    xyz, classes = torch.rand(240, 3, generator=generator) * 4, torch.arange(240) % 3
    xyz[:, 2] = 2.0 * (classes == 2)
    colour = torch.eye(3)[classes % 2] * 0.8 + 0.1
    return {
        "xyz": xyz,
        "colour": colour,
        "classes": classes,
        "offsets": torch.tensor([0, 240]),
        "index": torch.arange(1),
    }


def swin() -> PointSegmenter:
    return method()


def sparse_unet() -> PointSegmenter:
    torch.manual_seed(0)
    return PointSegmenter(VoxelPoints(SparseUNet(6, 8, (8, 8), (1, 1)), 0.2), 3, optimizer=ADAM)


@pytest.mark.parametrize("make", [swin, sparse_unet])
def test_it_learns_classes_of_places_and_of_colours(make: Any, tmp_path: Path) -> None:
    losses = fit(make(), [coloured(seed % 4) for seed in range(20)], tmp_path)
    assert np.mean(losses[-4:]) < 0.6 * np.mean(losses[:4])


def test_batches_and_settings_that_do_not_fit_are_refused() -> None:
    given = labelled_clouds(4, 0)
    lacking = {name: x for name, x in given.items() if name != "classes"}
    grey = {name: x for name, x in given.items() if name != "colour"}
    for make, said in (
        (lambda: loss_of(method(), lacking), "field=classes"),
        (lambda: loss_of(method(field="kinds"), given), "field=kinds"),
        (lambda: loss_of(method(), given | {"classes": given["classes"][:-1]}), "classes"),
        (lambda: loss_of(method(), given | {"classes": given["classes"].float()}), "classes"),
        (lambda: loss_of(method(), grey), "colour"),
        (lambda: loss_of(method(), given | {"colour": given["colour"][1:]}), "colour"),
        (lambda: method()._on_before_batch_transfer(given | {"classes": given["classes"] + 3}), "num_classes=3"),
        (lambda: method(hidden=0), "hidden"),
        (lambda: PointSegmenter(method().backbone, 1, optimizer=ADAM), "num_classes"),
    ):
        with pytest.raises(UserError, match=said):
            make()
