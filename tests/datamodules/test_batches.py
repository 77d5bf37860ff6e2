"""Batch types declare what their fields hold, and the first batch of every data module holds exactly that."""

import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, is_typeddict

import numpy as np
import pytest
import torch
from frame_scenes import written as frames_written
from furniture_files import catalogue
from graph_files import rings
from lightning import LightningDataModule
from optional import skip_without_packages
from picture_files import write_pictures, write_tiffs
from PIL import Image
from point_files import CUBE, bricks, off, write_scans
from shard_files import (
    array_shard,
    lit_clip_shard,
    masked_shard,
    pair_shard,
    partial_shard,
    posed_shard,
    sound_shard,
    write_shards,
)

from lightspan import datamodules
from lightspan.backbones.tokenizers import HashedWords
from lightspan.core.batches import require_declared, samples_in, schema_of
from lightspan.datamodules.audio.folder import AudioFolder
from lightspan.datamodules.audio.spoken import SpokenCaptions
from lightspan.datamodules.graph.folder import GraphFolder
from lightspan.datamodules.graph.sets.datamol import DatamolTables
from lightspan.datamodules.image.augment.views import MultiCrop, RandomViews, TwoViews
from lightspan.datamodules.image.dataset import PictureDataset
from lightspan.datamodules.image.folder import ImageFolder
from lightspan.datamodules.image.in_memory import PicturesInMemory
from lightspan.datamodules.image.places import PlaceFolder
from lightspan.datamodules.image.sets.blank import Blank
from lightspan.datamodules.image.sets.classes import ClassSubset
from lightspan.datamodules.image.sets.coloured_shapes import ColouredShapes
from lightspan.datamodules.image.sets.glyphs import FontShots
from lightspan.datamodules.image.sets.shapes import Shapes
from lightspan.datamodules.image.sets.small import Digits, FashionMNIST, MNIST5k
from lightspan.datamodules.image.sets.textured_scenes import TexturedScenes
from lightspan.datamodules.image.variants.class_stream import ClassStream
from lightspan.datamodules.image.variants.few_shots import FewShots
from lightspan.datamodules.image.variants.noisy_labels import NoisyLabels
from lightspan.datamodules.image.variants.questions import YesNoTasks
from lightspan.datamodules.image.variants.repeated import RepeatedImages
from lightspan.datamodules.image.variants.tasks import Derived, TaskImages
from lightspan.datamodules.image_text.pairs import ImageTextShards
from lightspan.datamodules.image_text.partial import PartlyLabelledShards
from lightspan.datamodules.image_text.scenes import Scenes
from lightspan.datamodules.image_text.stamps import Stamps
from lightspan.datamodules.image_text.swapped_captions import SwappedCaptions
from lightspan.datamodules.multispectral.bands import Bands
from lightspan.datamodules.multispectral.folder import TiffFolder
from lightspan.datamodules.multispectral.resampling import SpectralCrops
from lightspan.datamodules.multispectral.scene import SceneBlocks
from lightspan.datamodules.multispectral.seasons import SeasonShards
from lightspan.datamodules.multispectral.shards import MultispectralShards
from lightspan.datamodules.points.augment import PointAugmentation
from lightspan.datamodules.points.folder import PointFolder
from lightspan.datamodules.points.furnished import FurnishedRooms
from lightspan.datamodules.points.labelled import LabelledScans
from lightspan.datamodules.points.rgbd import RGBDFolder
from lightspan.datamodules.points.sets.ldraw import LDrawParts
from lightspan.datamodules.points.sets.modelnet import ModelNet40
from lightspan.datamodules.points.sweeps import DrawnSweeps
from lightspan.datamodules.rendered.heads import LitHeads
from lightspan.datamodules.rendered.land import LandScenes, LandSeasons, LandSeries
from lightspan.datamodules.rendered.pairs import ScenePairs
from lightspan.datamodules.rendered.persons import Persons
from lightspan.datamodules.rendered.scene_data import PosedViews, RenderedObjects, RenderedScenes, TwoDomains
from lightspan.datamodules.rendered.slices import BodySlices
from lightspan.datamodules.rendered.speech import RenderedSpeech
from lightspan.datamodules.rendered.traffic import Lidar
from lightspan.datamodules.rendered.words import PrintedWords
from lightspan.datamodules.sequence.blank import BlankSequences
from lightspan.datamodules.sequence.listops import ListOps
from lightspan.datamodules.sequence.own import OwnSequences
from lightspan.datamodules.sequence.pixels import PixelSequences
from lightspan.datamodules.shards.domains import DomainShards
from lightspan.datamodules.shards.latents import LatentShards
from lightspan.datamodules.shards.lit_clips import LitClipShards
from lightspan.datamodules.shards.masked import MaskedShards
from lightspan.datamodules.shards.paired import PairedShards
from lightspan.datamodules.shards.posed import PosedShards
from lightspan.datamodules.shards.recordings import RecordingShards
from lightspan.datamodules.shards.stream import Shards
from lightspan.datamodules.shards.tagged import TaggedShards
from lightspan.datamodules.shards.texts import QueryShards, WholeWordShards
from lightspan.datamodules.shards.words import WordShards
from lightspan.datamodules.table.file import TableFile
from lightspan.datamodules.table.rows import Ames, BreastCancer, Diabetes, RowViews
from lightspan.datamodules.text.austen import Austen
from lightspan.datamodules.text.chat import Chat
from lightspan.datamodules.text.corpus import Corpus
from lightspan.datamodules.text.domains import DomainDenoising, DomainPrompts
from lightspan.datamodules.text.drawn_reviews import DrawnReviews
from lightspan.datamodules.text.forms import Padded
from lightspan.datamodules.text.labelled import LabelledTextFiles
from lightspan.datamodules.text.library import LibraryTexts
from lightspan.datamodules.text.pairs import LibraryPairs, ScoredPairs, TextPairs
from lightspan.datamodules.text.reviews import FoodReviews
from lightspan.datamodules.text.shards import TextShards
from lightspan.datamodules.text.spelling import WordList
from lightspan.datamodules.text.whole_words import WholeWords
from lightspan.datamodules.text.windows import ByteText
from lightspan.datamodules.video.captioned import CaptionedVideos
from lightspan.datamodules.video.folder import VideoFolder
from lightspan.datamodules.video.sets.moving_digits import MovingDigits
from lightspan.datamodules.video.sets.moving_stamps import MovingStamps
from lightspan.datamodules.volume.folder import VolumeFolder
from lightspan.datamodules.volume.phantoms import Phantoms
from lightspan.datamodules.volume.radiance import RadianceFolder
from lightspan.datamodules.volume.rooms import DrawnRooms
from lightspan.datamodules.worlds.doom_places import DoomPlaces
from lightspan.datamodules.worlds.played import PlayedSteps
from lightspan.datamodules.worlds.point_mass import PointMass
from lightspan.datamodules.worlds.steps import StepShards, npy, step_members

