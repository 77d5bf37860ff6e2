from typing import Any

import pytest
import torch
from torch import nn

from lightspan.backbones.dense import UNet
from lightspan.core.errors import UserError
from lightspan.datamodules.volume.phantoms import Phantoms
from lightspan.evaluation.dense.sliding_window import sliding_window
from lightspan.methods.supervised.segmenter import Segmenter


def method(classes: int = 3, axes: int = 3) -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(UNet(1, width=4, levels=2, axes=axes), classes, optimizer=torch.optim.SGD)


def test_dice_of_a_validation_is_that_of_all_voxels_with_a_label_together(monkeypatch: pytest.MonkeyPatch) -> None:
    built, logged = method(), {}
    monkeypatch.setattr(built, "log", lambda name, value, **_: logged.update({name: value}))
    monkeypatch.setattr(built, "log_dict", lambda values, **_: logged.update(values))
    generator = torch.Generator().manual_seed(0)
    answers, truths = [], []
    for _ in range(2):
        volume = torch.randn(2, 1, 4, 4, 4, generator=generator)
        label = torch.randint(-1, 2, (2, 4, 4, 4), generator=generator)
        built.validation_step({"volume": volume, "segmentation": label}, 0)
        answers.append(built(volume).argmax(dim=1)[label >= 0])
        truths.append(label[label >= 0])
    answer, truth = torch.cat(answers), torch.cat(truths)
    overlap = [2 * ((answer == k) & (truth == k)).sum() / ((answer == k).sum() + (truth == k).sum()) for k in range(3)]
    occur = [value for value in overlap if value.isfinite()]
    assert logged["val/dice"].compute() == pytest.approx(float(sum(occur) / len(occur)))


def test_images_with_semantic_labels_and_windows_of_large_volumes_are_segmented() -> None:
    flat = method(axes=2)
    flat.log_training = lambda *_, **__: None  # type: ignore[method-assign]
    batch: dict[str, Any] = {"image": torch.rand(2, 1, 8, 8), "semantic": torch.zeros(2, 8, 8, dtype=torch.int64)}
    assert flat.training_step(batch, 0).isfinite()
    assert sliding_window(method(), torch.rand(1, 1, 6, 10, 8), (4, 4, 4)).shape == (1, 3, 6, 10, 8)


def test_drawn_organs_are_labels_that_it_reads() -> None:
    data = Phantoms(patients=3, cuts=8, side=16, size=(8, 16, 16), batch_size=2, val_size=1)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    built = method(classes=13)
    built.log_training = lambda *_, **__: None  # type: ignore[method-assign]
    assert built.training_step(batch, 0).isfinite()


def test_missing_and_unknown_labels_are_named() -> None:
    volume = torch.rand(1, 1, 4, 4, 4)
    with pytest.raises(UserError, match="segmentation"):
        method().training_step({"volume": volume}, 0)
    with pytest.raises(UserError, match="segmentation has the class 3"):
        method()._on_before_batch_transfer({"volume": volume, "segmentation": torch.full((1, 4, 4, 4), 3)})
    with pytest.raises(UserError, match="num_features"):
        Segmenter(nn.Conv3d(1, 4, 1), 2, optimizer=torch.optim.SGD)
