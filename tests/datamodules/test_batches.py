"""Batch types say what their fields hold, and the first batch of every data module holds exactly that."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, is_typeddict

import pytest
import torch
from lightning import LightningDataModule
from picture_files import write_pictures
from shard_files import masked_shard, pair_shard, partial_shard, posed_shard, write_shards
from torch import Tensor

from lightspan import datamodules
from lightspan.backbones.tokenizers import HashedWords
from lightspan.datamodules import batches
from lightspan.datamodules.image_text.pairs import ImageTextShards
from lightspan.datamodules.image_text.partial import PartlyLabelledShards
from lightspan.datamodules.image_text.scenes import Scenes
from lightspan.datamodules.image_text.stamps import Stamps
from lightspan.datamodules.images.blank import Blank
from lightspan.datamodules.images.class_stream import ClassStream
from lightspan.datamodules.images.classes import ClassSubset
from lightspan.datamodules.images.coloured_shapes import ColouredShapes
from lightspan.datamodules.images.few_shots import FewShots
from lightspan.datamodules.images.repeated import RepeatedImages
from lightspan.datamodules.images.shapes import Shapes
from lightspan.datamodules.images.small import Digits, FashionMNIST, MNIST5k
from lightspan.datamodules.images.tasks import Derived, TaskImages
from lightspan.datamodules.images.textured_scenes import TexturedScenes
from lightspan.datamodules.images.views import MultiCrop, RandomViews, TwoViews
from lightspan.datamodules.pictures.dataset import PictureDataset
from lightspan.datamodules.pictures.folder import ImageFolder
from lightspan.datamodules.pictures.in_memory import PicturesInMemory
from lightspan.datamodules.rendered.pairs import ScenePairs
from lightspan.datamodules.rendered.persons import Persons
from lightspan.datamodules.rendered.scene_data import PosedViews, RenderedObjects, RenderedScenes, TwoDomains
from lightspan.datamodules.rendered.slices import BodySlices
from lightspan.datamodules.rendered.words import PrintedWords
from lightspan.datamodules.shards.domains import DomainShards
from lightspan.datamodules.shards.paired import PairedShards
from lightspan.datamodules.shards.posed import PosedShards
from lightspan.datamodules.shards.stream import Shards
from lightspan.datamodules.shards.tagged import TaggedShards
from lightspan.datamodules.shards.words import WordShards
from lightspan.datamodules.tables.rows import Ames, Diabetes, RowViews
from lightspan.datamodules.text.austen import Austen
from lightspan.datamodules.text.reviews import FoodReviews
from lightspan.datamodules.text.spelling import WordList
from lightspan.datamodules.text.windows import ByteText
from lightspan.errors import UserError

BATCHES = {name: kind for name, kind in vars(batches).items() if is_typeddict(kind)}
FIELD = re.compile(r"^(?P<name>\w+): (?:V tensors, )?(?P<dtype>\w+) \[(?P<shape>[^\]]*)\](?P<rest>.*)$", re.MULTILINE)


def documented(kind: type) -> dict[str, tuple[str, int]]:
    """dtype and number of axes of each field, as the docstring has it."""
    return {
        match["name"]: (match["dtype"], len(match["shape"].split(",")))
        for match in FIELD.finditer(inspect.cleandoc(kind.__doc__ or ""))
    }


class Letters:
    """Stands for a tokenizer: one token a letter, padded with 0."""

    vocab_size = 128

    def __call__(self, texts: list[str], truncation: bool, max_length: int, **options: Any) -> dict[str, Any]:
        rows = [[min(ord(letter), 127) for letter in text[:max_length]] for text in texts]
        return {
            "input_ids": [row + [0] * (max_length - len(row)) for row in rows],
            "attention_mask": [[1] * len(row) + [0] * (max_length - len(row)) for row in rows],
        }


def shards(folder: Path, **options: Any) -> Shards:
    return Shards(write_shards(folder, [5]), batch_size=4, **options)


def pictures(folder: Path, **options: Any) -> ImageFolder:
    write_pictures(folder / "in", {"a": 4, "b": 4})
    return ImageFolder(str(folder / "in"), cache_dir=str(folder / "cache"), size=8, batch_size=4, **options)


def text(folder: Path) -> ByteText:
    for name in ("one", "two"):
        (folder / f"{name}.txt").write_text("to be or not to be, " * 200)
    return ByteText([str(folder)], (".txt",), context=9, batch_size=4, val_fraction=0.5, val_windows=4)


def word_list(folder: Path) -> WordList:
    (folder / "words.txt").write_text("to\nbe\nor\nnot\nagain\n")
    return WordList(str(folder / "words.txt"), HashedWords(), length=9, val_size=1, batch_size=4)


MADE: dict[str, tuple[Callable[[Path], LightningDataModule], str]] = {
    "Digits": (lambda folder: Digits(4), "ImageBatch"),
    "Digits, two views": (lambda folder: Digits(4, TwoViews(flip=0.0)), "ViewsBatch"),
    "Digits, crops": (
        lambda folder: Digits(4, MultiCrop([RandomViews(size=8), RandomViews(count=3, size=4)])),
        "ViewsBatch",
    ),
    "FashionMNIST": (lambda folder: FashionMNIST(4), "ImageBatch"),
    "MNIST5k": (lambda folder: MNIST5k(4), "ImageBatch"),
    "Shapes": (lambda folder: Shapes(4, size=64), "ImageBatch"),
    "ClassSubset": (lambda folder: ClassSubset(Digits(), [1, 2], batch_size=4), "ImageBatch"),
    "ColouredShapes": (lambda folder: ColouredShapes(4, size=256), "ImageBatch"),
    "RepeatedImages": (lambda folder: RepeatedImages(Digits(), count=3, times=2, batch_size=4), "ImageBatch"),
    "Blank": (lambda folder: Blank(3, (3, 6, 8), 9, batch_size=4), "ImageBatch"),
    "Derived": (lambda folder: Derived(Digits(), 1, 7, batch_size=4), "ImageBatch"),
    "TaskImages": (lambda folder: TaskImages({"a": Digits(), "b": Derived(Digits(), 1)}, 4, "train"), "TasksBatch"),
    "TexturedScenes": (lambda folder: TexturedScenes(size=16, batch_size=4), "ImageBatch"),
    "FewShots": (lambda folder: FewShots(Digits(), shots=2, batch_size=4), "ImageBatch"),
    "ClassStream": (lambda folder: ClassStream(Digits(), batch_size=4), "ImageBatch"),
    "PicturesInMemory": (
        lambda folder: PicturesInMemory(pictures(folder), num_classes=2, batch_size=4),
        "ImageBatch",
    ),
    "Shards": (shards, "ImageBatch"),
    "PosedShards": (
        lambda folder: PosedShards([posed_shard(folder / "posed.tar")], columns=2, batch_size=4),
        "ViewsBatch",
    ),
    "TaggedShards": (
        lambda folder: TaggedShards(
            [partial_shard(folder / "t.tar", [{"json": "null"}] * 4)], num_tags=3, batch_size=4
        ),
        "TaggedBatch",
    ),
    "TaggedShards, two views": (
        lambda folder: TaggedShards(
            [partial_shard(folder / "t.tar", [{"json": "null"}] * 4)], num_tags=3, views=TwoViews(), batch_size=4
        ),
        "TaggedViewsBatch",
    ),
    "PairedShards": (
        lambda folder: PairedShards([posed_shard(folder / "pairs.tar", renders=2)], batch_size=4),
        "PairBatch",
    ),
    "DomainShards": (
        lambda folder: DomainShards(
            [masked_shard(folder / "s.tar", range(4))],
            [masked_shard(folder / "t.tar", [9])],
            target_masks=True,
            batch_size=4,
        ),
        "DomainsBatch",
    ),
    "WordShards": (
        lambda folder: WordShards([pair_shard(folder / "w.tar", "txt")], sides=(4, 8), batch_size=4),
        "ReadingBatch",
    ),
    "ImageTextShards": (
        lambda folder: ImageTextShards([pair_shard(folder / "p.tar", "txt")], HashedWords(), length=9, batch_size=4),
        "ImageTextBatch",
    ),
    "PartlyLabelledShards": (
        lambda folder: PartlyLabelledShards(
            [partial_shard(folder / "p.tar", [{"txt": "a"}, {"cls": "1"}, {}, {}])], HashedWords(), batch_size=4
        ),
        "PartlyLabelledBatch",
    ),
    "Scenes": (lambda folder: Scenes(tokenizer=HashedWords(), batch_size=4, size=288), "LabelledImageTextBatch"),
    "Stamps": (lambda folder: Stamps(tokenizer=HashedWords(), batch_size=4), "LabelledImageTextBatch"),
    "RenderedScenes": (lambda folder: RenderedScenes(batch_size=4), "SceneBatch"),
    "RenderedScenes, two views": (lambda folder: RenderedScenes(views=TwoViews(), batch_size=4), "SceneViewsBatch"),
    "RenderedScenes, captions": (
        lambda folder: RenderedScenes(tokenizer=HashedWords(), batch_size=4),
        "CaptionedSceneBatch",
    ),
    "TwoDomains": (lambda folder: TwoDomains(batch_size=4), "DomainsBatch"),
    "RenderedObjects": (lambda folder: RenderedObjects(size=64, batch_size=4), "ImageBatch"),
    "PosedViews": (lambda folder: PosedViews(batch_size=4), "ViewsBatch"),
    "ScenePairs": (lambda folder: ScenePairs(batch_size=4), "ScenePairBatch"),
    "Persons": (lambda folder: Persons(batch_size=4), "PersonBatch"),
    "Persons, together": (lambda folder: Persons(batch_size=4, together=3), "ViewsBatch"),
    "PrintedWords": (lambda folder: PrintedWords(batch_size=4), "WordBatch"),
    "PrintedWords, sentences": (lambda folder: PrintedWords(tokenizer=HashedWords(), batch_size=4), "SpelledWordBatch"),
    "WordList": (word_list, "SpellingBatch"),
    "BodySlices": (lambda folder: BodySlices(batch_size=4), "SliceBatch"),
    "Diabetes": (lambda folder: Diabetes(batch_size=4), "TableBatch"),
    "Diabetes, two views": (lambda folder: Diabetes(batch_size=4, views=RowViews()), "TableViewsBatch"),
    "Ames": (lambda folder: Ames(batch_size=4), "TableBatch"),
    "Shards, two views": (lambda folder: shards(folder, views=TwoViews(flip=0.0)), "ViewsBatch"),
    "ImageFolder": (lambda folder: pictures(folder), "ImageBatch"),
    "ImageFolder, two views": (lambda folder: pictures(folder, views=TwoViews()), "ViewsBatch"),
    "PictureDataset": (
        lambda folder: PictureDataset([(torch.rand(3, 9, 8), 1)] * 8, size=8, batch_size=4),  # type: ignore[arg-type]
        "ImageBatch",
    ),
    "ByteText": (text, "TextBatch"),
    "Austen": (lambda folder: Austen(context=9, batch_size=4, val_windows=4), "TextBatch"),
    "FoodReviews": (lambda folder: FoodReviews(Letters(), length=9, batch_size=4), "LabelledTextBatch"),
}


def data_modules() -> set[str]:
    found: set[str] = set()
    for info in pkgutil.walk_packages(datamodules.__path__, "lightspan.datamodules."):
        for name, kind in vars(importlib.import_module(info.name)).items():
            if inspect.isclass(kind) and issubclass(kind, LightningDataModule) and kind.__module__ == info.name:
                found |= set() if inspect.isabstract(kind) else {name}
    return found


def test_every_data_module_and_every_batch_is_held_to_it() -> None:
    assert {name.split(",")[0] for name in MADE} == data_modules()
    assert {batch for _, batch in MADE.values()} == BATCHES.keys()


@pytest.mark.parametrize("name", BATCHES)
def test_every_field_says_its_dtype_and_shape(name: str) -> None:
    fields = documented(BATCHES[name])
    assert list(fields) == list(BATCHES[name].__annotations__)
    assert all(hasattr(torch, dtype) for dtype, _ in fields.values())


@pytest.mark.parametrize("name", MADE)
def test_the_first_batch_has_the_documented_fields_and_no_others(name: str, tmp_path: Path) -> None:
    make, kind = MADE[name]
    try:
        data = make(tmp_path)
        data.prepare_data()
        data.setup("fit")
    except UserError as error:
        pytest.skip(str(error))
    batch = next(iter(data.train_dataloader()))
    fields = documented(BATCHES[kind])
    assert set(batch) == fields.keys()
    for field, (dtype, axes) in fields.items():
        values = batch[field] if isinstance(batch[field], list) else [batch[field]]
        assert values
        for value in values:
            assert isinstance(value, Tensor)
            assert (value.dtype, value.ndim, len(value)) == (getattr(torch, dtype), axes, 4)
    for image in batch.get("views", [batch[key] for key in ("image", "target_image") if key in batch]):
        assert image.isfinite().all()
        assert image.abs().max() < 30  # standardised
