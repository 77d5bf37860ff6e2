"""Words in printed letters on textured grounds. The words are those of the standard library's own sources.

Shapes: B pictures, H W picture in pixels, T characters.
"""

import functools
import re
import string
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import PreTrainedTokenizerBase

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import expanded
from lightspan.datamodules.rendered.batch import SpelledWordBatch, WordBatch
from lightspan.datamodules.rendered.data import PARTS, ChannelMoments, RenderedSamples, RenderedSets, require_pictures
from lightspan.datamodules.rendered.draws import Draws
from lightspan.datamodules.rendered.scenes import Style, finished
from lightspan.datamodules.text.spelling import SENTENCE, sentences, spelled
from lightspan.datamodules.text.tokenized import require_length, tokenized

MODULES: tuple[str, ...] = (
    "argparse",
    "ast",
    "calendar",
    "configparser",
    "datetime",
    "difflib",
    "doctest",
    "inspect",
    "locale",
)
MODULES += ("mailbox", "optparse", "pathlib", "pdb", "pickle", "pydoc", "shutil", "socket", "statistics", "subprocess")
MODULES += ("tarfile", "tempfile", "threading", "turtle", "typing", "uuid", "zipfile")
ALPHABET = string.ascii_lowercase  # character i + 1 is letter i; 0 stands behind a word's end
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Italic", "STIXGeneral", "cmr10")
CAPITAL = 64  # size in which a word is set before it is shrunk into the picture
SHARES = {"training": 80, "validation": 90, "test": 100}  # words by a hash of theirs in [0, 100)


@functools.cache
def vocabulary(longest: int) -> dict[str, tuple[str, ...]]:
    """Words of 2 to `longest` letters by set; no word is in two. They depend on Python's version."""
    library = Path(functools.__file__).parent
    found: set[str] = set()
    for name in MODULES:
        for path in (library / f"{name}.py", library / name / "__init__.py"):  # some became packages
            if path.is_file():
                found |= set(re.findall(r"[a-z]{2,}", path.read_text(encoding="utf-8").lower()))
    parts: dict[str, tuple[str, ...]] = {}
    least = 0
    for part, end in SHARES.items():
        parts[part] = tuple(
            sorted(w for w in found if len(w) <= longest and least <= zlib.crc32(w.encode()) % 100 < end)
        )
        least = end
    return parts


def font_files(fonts: list[str] | None) -> tuple[str, ...]:
    """Paths of fonts; None is those that matplotlib brings along.

    Raises: UserError for a file that is not a font.
    """
    if fonts is None:
        import matplotlib

        folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        return tuple(str(folder / f"{name}.ttf") for name in FONTS)
    if not fonts:
        raise UserError("fonts=[] leaves nothing to print with; name files such as .ttf, or leave it out")
    paths = [expanded(font, "data.init_args.fonts") for font in fonts]
    for path in paths:
        try:
            ImageFont.truetype(str(path), CAPITAL)
        except OSError as error:
            raise UserError(f"fonts: {path} is not a font that can be read ({error})") from error
    return tuple(map(str, paths))


@functools.lru_cache(maxsize=64)
def _font(path: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, CAPITAL)


@functools.lru_cache(maxsize=4096)
def _set(word: str, path: str) -> Image.Image:
    """A word in white on black, as large as its letters."""
    left, top, right, bottom = map(int, _font(path).getbbox(word))
    picture = Image.new("L", (right - left + 2, bottom - top + 2))
    ImageDraw.Draw(picture).text((1 - left, 1 - top), word, fill=255, font=_font(path))
    return picture


class Printed(NamedTuple):
    """images: uint8 [B, 3, H, W]; ink: float32 [B, H, W], the share of a pixel that letters cover; words: B of them."""

    images: np.ndarray
    ink: np.ndarray
    words: list[str]