PREFIX = f"{datamodules.__name__}."
MODULES = [importlib.import_module(info.name) for info in pkgutil.walk_packages(datamodules.__path__, PREFIX)]
BATCHES = {
    name: kind
    for module in MODULES
    if module.__name__.endswith(".batch")
    for name, kind in vars(module).items()
    if is_typeddict(kind) and kind.__module__ == module.__name__
}
ON_DEVICE = "DrawnViewsBatch"  # becomes another one there


class Letters:
    """Stands for a tokenizer: one token a letter, padded with 0."""

    vocab_size = 128

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return 0

    def __call__(self, texts: list[str], truncation: bool, max_length: int, **options: Any) -> dict[str, Any]:
        rows = [[min(ord(letter), 127) for letter in text[:max_length]] for text in texts]
        return {
            "input_ids": [row + [0] * (max_length - len(row)) for row in rows],
            "attention_mask": [[1] * len(row) + [0] * (max_length - len(row)) for row in rows],
        }


def shards(folder: Path, **options: Any) -> Shards:
    return Shards(write_shards(folder, [5]), batch_size=4, **options)


def lit_clips(folder: Path) -> LitClipShards:
    settings: dict[str, Any] = {"shape": (2, 3, 4, 5), "pixels": (8, 10), "embedding": 6}
    return LitClipShards([lit_clip_shard(folder / "a.tar", 4, **settings)], batch_size=4, **settings)


