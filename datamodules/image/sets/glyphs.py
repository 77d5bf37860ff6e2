"""Letters and figures of several fonts, few of each: a font is a class.

With fonts of one family, such as a regular, a bold and a slanted one, classes are styles, and the same letter in a bold
and slanted font is exactly what a mixture of two styles should look like.
Shapes: N images, S pixels per side.
"""

import io
import string
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lightspan.core.errors import UserError, first_lines
from lightspan.core.files.atomic import expanded
from lightspan.core.files.foreign import bounded_memory, bounded_time, content_of
from lightspan.core.files.places import ReadPath
from lightspan.core.ranges import require_in
from lightspan.datamodules.image.sets.small import ImageData, Labelled

SIDE = 28
CHARACTERS = string.ascii_letters + string.digits
SHIPPED = ("DejaVuSans-Bold", "DejaVuSans-Oblique")
"""Fonts of matplotlib; its DejaVuSans and DejaVuSans-BoldOblique are their source and their mixture."""

ROBOTO = Path("/usr/share/fonts/truetype/roboto/unhinted")
"""Of the system package fonts-roboto-unhinted, with 20 styles: weight by width by slant."""


def shipped(name: str) -> Path:
    """The file of a font that matplotlib brings along."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"


def glyphs(path: Path, characters: str = CHARACTERS) -> np.ndarray:
    """Each character in white on black, uint8 [N, S, S], around one centre and on one baseline.

    Raises: UserError for a file that is not a font, or one of which a character is damaged or larger than any picture.
    """
    if ROBOTO in path.parents and not path.exists():
        raise UserError(f"fonts: there is no {path}; install the system package fonts-roboto-unhinted")
    found = np.zeros((len(characters), SIDE, SIDE), dtype=np.uint8)
    try:
        with bounded_memory(), bounded_time():
            font = ImageFont.truetype(io.BytesIO(content_of(path)), size=SIDE * 5 // 7)
            for i, character in enumerate(characters):
                picture = Image.new("L", (SIDE, SIDE))
                ImageDraw.Draw(picture).text((SIDE / 2, SIDE * 5 / 7), character, fill=255, font=font, anchor="ms")
                found[i] = np.asarray(picture)
    # FreeType reads a character when it is drawn. A file of a few bytes may describe one of any size.
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"fonts: {path} is not a font that can be read ({first_lines(error)})") from error
    return found


def common_letters(paths: Sequence[Path]) -> str:
    """Letters that have a case, of all alphabets, that every font has and that fit into the picture in each. Of those
    that look alike in the first font, such as a Latin, a Greek and a Cyrillic A, the first one.

    Raises: UserError for a file that is not a font.
    """
    known = set.intersection(*map(_characters, paths))
    letters = [letter for letter in map(chr, sorted(known)) if unicodedata.category(letter) in ("Lu", "Ll")]
    drawn = [glyphs(path, "".join(letters)) for path in paths]
    edge = np.ones((SIDE, SIDE), bool)
    edge[1:-1, 1:-1] = False
    fits = ~np.any([images[:, edge].any(axis=1) for images in drawn], axis=0) & drawn[0].any(axis=(1, 2))
    first = {drawn[0][i].tobytes(): i for i in reversed(range(len(letters)))}
    return "".join(letters[i] for i in sorted(first.values()) if fits[i])


def _characters(path: Path) -> set[int]:
    """That a font has. Raises: UserError as `common_letters`."""
    from matplotlib.ft2font import FT2Font

    glyphs(path, "")
    try:
        with bounded_memory(), bounded_time():
            return {*FT2Font(io.BytesIO(content_of(path))).get_charmap()}
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"fonts: {path} is not a font that can be read ({first_lines(error)})") from error


class FontShots(ImageData):
    """Characters, 28 x 28 grey: `shots` of each font for training, its others for tests.

    Args:
        fonts: files such as .ttf, one for each class; None is a bold and a slanted one that matplotlib brings along.
        shots: of each font, at least 1 and fewer than there are characters, of which "ascii" has 62.
        draw_seed: of which characters are shots; each font has its own.
        characters: "ascii" is A to Z, a to z and 0 to 9; "letters" those of all alphabets that every font has, as in
            `common_letters`.
        settings: those of `ImageData`.
    """

    image_shape = (1, SIDE, SIDE)

    def __init__(
        self,
        fonts: list[ReadPath] | None = None,
        shots: int = 10,
        draw_seed: int = 0,
        characters: Literal["ascii", "letters"] = "ascii",
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        require_in("[1, inf)" if characters == "letters" else f"[1, {len(CHARACTERS) - 1}]", shots=shots)
        require_in("[0, inf)", draw_seed=draw_seed)
        if fonts is not None and not fonts:
            raise UserError("FontShots fonts=[] leaves nothing to draw with; name files such as .ttf, or leave it out")
        self.fonts, self.shots, self.draw_seed, self.characters = fonts, shots, draw_seed, characters
        self.num_classes = len(SHIPPED if fonts is None else fonts)  # type: ignore[misc]

    def load(self) -> tuple[Labelled, Labelled]:
        named = None if self.fonts is None else [expanded(font, "data.init_args.fonts") for font in self.fonts]
        paths = [shipped(name) for name in SHIPPED] if named is None else named
        characters = CHARACTERS if self.characters == "ascii" else common_letters(paths)
        if self.shots >= len(characters):
            raise UserError(
                f"FontShots shots={self.shots} leaves none of {len(characters)} letters for tests; lower it"
            )
        training, test = [], []
        for i, path in enumerate(paths):
            order = np.random.default_rng((self.draw_seed, i)).permutation(len(characters))
            drawn = glyphs(path, characters)[order]
            training.append(drawn[: self.shots])
            test.append(drawn[self.shots :])
        return _labelled(training), _labelled(test)


def _labelled(images: list[np.ndarray]) -> Labelled:
    return Labelled(np.concatenate(images), np.repeat(np.arange(len(images)), [*map(len, images)]))