class WordRenderer(NamedTuple):
    """What draws words: a vocabulary, fonts as paths, sides in pixels, and grain."""

    words: tuple[str, ...]
    fonts: tuple[str, ...]
    height: int
    width: int
    grain: float

    def chosen(self, seed: int, numbers: np.ndarray) -> np.ndarray:
        """The place in the vocabulary of each sample's word, int64 [B]."""
        return Draws(seed, numbers, 10).integers(len(self.words))

    def pictures(self, seed: int, numbers: np.ndarray) -> Printed:
        """The pictures with these numbers: words that fill most of the width or height, a little turned and slanted."""
        words, draws = [self.words[i] for i in self.chosen(seed, numbers)], Draws(seed, numbers, 11)
        font, numbers_of = draws.integers(len(self.fonts)), draws.uniform(5)
        ink = np.stack([self._ink(*each) for each in zip(words, font, numbers_of, strict=True)] or [self._blank()])
        ink = ink[: len(numbers)].astype(np.float32) / 255
        image = _mottled(draws, self.height, self.width)
        # Letters are brighter than the ground's brightest, or darker than its darkest: they can always be read.
        bright = (draws.uniform() < 0.5)[:, None]
        paint = np.where(bright, draws.between(0.75, 1.0, 3), draws.between(0.0, 0.25, 3))
        image += ink[:, None] * (paint[:, :, None, None] - image)
        return Printed(finished(image, draws, Style(grain=self.grain)), ink, words)

    def _blank(self) -> np.ndarray:
        return np.zeros((self.height, self.width), dtype=np.uint8)

    def _ink(self, word: str, font: int, numbers: np.ndarray) -> np.ndarray:
        glyphs = _set(word, self.fonts[font])
        size, turn, slant, right, down = (float(number) for number in numbers)
        # From a pixel of the picture to one of the glyphs: shrunk, turned and slanted about the middles of both.
        scale = max(glyphs.width / self.width, glyphs.height / self.height) / (0.7 + 0.2 * size)
        angle, slant = np.radians(8 * turn - 4), 0.4 * slant - 0.2
        matrix = (
            scale * np.array([[1, slant], [0, 1]]) @ [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        )
        free = [max(n - m / scale, 0) for n, m in ((self.width, glyphs.width), (self.height, glyphs.height))]
        middle = [
            n / 2 + 0.6 * f * (s - 0.5) for n, f, s in zip((self.width, self.height), free, (right, down), strict=True)
        ]
        shift = np.array([glyphs.width / 2, glyphs.height / 2]) - matrix @ middle
        # Smoothed by shrinking: a transform alone would leave out pixels of large glyphs.
        shrink = max(1, int(scale))
        small = glyphs.reduce(shrink) if shrink > 1 else glyphs
        rows = (*(matrix[0] / shrink), shift[0] / shrink, *(matrix[1] / shrink), shift[1] / shrink)
        return np.asarray(
            small.transform((self.width, self.height), Image.Transform.AFFINE, rows, Image.Resampling.BILINEAR)
        )


def _mottled(draws: Draws, height: int, width: int) -> np.ndarray:
    """Grounds of two soft waves between colours of middle brightness, float32 [B, 3, H, W] in [0.35, 0.65]."""
    y, x = np.mgrid[:height, :width].astype(np.float32) / np.float32(height)
    image = np.empty((draws.count, 3, height, width), dtype=np.float32)
    image[:] = draws.between(0.42, 0.58, 3)[:, :, None, None]
    for _ in range(2):
        across, down, phase = (draws.between(-14, 14) for _ in range(3))
        wave = np.sin(across[:, None, None] * x + down[:, None, None] * y + phase[:, None, None])
        image += wave[:, None] * draws.between(-0.035, 0.035, 3)[:, :, None, None]
    return image


class WordSamples(RenderedSamples):
    """Samples of `WordBatch`, or with a tokenizer of `SpelledWordBatch`."""

    def __init__(
        self,
        first: int,
        count: int,
        renderer: WordRenderer,
        longest: int,
        draw_seed: int,
        moments: ChannelMoments,
        tokenizer: PreTrainedTokenizerBase | None,
        sentence: str,
        length: int,
    ) -> None:
        super().__init__(first, count)
        self.renderer, self.longest, self.draw_seed, self.moments = renderer, longest, draw_seed, moments
        self.tokenizer, self.sentence, self.length = tokenizer, sentence, length

    @property
    def batch_type(self) -> type:
        return WordBatch if self.tokenizer is None else SpelledWordBatch

    def draw(self, numbers: np.ndarray, seeds: np.ndarray) -> dict[str, Any]:
        printed = self.renderer.pictures(self.draw_seed, numbers)
        fields = {
            "ink": (printed.ink >= 0.5).astype(np.int64),
            "characters": spelled(printed.words, self.longest, ALPHABET),
            "label": self.renderer.chosen(self.draw_seed, numbers),
        }
        if self.tokenizer is not None:
            said = sentences(printed.words, self.sentence)
            fields["tokens"], fields["mask"] = tokenized(self.tokenizer, said, self.length)
        tensors = {name: torch.from_numpy(field) for name, field in fields.items()}
        return {"image": self.moments.standardised(printed.images), **tensors}


class PrintedWords(RenderedSets):
    """Pictures of printed words: batches of `WordBatch`, or with a tokenizer of `SpelledWordBatch`. No word of one set
    is in another.

    Args:
        height, width: of a picture in pixels, at least 1.
        longest: T, letters of the longest word, at least 2.
        fonts: paths of font files; None is the seven that matplotlib brings along.
        grain: standard deviation of the noise on each channel, where white is 1.
        tokenizer: turns a sentence with the word into tokens, special tokens included; None leaves sentences out.
        sentence: with {} where the word goes.
        length: tokens of a sentence that are read, special ones included, at least 3.
        settings: those of `RenderedSets`.
    """

    def __init__(
        self,
        height: int = 32,
        width: int = 96,
        longest: int = 10,
        fonts: list[str] | None = None,
        grain: float = 0.05,
        tokenizer: PreTrainedTokenizerBase | None = None,
        sentence: str = SENTENCE,
        length: int = 32,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        require_length(length)
        sentences([], sentence)
        if min(height, width) < 1 or longest < 2 or grain < 0:
            raise UserError(
                f"words of longest={longest} letters in height={height} and width={width} pixels with grain={grain}: "
                "longest must be at least 2, sides at least 1, and grain at least 0"
            )
        require_pictures(longest + height * width, height=height, width=width, longest=longest)
        self.height, self.width, self.longest, self.fonts, self.grain = height, width, longest, fonts, grain
        self.tokenizer, self.sentence, self.length = tokenizer, sentence, length
        self.num_classes = len(vocabulary(longest)["training"])

    def renderer(self, part: str) -> WordRenderer:
        """What draws the words of training, validation or test."""
        return WordRenderer(vocabulary(self.longest)[part], font_files(self.fonts), self.height, self.width, self.grain)

    def pictures(self, numbers: np.ndarray) -> np.ndarray:
        return self.renderer("training").pictures(self.draw_seed, numbers).images

    def samples(self, first: int, count: int, moments: ChannelMoments) -> WordSamples:
        part = next(name for name, start in PARTS.items() if start == first)
        read = self.tokenizer, self.sentence, self.length
        return WordSamples(first, count, self.renderer(part), self.longest, self.draw_seed, moments, *read)
