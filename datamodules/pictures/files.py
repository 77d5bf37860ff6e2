"""Finds the pictures of a folder and, if its sub-folders are classes, their labels. Nothing is opened here.

Shapes: N pictures.
"""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lightspan.errors import UserError, one_line

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
Links = Literal["skip", "follow"]
Labels = Literal["auto", "folders", "none"]


@dataclass(frozen=True)
class PictureFiles:
    """The pictures of a folder, sorted by name.

    Attributes:
        folder: where they are.
        names: paths relative to `folder`, with "/" between the parts.
        labels: int64 [N], the number of each picture's class; zeros without classes.
        classes: their names in sorted order; empty without classes.
        remarks: lines on what was left out.
    """

    folder: Path
    names: list[str]
    labels: np.ndarray
    classes: list[str]
    remarks: list[str]


def find_pictures(folder: Path, links: Links = "skip", labels: Labels = "auto") -> PictureFiles:
    """All files below `folder` that end in one of `ENDINGS`, in upper or lower case. Hidden ones are left out.

    Args:
        links: "skip" leaves out links and says how many there are; "follow" reads what they lead to, wherever that is,
            each folder once.
        labels: "folders" takes the first sub-folder of a picture as its class. "auto" does this if every picture is
            in a sub-folder and there are at least two of these. "none" never does.
    Raises: UserError if there is no such folder or no picture in it, for a folder that cannot be read, and for
        labels="folders" with pictures outside of sub-folders.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"picture folder {folder} {what}; name a folder of JPEG, PNG or WebP files")
    names, others, skipped = _walk(folder, links)
    remarks = []
    if skipped:
        remarks.append(f"{skipped:,} links were left out (data.init_args.links=follow reads them)")
    if others:
        most = sorted(others.items(), key=lambda pair: (-pair[1], pair[0]))[:5]
        shown = ", ".join(f"{count:,} {one_line(ending)}" for ending, count in most)
        remarks.append(f"{others.total():,} other files were left out: {shown}")
    if not names:
        raise UserError(
            f"{folder} and its sub-folders have no file that ends in {', '.join(ENDINGS)}"
            + (f"; {'; '.join(remarks)}" if remarks else "; the folder is empty")
            + "; name a folder of pictures"
        )
    names.sort()
    firsts = [name.split("/")[0] if "/" in name else "" for name in names]
    outside = firsts.count("")
    if labels == "folders" and outside:
        raise UserError(
            f"labels=folders wants each picture of {folder} in the folder of its class, but {outside:,} are in none, "
            f"such as {one_line(names[firsts.index('')])}; move them, or set data.init_args.labels=none"
        )
    classes = sorted(set(firsts))
    if labels == "none" or (labels == "auto" and (outside or len(classes) < 2)):
        return PictureFiles(folder, names, np.zeros(len(names), np.int64), [], remarks)
    numbers = {name: number for number, name in enumerate(classes)}
    return PictureFiles(folder, names, np.array([numbers[first] for first in firsts], np.int64), classes, remarks)


def _walk(folder: Path, links: Links) -> tuple[list[str], Counter[str], int]:
    """(names of pictures, endings of other files, links that were left out)."""

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); change its permissions or remove it")

    names: list[str] = []
    others: Counter[str] = Counter()
    skipped, seen = 0, {os.path.realpath(folder)}
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
        for name in files:
            path = os.path.join(parent, name)
            if name.startswith("."):
                continue
            if os.path.islink(path) and links == "skip":
                skipped += 1
            elif name.lower().endswith(ENDINGS):
                names.append(Path(path).relative_to(folder).as_posix())
            else:
                others[Path(name).suffix.lower() or "without an ending"] += 1
    return names, others, skipped
