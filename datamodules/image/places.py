"""Pictures and where they were taken: queries, each with pictures of a database that were taken near it, and folders.

Source: the convention of names of Berton et al., "Deep Visual Geo-localization Benchmark", CVPR 2022, arXiv 2204.03444.
Shapes: N pictures, h w their sides.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from lightspan.core.errors import UserError, one_line
from lightspan.core.files.atomic import expanded
from lightspan.core.files.places import ReadPath
from lightspan.core.ranges import require_in, require_numbers
from lightspan.datamodules.image.augment.fields import ImageFields
from lightspan.datamodules.image.batch import PlaceBatch, PlaceViewsBatch
from lightspan.datamodules.image.packed import Decoder
from lightspan.datamodules.image.picture_files import find_pictures
from lightspan.datamodules.loading.packs import file_state
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.loading.sample_sets import SampleSets
from lightspan.datamodules.shards.headers import UNDECODABLE

PARTS = {"database": False, "queries": True}
"""Folders of a set, and whether their pictures ask."""


@dataclass(frozen=True)
class Places:
    """Where N pictures were taken, and how they are read.

    Attributes:
        read: number -> uint8 [3 h w], of one size.
        place: float64 [N 2].
        region: int64 [N]; pictures of two regions show different places.
        query: bool [N], of pictures that ask; the others are the database.
        content: what identifies the pictures.
    """

    read: Callable[[int], Tensor]
    place: np.ndarray
    region: np.ndarray
    query: np.ndarray
    content: str = ""

    def near(self, radius: float) -> list[np.ndarray]:
        """The pictures of the database within `radius` of each query, in the order of the queries."""
        found: dict[int, np.ndarray] = {}
        for region in np.unique(self.region):
            here = self.region == region
            asks, answers = np.flatnonzero(here & self.query), np.flatnonzero(here & ~self.query)
            if len(asks) and len(answers):
                rows = cKDTree(self.place[answers]).query_ball_point(self.place[asks], radius, return_sorted=True)
                found |= {int(ask): answers[np.asarray(row, np.int64)] for ask, row in zip(asks, rows, strict=True)}
        return [found.get(int(ask), np.empty(0, np.int64)) for ask in np.flatnonzero(self.query)]


@dataclass(frozen=True)
class PlaceSamples:
    """Each picture of places by its number. origin: float64 [2], taken from places, which float32 holds near 0."""

    places: Places
    image: ImageFields
    origin: np.ndarray
    batch_type = PlaceBatch

    def __len__(self) -> int:
        return len(self.places.query)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        found = self.image(self.places.read(index), seed)
        label, query = (torch.tensor(int(x[index])) for x in (self.places.region, self.places.query))
        return found | {"place": self.place(index), "query": query, "label": label, "index": index}

    def place(self, index: int) -> Tensor:
        return torch.from_numpy((self.places.place[index] - self.origin).astype(np.float32))


@dataclass(frozen=True)
class PlacePairs:
    """Each query by its number, with a picture that is drawn among those near it.

    Args:
        samples: the pictures.
        pairs: (number of the query, those of the database near it), of queries that have any.
    """

    samples: PlaceSamples
    pairs: Sequence[tuple[int, np.ndarray]]
    batch_type = PlaceViewsBatch

    def __len__(self) -> int:
        return len(self.pairs)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        query, near = self.pairs[index]
        draws = np.random.default_rng(seed)
        pair = [self.samples.sample(query, seed), self.samples.sample(int(draws.choice(near)), seed)]
        views, places = [one["image"] for one in pair], torch.stack([one["place"] for one in pair])
        return {"views": views, "places": places, "label": pair[0]["label"], "index": index}


class PlaceSets(SampleSets):
    """Training batches are `PlaceViewsBatch`, a query and a picture of the database near it, drawn anew in each epoch;
    all others are `PlaceBatch`, of queries and database. Queries with nothing near them are left out of training.

    Args:
        near: how far apart the two pictures may be taken, in the unit of the places, > 0.
        mean, std: of the channels in [0, 1], for standardising.
        batch_size, seed, num_workers, selection: as in `SampleSets`; a sample is a query.
    Raises: UserError before the first step if no query has a picture near it, or there is nothing to validate on.
    """

    def __init__(
        self,
        near: float,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
        selection: ReadPath | None = None,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, selection)
        require_in("(0, inf)", near=near, std=std)
        self.near = near
        mean_C11, std_C11 = (torch.tensor(x, dtype=torch.float32)[:, None, None] for x in (mean, std))
        self.image = ImageFields(mean_C11, std_C11)

    @abstractmethod
    def find(self) -> tuple[Places, Places]:
        """Those to train on and those to validate on, each with queries and a database."""

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Black and white after standardising, each [3, 1, 1]."""
        return -self.image.mean / self.image.std, (1 - self.image.mean) / self.image.std

    def setup(self, stage: str | None = None) -> None:
        if self.train is not None:
            return
        train, val = self.find()
        near = train.near(self.near)
        pairs = [(int(q), rows) for q, rows in zip(np.flatnonzero(train.query), near, strict=True) if len(rows)]
        name = type(self).__name__
        if not pairs:
            raise UserError(
                f"{name}: none of {train.query.sum():,} queries has one of {(~train.query).sum():,} pictures of the "
                f"database within near={self.near:g}; raise it, or look at the places"
            )
        if not val.query.any() or val.query.all():
            raise UserError(
                f"{name}: validation has {val.query.sum():,} queries and {(~val.query).sum():,} pictures to find; it "
                "needs both"
            )
        say(
            f"places: {len(pairs):,} of {len(near):,} queries have pictures near them to train on; {val.query.sum():,} "
            f"queries of validation search {(~val.query).sum():,} pictures"
        )
        self.bank, self.val = (PlaceSamples(x, self.image, x.place.mean(axis=0)) for x in (train, val))
        self.train = PlacePairs(self.bank, pairs)
        digest = hashlib.sha256(train.content.encode())
        for array in (train.place, train.region, train.query):
            digest.update(np.ascontiguousarray(array).tobytes())
        self.content = digest.hexdigest()[:32]

    def training_content(self) -> str:
        return self.content


