"""Finds the pictures of a folder and, if its sub-folders are classes, their labels. Nothing is opened here.

Shapes: N pictures.
"""

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np

from lightspan.core.errors import UserError, one_line
from lightspan.core.files.places import PathUse
from lightspan.core.files.splits import TRAINING, VALIDATION

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
Links = Literal["skip", "follow"]
Labels = Literal["auto", "folders", "none"]


class Kind(NamedTuple):
    """Files of a kind: what a sample is called, the formats for messages, and their endings in lower case; and whether
    a file may hold several samples.
    """

    name: str
    formats: str
    endings: tuple[str, ...]
    holds_several: bool = False


PICTURES = Kind("picture", "JPEG, PNG, WebP, BMP, GIF or TIFF", ENDINGS)


@dataclass(frozen=True)
class PictureFiles:
    """The pictures, or files of another kind, of a folder, sorted by name.

    Attributes:
        folder: where they are.
        names: paths relative to `folder`, with "/" between the parts.
        labels: int64 [N], the number of each picture's class; zeros without classes.
        classes: their names in sorted order; empty without classes.
        remarks: lines on what was left out.
    """

    folder: Annotated[Path, PathUse.READ]
    names: list[str]
    labels: np.ndarray
    classes: list[str]
    remarks: list[str]

    def like(self, training: "PictureFiles") -> "PictureFiles":
        """With the training folder's numbers of classes. Raises: UserError for a class that it does not have."""
        if not training.classes:
            return PictureFiles(self.folder, self.names, np.zeros_like(self.labels), [], self.remarks)
        numbers = {name: number for number, name in enumerate(training.classes)}
        firsts = [name.split("/")[0] for name in self.names]
        if unknown := sorted({first for first in firsts if first not in numbers}):
            raise UserError(
                f"{self.folder} has {one_line(unknown[0])}, which is no class of {training.folder}; its classes are "
                f"{one_line(', '.join(training.classes))}"
            )
        labels = np.array([numbers[first] for first in firsts], np.int64)
        return PictureFiles(self.folder, self.names, labels, training.classes, self.remarks)


def find_pictures(folder: Path, links: Links = "skip", labels: Labels = "auto") -> PictureFiles:
    """`find_labelled` for pictures: files that end in one of `ENDINGS`."""
    return find_labelled(folder, PICTURES, links, labels)


def find_labelled(folder: Path, kind: Kind, links: Links = "skip", labels: Labels = "auto") -> PictureFiles:
    """All files of a kind below `folder`, by their endings in upper or lower case. Hidden ones are left out.

    Args:
        links: "skip" leaves out links and says how many there are; "follow" reads what they lead to, wherever that is,
            each folder once.
        labels: "folders" takes the first sub-folder of a file as its class. "auto" does this if every file is in a
            sub-folder and there are at least two of these. "none" never does.
    Raises: UserError if there is no such folder or no such file in it, for a folder that cannot be read, for
        labels="folders" with files outside of sub-folders, and for labels="auto" with sub-folders that are splits:
        `TRAINING` and one or more of `VALIDATION`, and no other.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{kind.name} folder {folder} {what}; name a folder of {kind.formats} files")
    found = files_below(folder, kind.endings, links)
    remarks = []
    if found.links:
        remarks.append(f"{found.links:,} links were left out (data.init_args.links=follow reads them)")
    if found.others:
        remarks.append(f"{found.others.total():,} other files were left out: {found.shown_others()}")
    if not found.names:
        raise UserError(
            f"{folder} and its sub-folders have no file that ends in {', '.join(kind.endings)}"
            + (f"; {'; '.join(remarks)}" if remarks else "; the folder is empty")
            + f"; name a folder of {kind.name}s"
        )
    return sorted_into_classes(folder, found.names, kind, labels, remarks)


def sorted_into_classes(
    folder: Path, names: list[str], kind: Kind, labels: Labels = "auto", remarks: Sequence[str] = ()
) -> PictureFiles:
    """Files of a kind as `find_labelled` gives them. names: at least one. Raises: UserError as there, for labels."""
    names = sorted(names)
    firsts = [name.split("/")[0] if "/" in name else "" for name in names]
    outside = firsts.count("")
    if labels == "folders" and outside:
        raise UserError(
            f"labels=folders wants each {kind.name} of {folder} in the folder of its class, but {outside:,} are in "
            f"none, such as {one_line(names[firsts.index('')])}; move them, or set data.init_args.labels=none"
        )
    classes = sorted(set(firsts))
    if labels == "auto":
        _refuse_splits(folder, classes)
    if labels == "none" or (labels == "auto" and (outside or len(classes) < 2)):
        return PictureFiles(folder, names, np.zeros(len(names), np.int64), [], [*remarks])
    numbers = {name: number for number, name in enumerate(classes)}
    return PictureFiles(folder, names, np.array([numbers[first] for first in firsts], np.int64), classes, [*remarks])


def _refuse_splits(folder: Path, classes: list[str]) -> None:
    others = [name for name in VALIDATION if name in classes]
    if others and {*classes} == {TRAINING, *others}:
        raise UserError(
            f"{one_line(str(folder))} is divided into {', '.join([TRAINING, *others])}, which are splits and not "
            f"classes; set data.init_args.folder={one_line(str(folder / TRAINING))} and "
            f"data.init_args.val_folder={one_line(str(folder / others[0]))}, or data.init_args.labels=folders if they "
            "are classes after all, or labels=none to take all of them without labels"
        )


class FilesBelow(NamedTuple):
    """names: with "/" between the parts, in no order. others: how many other files have each ending. links: that were
    left out. whole: whether all were counted.
    """

    names: list[str]
    others: Counter[str]
    links: int
    whole: bool = True

    def shown_others(self) -> str:
        """The most frequent endings."""
        most = sorted(self.others.items(), key=lambda pair: (-pair[1], pair[0]))[:5]
        return ", ".join(f"{count:,} {one_line(ending)}" for ending, count in most)


def files_below(folder: Path, endings: tuple[str, ...], links: Links = "skip", most: float = math.inf) -> FilesBelow:
    """The files below a folder that end so, hidden ones left out; see `find_labelled`.

    Args:
        most: files and folders that are counted before it stops.
    Raises: UserError for a folder that cannot be read.
    """

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); change its permissions or remove it")

    names: list[str] = []
    others: Counter[str] = Counter()
    skipped, count, seen = 0, 0, {os.path.realpath(folder)}
    for parent, children, files in os.walk(folder, onerror=fail, followlinks=links == "follow"):
        kept = []
        for child in sorted(child for child in children if not child.startswith(".")):
            path = os.path.join(parent, child)
            if not os.path.islink(path):
                kept.append(child)
            elif links == "skip":
                skipped += 1
            elif (real := os.path.realpath(path)) not in seen:  # otherwise a circle of links would never end
                seen.add(real)
                kept.append(child)
        children[:] = kept
        count += len(kept)
        for name in files:
            path = os.path.join(parent, name)
            if name.startswith("."):
                continue
            if (count := count + 1) > most:
                return FilesBelow(names, others, skipped, whole=False)
            if os.path.islink(path) and links == "skip":
                skipped += 1
            elif name.lower().endswith(endings):
                names.append(Path(path).relative_to(folder).as_posix())
            else:
                others[Path(name).suffix.lower() or "without an ending"] += 1
    return FilesBelow(names, others, skipped)
