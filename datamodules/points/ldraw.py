"""LDraw files: models and parts of toy bricks as text, whose lines are triangles, quadrilaterals and other files.

Source: the LDraw file format, https://www.ldraw.org/article/218.html. Lines of type 1 (a file, with a colour, a place
and a matrix), 3 and 4 are read; edges (2, 5), comments and the winding of faces (BFC) are not. Axes are turned so that
the third points up: (x, y, z) of the file is (x, z, -y) here, in LDraw units of 0.4 mm. Without torch.
Shapes: T triangles.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np

from lightspan.core.errors import one_line
from lightspan.core.files.foreign import SETTINGS_BYTES, TRIANGLES, bounded_memory, bounded_time, content_of
from lightspan.core.files.places import PathUse

LIBRARY = Path("/usr/share/ldraw")
"""Of the system package ldraw-parts-free."""
MOST_DEEP = 64
"""Files within files."""
MAIN, EDGE = 16, 24
"""Colours that stand for that of the line that names a file, and for that of its edges."""
GREY = (127, 127, 127)
_WITHIN = ("", "parts/", "p/", "models/")
_KEPT = 2**20  # triangles of files that are kept for the next ones
_UP = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])


def library_roots(folder: Path) -> list[Path]:
    """Where the files of a user's folder may find others: there, and in the system's library if there is one."""
    return [folder, LIBRARY] if LIBRARY.is_dir() else [folder]


class Triangles(NamedTuple):
    """corners: float64 [T 3 3]. colours: int64 [T], codes of LDraw; 2^25 + RGB is a colour of its own."""

    corners: np.ndarray
    colours: np.ndarray

    @property
    def size(self) -> int:
        return len(self.colours)


NONE = Triangles(np.empty((0, 3, 3)), np.empty(0, np.int64))


class LDrawFiles:
    """Reads files and those that they name, each once.

    A file is looked for beside the one that names it, then in each root, in its folders parts, p and models, whatever
    the case of its letters. No file outside of the roots is read.

    Args:
        roots: folders with LDraw files; of files of one name the first counts.
    """

    def __init__(self, roots: Iterable[Annotated[Path, PathUse.READ]]) -> None:
        self.roots = [Path(os.path.realpath(root)) for root in roots]
        self._names: list[dict[str, Path]] | None = None
        self._read: dict[Path, Triangles] = {}
        self._held = 0
        self._rgb: dict[int, tuple[int, int, int]] | None = None

    def triangles(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Corners, float64 [T 3 3], and the red, green and blue of each triangle, uint8 [T 3]; what has no colour of
        its own is grey.

        Raises: ValueError for lines that are damaged, files that are not there or that contain themselves, and more
            triangles, memory or time than the limits.
        """
        try:
            # Of files within files each level is kept for the others that name it.
            with bounded_memory(), bounded_time():
                found = self._of(Path(os.path.realpath(path)), ())
        finally:
            if self._held > _KEPT:
                self._read, self._held = {}, 0
        with np.errstate(invalid="ignore"):  # what is not finite is left out later
            return found.corners @ _UP.T, self._shown(found.colours)

    def _of(self, path: Path, within: tuple[Path, ...]) -> Triangles:
        if path in self._read:
            return self._read[path]
        if path in within:
            raise ValueError(f"it contains itself, by way of {one_line(path.name)}")
        if len(within) > MOST_DEEP:
            raise ValueError(f"its files contain one another more than {MOST_DEEP} deep")
        parts, corners, colours = list[Triangles](), list[list[float]](), list[int]()
        total = 0
        for number, line in enumerate(content_of(path, SETTINGS_BYTES).decode("latin-1").splitlines(), 1):
            words = line.split()
            if words[:2] == ["0", "FILE"] and number > 1:
                raise ValueError("it holds several models (lines `0 FILE`); save each in a file of its own")
            if not words or words[0] not in ("1", "3", "4"):
                continue
            kind, where = words[0], f"{one_line(path.name)}, line {number}"
            count = {"1": 12, "3": 9, "4": 12}[kind]
            try:
                colour, numbers = int(words[1], 0), [float(word) for word in words[2 : 2 + count]]
            except (ValueError, IndexError) as error:
                raise ValueError(f"{where}, is damaged: {one_line(line)[:80]}") from error
            name = " ".join(words[2 + count :])
            if len(numbers) < count or not 0 <= colour < 2**31 or (kind == "1" and not name):
                raise ValueError(f"{where}, is damaged: {one_line(line)[:80]}")
            if kind == "1":
                part = self._placed(self._of(self._named(name, path, where), (*within, path)), colour, numbers)
                parts.append(part)
                total += part.size
            else:
                quad = [numbers[:9], [*numbers[:3], *numbers[6:]]] if kind == "4" else [numbers]
                corners += quad
                colours += [colour] * len(quad)
                total += len(quad)
            TRIANGLES.require(total)
        own = Triangles(np.array(corners).reshape(-1, 3, 3), np.array(colours, np.int64))
        found = Triangles(*(np.concatenate(columns) for columns in zip(own, *parts, strict=True))) if parts else own
        self._read[path] = found
        self._held += found.size
        return found

    @staticmethod
    def _placed(part: Triangles, colour: int, numbers: list[float]) -> Triangles:
        place_3, turn_33 = np.array(numbers[:3]), np.array(numbers[3:]).reshape(3, 3)
        with np.errstate(invalid="ignore", over="ignore"):
            # Not a product of BLAS, which ends the process where memory runs out.
            corners = np.einsum("tci,oi->tco", part.corners, turn_33) + place_3
        return Triangles(corners, np.where(part.colours == MAIN, colour, part.colours))

    def _named(self, name: str, by: Path, where: str) -> Path:
        wanted = name.replace("\\", "/").lower()
        if self._names is None:
            self._names = [_files_of(root) for root in self.roots]
        for root, names in zip(self.roots, self._names, strict=True):
            beside = by.parent.relative_to(root).as_posix().lower() if by.is_relative_to(root) else None
            folders = _WITHIN if beside in (None, ".") else (f"{beside}/", *_WITHIN)
            for folder in folders:
                if (found := names.get(folder + wanted)) is not None:
                    return found
        raise ValueError(
            f"{where}, names {one_line(name)[:80]}, which is not in {', '.join(map(str, self.roots))}; add it there, "
            "or install the system package ldraw-parts-free"
        )

    def _shown(self, colours: np.ndarray) -> np.ndarray:
        if self._rgb is None:
            self._rgb = next(filter(None, (_colours_of(root / "LDConfig.ldr") for root in self.roots)), {})
        known, at = np.unique(colours, return_inverse=True)
        table = [(code >> 16 & 255, code >> 8 & 255, code & 255) if code >> 24 else self._rgb.get(code, GREY)
                 for code in known.tolist()]  # fmt: skip
        return np.array(table, np.uint8).reshape(-1, 3)[at.reshape(-1)]


