"""Parts of toy bricks from the LDraw library, with a category and an English title each, from a system package."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import expanded
from lightspan.core.files.places import CachePath, ReadPath
from lightspan.datamodules.loading.damage import report_damage
from lightspan.datamodules.loading.found_sets import FoundSamples
from lightspan.datamodules.points.data import PointSamples, PointSets
from lightspan.datamodules.points.ldraw import LIBRARY, Title, title_of
from lightspan.datamodules.points.packed import PackedShapes, PointCache
from lightspan.datamodules.points.shapes import Shape

CATEGORIES = (
    *("Animal", "Brick", "Container", "Electric", "Figure", "Figure Accessory", "Hinge", "Minifig"),
    *("Minifig Accessory", "Minifig Headwear", "Plate", "Slope", "Technic", "Train", "Wheel", "Windscreen"),
)
"""The 16 with the most parts, stickers apart: 3,271 parts, of which Technic has 692 and Hinge 87."""
_VARIANT = re.compile(r"(p[0-9a-z]{2,3}|d\d\d|c\d\d)\.dat$")  # printed, with a sticker, or put together of others
_INNER = "~_=|"  # first letters of the titles of pieces, aliases and what has moved
_FLAT = "Sticker"  # with which the categories of stickers begin


@dataclass(frozen=True)
class BrickPart:
    """A part's file name below the library's folder of parts, and what its header says."""

    name: str
    title: Title


def find_parts(root: Path) -> list[BrickPart]:
    """The plain parts of the library by name: no pieces of parts, aliases, stickers, printed and assembled ones."""
    names = sorted(path.name for path in (root / "parts").glob("*.dat") if not _VARIANT.search(path.name))
    parts = [BrickPart(name, title_of(root / "parts" / name)) for name in names]
    return [
        part
        for part in parts
        if part.title.title and part.title.title[0] not in _INNER and not part.title.category.startswith(_FLAT)
    ]


def in_test(part: BrickPart) -> bool:
    """One part number in five, by a hash; versions of a part, which letters behind its number tell apart, together."""
    number = re.sub(r"[a-z]*\.dat$", "", part.name)
    return hashlib.sha256(number.encode()).digest()[0] % 5 == 0


class LDrawParts(PointSets):
    """Surfaces of plain parts of the LDraw library, licensed CC BY 4.0, in 16 categories by their use.

    Args:
        root: folder of the library, with `parts` and `p`; None means that of the system package ldraw-parts-free.
        categories: which ones; their order is that of the labels.
        per_class: parts of each category to train on, the first by a hash of their names; None takes all.
        cache_dir, cache_gib: as in `lightspan.datamodules.points.folder.PointFolder`.
        settings: those of `PointSets`.

    Attributes:
        captions, val_captions: the titles of the parts to train and validate on, by their `index`.

    Raises: UserError at setup for a library or a category that is not there.
    """

    def __init__(
        self,
        root: ReadPath | None = None,
        categories: tuple[str, ...] = CATEGORIES,
        per_class: int | None = None,
        cache_dir: CachePath | None = None,
        cache_gib: float = 32,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if len(categories) < 1 or len({*categories}) < len(categories):
            raise UserError(f"categories={list(categories)} must be at least one, each once")
        if per_class is not None and per_class < 1:
            raise UserError(f"per_class={per_class} must be at least 1")
        self.root = LIBRARY if root is None else expanded(root, "data.init_args.root")
        self.categories, self.per_class = tuple(categories), per_class
        self.cache = PointCache(cache_dir, cache_gib)
        self.captions, self.val_captions = list[str](), list[str]()

    @property
    def num_classes(self) -> int:
        return len(self.categories)

    def blank(self) -> PointSamples | None:
        """Two samples of a triangle, where the library is not here."""
        return None if (self.root / "parts").is_dir() else self.blank_samples()

    def find(self) -> FoundSamples[Shape]:
        if not (self.root / "parts").is_dir():
            raise UserError(
                f"{self.root} has no folder of parts; install the system package ldraw-parts-free, or set "
                "data.init_args.root to the folder of an LDraw library, which has parts and p"
            )
        found = {category: list[BrickPart]() for category in self.categories}
        for part in find_parts(self.root):
            if part.title.category in found:
                found[part.title.category].append(part)
        if missing := [category for category, parts in found.items() if not parts]:
            raise UserError(
                f"{self.root} has no part of the category {missing[0]!r}; correct data.init_args.categories"
            )
        chosen = [(part, label) for label, parts in enumerate(found.values()) for part in self._few(parts)]
        names, labels = [part.name for part, _ in chosen], np.array([label for _, label in chosen], np.int64)
        pack = self.cache.packed(self.root / "parts", names, labels, [self.root], self.num_workers)
        damage = [(self.root / "parts" / name, known["damage"])
                  for name, known in zip(names, pack.known, strict=True) if "damage" in known]  # fmt: skip
        report_damage(damage, len(names), "parts", skips=True)
        sound = np.array([at for at, known in enumerate(pack.known) if "damage" not in known], np.int64)
        tests = np.array([in_test(chosen[at][0]) for at in sound], bool)
        train, val = sound[~tests], sound[tests]
        self.captions, self.val_captions = ([chosen[at][0].title.title for at in part] for part in (train, val))
        return FoundSamples(pack, train, val, self.categories, _content(pack, train))

    def _few(self, parts: list[BrickPart]) -> list[BrickPart]:
        """All of those for testing, and `per_class` of the others."""
        train = [part for part in parts if not in_test(part)]
        if self.per_class is not None:
            train = sorted(train, key=lambda part: hashlib.sha256(part.name.encode()).digest())[: self.per_class]
        return sorted([*train, *filter(in_test, parts)], key=lambda part: part.name)


def _content(pack: PackedShapes, train: np.ndarray) -> str:
    digest = hashlib.sha256(pack.labels[train].tobytes() + train.tobytes())
    for number in train.tolist():
        digest.update(pack.known[number]["content"].encode())
    return digest.hexdigest()[:32]
