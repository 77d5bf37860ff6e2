"""Pictures in memory are those that their source reads, with its split, and serve where sets are divided."""

from pathlib import Path

import pytest
import torch
from picture_files import write_pictures

from lightspan.core.errors import UserError
from lightspan.datamodules.image.folder import ImageFolder
from lightspan.datamodules.image.in_memory import PicturesInMemory
from lightspan.datamodules.image.variants.class_stream import ClassStream


def folder(tmp_path: Path, **classes: int) -> ImageFolder:
    write_pictures(tmp_path / "in", classes or {"a": 6, "b": 6, "c": 6})
    return ImageFolder(str(tmp_path / "in"), cache_dir=str(tmp_path / "cache"), size=8, val_share=0.34)


def test_pixels_labels_and_split_are_those_of_the_source(tmp_path: Path) -> None:
    source = folder(tmp_path)
    data = PicturesInMemory(source, num_classes=3)
    data.setup()
    for mine, theirs in ((data.bank, source.bank), (data.test, source.val)):
        assert mine.data.total() == theirs.data.total()
        for number in range(theirs.data.total()):
            (image, label), (expected, known) = mine.data.read(number), theirs.data.read(number)
            assert (image == expected).all()
            assert label == known


def test_a_stream_takes_the_classes_of_a_folder_task_by_task(tmp_path: Path) -> None:
    data = ClassStream(PicturesInMemory(folder(tmp_path), num_classes=3), tasks=3, batch_size=2)
    data.setup()
    batches = list(data.train_dataloader())
    assert [batch["label"].unique().tolist() for batch in batches] == [task for task in data.tasks for _ in range(2)]
    assert batches[0]["image"].shape == (2, 3, 8, 8)
    assert batches[0]["image"].dtype == torch.float32


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="num_classes=0 must be at least 1"):
        PicturesInMemory(folder(tmp_path), num_classes=0)
    with pytest.raises(UserError, match="num_classes=2, but the pictures have 3 classes"):
        PicturesInMemory(folder(tmp_path), num_classes=2).setup()
    plain = ImageFolder(str(tmp_path / "in"), labels="none", cache_dir=str(tmp_path / "cache"), size=8)
    with pytest.raises(UserError, match="needs labelled pictures, and ImageFolder found none"):
        PicturesInMemory(plain, num_classes=3).setup()