def _files_of(root: Path) -> dict[str, Path]:
    """The files below a folder by their names there in lower case; no links are followed."""
    found = dict[str, Path]()
    for parent, children, files in os.walk(root):
        children.sort()
        for name in sorted(files):
            path = Path(parent, name)
            if name.lower().endswith((".dat", ".ldr")) and not path.is_symlink():
                found.setdefault(path.relative_to(root).as_posix().lower(), path)
    return found


def _colours_of(path: Path) -> dict[int, tuple[int, int, int]]:
    """Code -> red, green, blue, of a library's table; empty without one."""
    if not path.is_file() or path.is_symlink():
        return {}
    text = content_of(path, SETTINGS_BYTES).decode("latin-1")
    found = re.findall(r"^0 !COLOUR \S+\s+CODE\s+(\d+)\s+VALUE\s+#([0-9A-Fa-f]{6})", text, re.MULTILINE)
    return {int(code): tuple(bytes.fromhex(rgb)) for code, rgb in found if int(code) not in (MAIN, EDGE)}  # type: ignore[misc]


class Title(NamedTuple):
    """What the header of a file says: its first line, its category, and its keywords."""

    title: str
    category: str
    keywords: tuple[str, ...]


def title_of(path: Path) -> Title:
    """Of a part's header. A part without a category belongs to that of the first word of its title, as LDraw has it."""
    lines = [line.strip() for line in content_of(path, SETTINGS_BYTES).decode("latin-1").splitlines()[:100]]
    title = " ".join(lines[0][1:].split()) if lines and lines[0].startswith("0") else ""
    told = dict(words[2:].split(None, 1) for words in lines if re.match(r"0 !CATEGORY \S", words))
    words = [line.split(None, 2)[2] for line in lines if re.match(r"0 !KEYWORDS \S", line)]
    keywords = tuple(word.strip() for line in words for word in line.split(",") if word.strip())
    return Title(title, told.get("!CATEGORY", title.split()[0] if title else ""), keywords)