def pictures(folder: Path, **options: Any) -> ImageFolder:
    write_pictures(folder / "in", {"a": 4, "b": 4})
    return ImageFolder(str(folder / "in"), cache_dir=str(folder / "cache"), size=8, batch_size=4, **options)


def text_folder(folder: Path) -> str:
    for name in ("one", "two"):
        (folder / f"{name}.txt").write_text("to be or not to be, " * 200)
    return str(folder)


def source_folder(folder: Path) -> str:
    for name in ("one", "two", "three", "four"):
        (folder / f"{name}.py").write_text('"""Something is said about this file."""\n\nX = [1, 2, 3]\n' * 4)
    return str(folder)


def text(folder: Path) -> ByteText:
    return ByteText([text_folder(folder)], (".txt",), context=9, batch_size=4, val_fraction=0.5, val_windows=4)


def sounds() -> ModuleType:
    """The maker of recordings, which needs an extra."""
    return importlib.import_module("sound_files")


def recordings(folder: Path) -> AudioFolder:
    sounds().write_recordings(folder, {"a": 4, "b": 4})
    return AudioFolder(str(folder), seconds=0.2, batch_size=4)


def videos(folder: Path, **options: Any) -> VideoFolder:
    files = importlib.import_module("video_files")  # which needs an extra
    for number in range(5):
        files.write_video(folder / "in" / f"{number}.mkv", files.numbered(6))
    settings: dict[str, Any] = {"cache_dir": str(folder / "cache"), "frames": 3, "size": 8, "batch_size": 4}
    return VideoFolder(str(folder / "in"), **settings | options)


def answered_videos(folder: Path) -> CaptionedVideos:
    (folder / "lines.jsonl").write_text("".join(f'{{"video": "{n}.mkv", "answer": "{n}"}}\n' for n in range(5)))
    films = videos(folder).folder
    settings: dict[str, Any] = {"cache_dir": str(folder / "cache"), "frames": 3, "size": 8, "length": 60}
    return CaptionedVideos(str(films), str(folder / "lines.jsonl"), HashedWords(), batch_size=4, **settings)


def volumes(folder: Path, **options: Any) -> VolumeFolder:
    importlib.import_module("volume_files").write_volumes(folder / "in", 5)
    settings: dict[str, Any] = {"modalities": {"mr": "{subject}"}, "cache_dir": str(folder / "cache"), "batch_size": 4}
    return VolumeFolder(str(folder / "in"), **settings | options)


def fields(folder: Path) -> RadianceFolder:
    (folder / "in").mkdir()
    for number in range(6):
        np.savez(
            folder / "in" / f"{number}.npz", rgbsigma=np.random.default_rng(number).random((4, 4, 4, 4), np.float32)
        )
    return RadianceFolder(str(folder / "in"), density="alpha", size=8, val_share=0.3, batch_size=4)


def points(folder: Path, **options: Any) -> PointFolder:
    settings: dict[str, Any] = {"cache_dir": str(folder / "cache"), "points": 8, "batch_size": 4}
    return PointFolder(str(bricks(folder / "in", 6)), **settings | options)


def scans(folder: Path, **options: Any) -> LabelledScans:
    return LabelledScans(str(write_scans(folder / "in", 6)), **{"batch_size": 4, "val_share": 0.3} | options)


def graphs(folder: Path, **options: Any) -> GraphFolder:
    settings: dict[str, Any] = {"cache_dir": str(folder / "cache"), "batch_size": 4}
    return GraphFolder(str(rings(folder / "in", 8)), **settings | options)


def molecules(folder: Path) -> DatamolTables:
    return DatamolTables(("freesolv",), batch_size=4, cache_dir=str(folder / "cache"))