class PlaceFolder(PlaceSets):
    """Pictures below FOLDER/train/database, FOLDER/train/queries, FOLDER/val/database and FOLDER/val/queries, whose
    names say where they were taken: `@EAST@NORTH@ZONE@LETTER@...@.jpg`, in metres of UTM. ZONE and LETTER may be empty;
    pictures of two zones show different places.

    Args:
        folder: with these four.
        image_size: height and width, to which pictures are scaled and cut.
        near: in metres.
        settings: those of `PlaceSets`.
    Raises: UserError as `PlaceSets`, for a folder that is missing, and for a name without a place.
    """

    def __init__(self, folder: ReadPath, image_size: int = 224, near: float = 10.0, **settings: Any) -> None:
        super().__init__(near=near, **settings)
        require_in("[1, inf)", image_size=image_size)
        require_numbers(2 * 3 * image_size**2, image_size=image_size)
        self.folder, self.image_size = expanded(folder, "data.init_args.folder"), image_size

    def find(self) -> tuple[Places, Places]:
        return self._places(self.folder / "train"), self._places(self.folder / "val")

    def blank(self) -> PlacePairs:
        """Two pairs of black pictures in one place."""
        black = torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8)
        places = Places(lambda number: black, np.zeros((2, 2)), np.zeros(2, np.int64), np.array([True, False]))
        return PlacePairs(PlaceSamples(places, self.image, np.zeros(2)), [(0, np.array([1]))] * 2)

    def _places(self, folder: Path) -> Places:
        files: list[Path] = []
        query: list[bool] = []
        known: list[tuple[str, str, int, int]] = []
        for name, asks in PARTS.items():
            found = find_pictures(folder / name, labels="none")
            files += [found.folder / each for each in found.names]
            query += [asks] * len(found.names)
            known += [(name, each, *file_state(found.folder / each)) for each in found.names]
        told = [place_in_name(file) for file in files]
        zones = sorted({zone for *_, zone in told})
        region = np.array([zones.index(zone) for *_, zone in told], np.int64)
        place = np.array([each[:2] for each in told], np.float64)
        read = partial(_decoded, files, Decoder(self.image_size, "crop", 255))
        return Places(read, place, region, np.array(query), repr(((self.image_size, "crop"), known)))


def place_in_name(file: Path) -> tuple[float, float, str]:
    """(east, north, zone) of a picture's name. Raises: UserError for a name without them."""
    _, *parts = f"{file.stem}@@@@".split("@")
    try:
        east, north = float(parts[0]), float(parts[1])
        if not np.isfinite([east, north]).all():
            raise ValueError
    except ValueError:
        raise UserError(
            f"{one_line(str(file))} does not say where it was taken; call it @EAST@NORTH@ZONE@LETTER@ and so on, in "
            "metres of UTM"
        ) from None
    return east, north, parts[2] + parts[3]


def _decoded(files: Sequence[Path], decode: Decoder, number: int) -> Tensor:
    try:
        return decode(files[number])
    except UNDECODABLE as error:
        raise UserError(f"{one_line(str(files[number]))} cannot be decoded: {error}; remove or replace it") from error