def modelnet(folder: Path) -> ModelNet40:
    for number, part in enumerate(("a/train", "a/train", "a/test", "b/train", "b/train", "b/test")):
        (folder / "in" / part).mkdir(parents=True, exist_ok=True)
        (folder / "in" / part / f"{number}.off").write_text(off(CUBE))
    return ModelNet40(str(folder / "in"), cache_dir=str(folder / "cache"), points=8, batch_size=4)


def located(folder: Path) -> PlaceFolder:
    for part, metres in (("train/database", (0, 6)), ("train/queries", (3, 4, 5, 8)), ("val/database", (0, 10))):
        write_places(folder / part, metres)
    write_places(folder / "val/queries", (1, 2, 3, 4))
    return PlaceFolder(str(folder), image_size=8, batch_size=4)


def write_places(folder: Path, metres: Sequence[int]) -> None:
    folder.mkdir(parents=True)
    for east in metres:
        name = f"@{500000 + east:.2f}@5800000.00@32@U@@@{east}@.png"
        Image.fromarray(np.full((8, 8, 3), east, np.uint8)).save(folder / name)


def parts(folder: Path) -> LDrawParts:
    bricks(folder / "ldraw" / "parts", 20)
    settings: dict[str, Any] = {"cache_dir": str(folder / "cache"), "points": 8, "batch_size": 4}
    return LDrawParts(str(folder / "ldraw"), ("Box",), **settings)


def furnished(folder: Path) -> FurnishedRooms:
    pytest.importorskip("trimesh", reason="the extra `points` is not installed")
    sides: dict[str, Any] = {"frames": 2, "height": 4, "width": 4, "views": 1, "points": 9}
    catalogues, cache = str(catalogue(folder / "in")), str(folder / "cache")
    return FurnishedRooms(6, val_size=2, furniture=catalogues, cache_dir=cache, batch_size=4, **sides)


def scanned(folder: Path) -> RGBDFolder:
    for number in range(6):
        frames_written(folder / "in" / f"s{number}", "exported", count=2)
    sides: dict[str, Any] = {"frames": 2, "height": 4, "width": 4, "views": 1, "points": 9, "val_share": 0.3}
    return RGBDFolder(str(folder / "in"), cache_dir=str(folder / "cache"), batch_size=4, **sides)


def agent_steps(folder: Path, action: Any, more: tuple[str, ...] = (), **options: Any) -> StepShards:
    frames = [np.zeros((8, 8, 3), np.uint8)] * 2
    members = step_members("k", frames, 1, "go", action=action, state=np.zeros(2, np.float32))
    sample = {name.removeprefix("k."): content for name, content in members.items()}
    sample |= {name: npy(np.zeros((8, 8), np.uint8)) for name in more}
    return StepShards([sound_shard(folder / "s.tar", [sample] * 4)], batch_size=4, **options)


def spoken(folder: Path) -> SpokenCaptions:
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"The letter {number}.")
        (folder / f"{number}_desc_fr.ogg").write_bytes(sounds().encoded(sounds().tone(0.1), ending="ogg"))
    return SpokenCaptions(str(folder), ("fr",), seconds=0.2, batch_size=4)


def word_list(folder: Path) -> WordList:
    (folder / "words.txt").write_text("to\nbe\nor\nnot\nagain\n")
    return WordList(str(folder / "words.txt"), HashedWords(), length=9, val_size=1, batch_size=4)


def functions(folder: Path) -> str:
    """A folder of Python files, some of which are held out."""
    for number in range(12):
        source = f'def f{number}():\n    """Gives back number {number} alone."""\n    return {number}\n'
        (folder / f"file_{number}.py").write_text(source)
    return str(folder)


def judged(folder: Path) -> str:
    path = folder / "labelled.jsonl"
    rows = [{"text": f"text {n}", "other": f"other {n}", "label": n % 3} for n in range(9)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def said(folder: Path) -> str:
    path = folder / "chat.jsonl"
    rows = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(9)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def lines(folder: Path) -> str:
    told = ({"query": f"what is {n}", "document": f"a {n}", "negatives": ["b", "c"], "score": n} for n in range(9))
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, told)))
    return str(folder / "pairs.jsonl")


def own_sequences(folder: Path) -> OwnSequences:
    np.savez(folder / "own.npz", sequences=np.arange(60.0).reshape(20, 3), labels=np.arange(20) % 2)
    return OwnSequences(str(folder / "own.npz"), batch_size=4)


MADE: dict[str, tuple[Callable[[Path], LightningDataModule], str]] = {
    "Digits": (lambda folder: Digits(4), "ImageBatch"),
    "Digits, two views": (lambda folder: Digits(4, TwoViews(flip=0.0)), "ViewsBatch"),
    "Digits, views on the device": (lambda folder: Digits(4, TwoViews(), views_on="device"), "DrawnViewsBatch"),
    "Digits, crops": (
        lambda folder: Digits(4, MultiCrop([RandomViews(size=8), RandomViews(count=3, size=4)])),
        "ViewsBatch",
    ),
    "FashionMNIST": (lambda folder: FashionMNIST(4), "ImageBatch"),
    "MNIST5k": (lambda folder: MNIST5k(4), "ImageBatch"),
    "Shapes": (lambda folder: Shapes(size=64, batch_size=4), "ImageBatch"),
    "ClassSubset": (lambda folder: ClassSubset(Digits(), [1, 2], batch_size=4), "ImageBatch"),
    "ColouredShapes": (lambda folder: ColouredShapes(size=256, batch_size=4), "ImageBatch"),
    "NoisyLabels": (lambda folder: NoisyLabels(Digits(), batch_size=4), "ImageBatch"),
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
    "RecordingShards": (
        lambda folder: RecordingShards(
            [sound_shard(folder / "r.tar", [{"wav": sounds().encoded(sounds().tone())}] * 4)], batch_size=4
        ),
        "AudioBatch",
    ),
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
    "LitClipShards": (lit_clips, "LitClipBatch"),
    "LatentShards": (
        lambda folder: LatentShards(
            [array_shard(folder / "s.tar", [np.random.rand(2, 3, 3)] * 4)], shape=(1, 3, 3), batch_size=4
        ),
        "ImageBatch",
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
    "MaskedShards": (
        lambda folder: MaskedShards([masked_shard(folder / "s.tar", range(4))], num_classes=5, batch_size=4),
        "SegmentedBatch",
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
    "SwappedCaptions": (
        lambda folder: SwappedCaptions(Scenes(tokenizer=HashedWords(), size=288), batch_size=4),
        "LabelledImageTextBatch",
    ),
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
    "LitHeads": (lambda folder: LitHeads(image_size=8, frames=2, batch_size=4), "LitClipBatch"),
    "Persons": (lambda folder: Persons(batch_size=4), "PersonBatch"),
    "Persons, together": (lambda folder: Persons(batch_size=4, together=3), "ViewsBatch"),
    "PrintedWords": (lambda folder: PrintedWords(batch_size=4), "WordBatch"),
    "PrintedWords, sentences": (lambda folder: PrintedWords(tokenizer=HashedWords(), batch_size=4), "SpelledWordBatch"),
    "WordList": (word_list, "SpellingBatch"),
    "LibraryPairs": (
        lambda folder: LibraryPairs(HashedWords(), functions(folder), val_fraction=0.4, batch_size=4),
        "TokenPairBatch",
    ),
    "TextPairs": (
        lambda folder: TextPairs(lines(folder), HashedWords(), val_size=2, negatives=2, batch_size=4),
        "TokenPairBatch",
    ),
    "ScoredPairs": (
        lambda folder: ScoredPairs(lines(folder), HashedWords(), val_size=2, batch_size=4),
        "ScoredPairBatch",
    ),
    "Chat": (
        lambda folder: Chat(said(folder), HashedWords(), val_size=2, length=12, batch_size=4),
        "ChatBatch",
    ),
    "QueryShards": (
        lambda folder: QueryShards(
            [
                partial_shard(
                    folder / "q.tar", [{"json": line} for line in Path(lines(folder)).read_text().splitlines()]
                )
            ],
            HashedWords(),
            batch_size=4,
        ),
        "TokenPairBatch",
    ),
    "WholeWords": (
        lambda folder: WholeWords(HashedWords(), folder=functions(folder), val_fraction=0.4, batch_size=4),
        "WholeWordBatch",
    ),
    "WholeWordShards": (
        lambda folder: WholeWordShards([pair_shard(folder / "t.tar", "txt")], HashedWords(), length=9, batch_size=4),
        "WholeWordBatch",
    ),
    "DomainPrompts": (
        lambda folder: DomainPrompts(DrawnReviews(20, 5), HashedWords(), val_size=2, batch_size=4),
        "PromptBatch",
    ),
    "DomainDenoising": (
        lambda folder: DomainDenoising(DrawnReviews(20, 5), HashedWords(), val_size=2, batch_size=4),
        "DenoisingBatch",
    ),
    "BodySlices": (lambda folder: BodySlices(batch_size=4), "SliceBatch"),
    "LandScenes": (lambda folder: LandScenes(side=16, batch_size=4), "LandBatch"),
    "LandSeasons": (lambda folder: LandSeasons(side=16, batch_size=4), "SeasonsBatch"),
    "SeasonShards": (
        lambda folder: SeasonShards(
            [array_shard(folder / "s.tar", [np.random.rand(seasons, 2, 8, 9) for seasons in (1, 2, 3, 4)])],
            Bands(["x", "y"]),
            3,
            SpectralCrops(8),
            batch_size=4,
        ),
        "SeasonsBatch",
    ),
    "LandSeries": (lambda folder: LandSeries(side=16, batch_size=4), "LandSeriesBatch"),
    "TiffFolder": (
        lambda folder: TiffFolder(write_tiffs(folder / "in", {"a": 6, "b": 6}), Bands(["x", "y"]), batch_size=4),
        "MultispectralBatch",
    ),
    "MultispectralShards": (
        lambda folder: MultispectralShards(
            [array_shard(folder / "s.tar", [np.random.rand(2, 8, 9)] * 4)], Bands(["x", "y"]), batch_size=4
        ),
        "MultispectralBatch",
    ),
    "MultispectralShards, series": (
        lambda folder: MultispectralShards(
            [array_shard(folder / "s.tar", [np.random.rand(3, 2, 8, 9)] * 4)], Bands(["x", "y"]), dates=3, batch_size=4
        ),
        "MultispectralSeriesBatch",
    ),
    "SceneBlocks": (
        lambda folder: SceneBlocks(
            write_tiffs(folder / "in", {"a": 1}, side=64) + "/a/0.tif", Bands(["x", "y"]), 8, 16, batch_size=4
        ),
        "MultispectralBatch",
    ),
    "Diabetes": (lambda folder: Diabetes(batch_size=4), "TableBatch"),
    "Diabetes, two views": (lambda folder: Diabetes(batch_size=4, views=RowViews()), "TableViewsBatch"),
    "BreastCancer": (lambda folder: BreastCancer(batch_size=4), "LabelledTableBatch"),
    "Ames": (lambda folder: Ames(batch_size=4), "TableBatch"),
    "TableFile": (lambda folder: rows_of_my_own(folder), "LabelledTableBatch"),
    "TableFile, two views": (lambda folder: rows_of_my_own(folder, views=RowViews()), "LabelledTableViewsBatch"),
    "Shards, two views": (lambda folder: shards(folder, views=TwoViews(flip=0.0)), "ViewsBatch"),
    "ImageFolder": (lambda folder: pictures(folder), "ImageBatch"),
    "ImageFolder, two views": (lambda folder: pictures(folder, views=TwoViews()), "ViewsBatch"),
    "PictureDataset": (
        lambda folder: PictureDataset([(torch.rand(3, 9, 8), 1)] * 8, size=8, batch_size=4),  # type: ignore[arg-type]
        "ImageBatch",
    ),
    "AudioFolder": (recordings, "AudioBatch"),
    "SpokenCaptions": (spoken, "SpokenBatch"),
    "StepShards": (lambda folder: agent_steps(folder, np.int64(6)), "StepBatch"),
    "StepShards, truth": (
        lambda folder: agent_steps(folder, np.int64(2), truth=True, more=("depth.npy", "objects.npy")),
        "WalkBatch",
    ),
    "StepShards, vectors": (lambda folder: agent_steps(folder, np.ones(2), actions=None), "ControlBatch"),
    "PlayedSteps": (
        lambda folder: PlayedSteps(PointMass(1), PointMass(1, seed=1), actions=None, batch_size=4),
        "ControlBatch",
    ),
    "MovingDigits": (lambda folder: MovingDigits(batch_size=4), "ClipBatch"),
    "MovingStamps": (lambda folder: MovingStamps(HashedWords(), batch_size=4), "ClipTextBatch"),
    "CaptionedVideos": (answered_videos, "ClipTextBatch"),
    "VideoFolder": (videos, "ClipBatch"),
    "VideoFolder, two clips": (lambda folder: videos(folder, speeds=(1, 2)), "ClipsBatch"),
    "VideoFolder, views on the device": (
        lambda folder: videos(folder, views=RandomViews(count=1), views_on="device"),
        "DrawnClipsBatch",
    ),
    "PointFolder": (points, "PointsBatch"),
    "PointFolder, changed": (
        lambda folder: points(folder, fields=("colour", "normal"), augment=PointAugmentation(keep=0.5, shift=0.1)),
        "PointsBatch",
    ),
    "LabelledScans": (scans, "PointsBatch"),
    "LabelledScans, changed": (
        lambda folder: scans(folder, fields=("colour", "normal"), augment=PointAugmentation(keep=0.6)),
        "PointsBatch",
    ),
    "LDrawParts": (parts, "PointsBatch"),
    "ModelNet40": (modelnet, "PointsBatch"),
    "PlaceFolder": (located, "PlaceViewsBatch"),
    "DoomPlaces": (
        lambda folder: DoomPlaces(["map02"], ["map03"], places=4, image_size=8, batch_size=4),
        "PlaceViewsBatch",
    ),
    "FontShots": (lambda folder: FontShots(shots=4, batch_size=4), "ImageBatch"),
    "YesNoTasks": (lambda folder: YesNoTasks({"digits": Digits(4)}, batch_size=4), "QuestionBatch"),
    "FurnishedRooms": (furnished, "PosedPointsBatch"),
    "RGBDFolder": (scanned, "PosedPointsBatch"),
    "DrawnSweeps": (lambda folder: DrawnSweeps(lidar=Lidar(beams=3, steps=9), batch_size=4), "SweepsBatch"),
    "GraphFolder": (graphs, "GraphBatch"),
    "GraphFolder, numbers": (lambda folder: graphs(folder, numbers=("id",), directed=True), "GraphBatch"),
    "DatamolTables": (molecules, "GraphBatch"),
    "VolumeFolder": (volumes, "VolumeBatch"),
    "RadianceFolder": (fields, "VolumeBatch"),
    "DrawnRooms": (lambda folder: DrawnRooms(5, val_size=1, side=8, size=8, batch_size=4), "VolumeBatch"),
    "Phantoms": (lambda folder: Phantoms(5, cuts=8, side=8, val_size=1, batch_size=4), "VolumeBatch"),
    "Phantoms, two crops": (
        lambda folder: Phantoms(5, cuts=8, side=8, val_size=1, batch_size=4, size=4, crops=2),
        "VolumeViewsBatch",
    ),
    "RenderedSpeech": (lambda folder: RenderedSpeech(batch_size=4), "SpeechBatch"),
    "ByteText": (text, "TextBatch"),
    "Corpus": (
        lambda folder: Corpus([text_folder(folder)], form=Padded(9), val_fraction=0.5, batch_size=4),
        "DocumentBatch",
    ),
    "LibraryTexts": (
        lambda folder: LibraryTexts(folder=source_folder(folder), form=Padded(9), val_fraction=0.5, batch_size=4),
        "DocumentBatch",
    ),
    "TextShards": (
        lambda folder: TextShards([pair_shard(folder / "t.tar", "txt")], form=Padded(9), batch_size=4),
        "DocumentBatch",
    ),
    "Austen": (lambda folder: Austen(context=9, batch_size=4, val_windows=4), "TextBatch"),
    "ListOps": (
        lambda folder: ListOps(9, 4, shortest=4, longest=20, depth=2, batch_size=4),
        "LabelledTextBatch",
    ),
    "PixelSequences": (lambda folder: PixelSequences(Digits(), batch_size=4), "SequenceBatch"),
    "BlankSequences": (lambda folder: BlankSequences(5, 2, batch_size=4), "SequenceBatch"),
    "OwnSequences": (own_sequences, "SequenceBatch"),
    "LabelledTextFiles": (
        lambda folder: LabelledTextFiles(judged(folder), HashedWords(), val_size=2, length=9, batch_size=4),
        "LabelledTextBatch",
    ),
    "LabelledTextFiles, pairs": (
        lambda folder: LabelledTextFiles(
            judged(folder), HashedWords(), val_size=2, fields=("text", "other"), length=9, batch_size=4
        ),
        "LabelledPairBatch",
    ),
    "FoodReviews": (lambda folder: FoodReviews(Letters(), length=9, batch_size=4), "LabelledTextBatch"),
}


def rows_of_my_own(folder: Path, **settings: Any) -> TableFile:
    (folder / "rows.csv").write_text("x,y,z\n" + "1,a,2\n2,b,3\n" * 8)
    return TableFile(str(folder / "rows.csv"), "y", batch_size=4, **settings)


def data_modules() -> set[str]:
    found: set[str] = set()
    for module in MODULES:
        for name, kind in vars(module).items():
            if inspect.isclass(kind) and issubclass(kind, LightningDataModule) and kind.__module__ == module.__name__:
                found |= set() if inspect.isabstract(kind) else {name}
    return found


OF_EVALUATION = "PlaceBatch"
"""No data module trains on these; its own tests hold it to its fields."""


def test_every_data_module_and_every_batch_is_held_to_it() -> None:
    assert {name.split(",")[0] for name in MADE} == data_modules()
    assert {batch for _, batch in MADE.values()} | {OF_EVALUATION} == BATCHES.keys()


def test_every_field_is_declared_and_docstrings_speak_of_fields_alone() -> None:
    for kind in BATCHES.values():
        fields = schema_of(kind).fields
        assert all(field.dtype == "any" or hasattr(torch, field.dtype) for field in fields.values())
        assert any(field.read for field in fields.values())
        spoken_of = re.findall(r"^(\w+): ", inspect.cleandoc(kind.__doc__ or ""), re.MULTILINE)
        assert set(spoken_of) <= fields.keys(), kind


@pytest.mark.sample(44)
@pytest.mark.parametrize("name", MADE)
def test_the_first_batch_has_the_declared_fields_and_no_others(name: str, tmp_path: Path) -> None:
    make, kind = MADE[name]
    with skip_without_packages():
        data = make(tmp_path)
        data.prepare_data()
        data.setup("fit")
    assert data.batch_type is BATCHES[kind]  # type: ignore[attr-defined]
    batch = next(iter(data.train_dataloader()))
    require_declared(batch, BATCHES[kind], name)
    assert BATCHES[kind].__required_keys__ <= set(batch) <= schema_of(BATCHES[kind]).fields.keys()
    assert samples_in(batch, BATCHES[kind]) == 4
    images = [batch[key] for key in ("image", "target_image") if key in batch and kind != ON_DEVICE]
    for image in batch.get("views", images):
        assert image.isfinite().all()
        assert image.abs().max() < 30  # standardised
