"""Spoken captions of Tux Paint's stamps in ten languages, from a system package: no download."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import expanded
from lightspan.core.files.foreign import content_of
from lightspan.core.files.places import ReadPath
from lightspan.datamodules.audio.data import AudioData

FOLDER = Path("/usr/share/tuxpaint/stamps")
LANGUAGES = ("be", "bg", "ca", "da", "el", "es", "fr", "nn", "ro", "ru")
"""Those with more than 300 recordings in Debian's package."""
KEYWORDS = ("letter", "sign", "hat", "pair", "red", "yellow", "truck", "planet", "flag", "yen")
"""Words of the English captions that several stamps share."""


def english(recording: Path) -> str:
    """The English caption beside a recording NAME_desc_LANGUAGE.ogg, the first line of NAME.txt; empty without one."""
    text = recording.with_name(recording.name.split("_desc_")[0] + ".txt")
    if not text.is_file():
        return ""
    return content_of(text).decode(errors="replace").partition("\n")[0].strip()


def keyword(caption: str) -> int:
    """The place in KEYWORDS of the first that a caption has, also as a plural; their number if it has none."""
    words = "".join(letter if letter.isalnum() else " " for letter in caption.lower()).split()
    found = (place for place, word in enumerate(KEYWORDS) if word in words or f"{word}s" in words)
    return next(found, len(KEYWORDS))


class SpokenCaptions(AudioData):
    """About 7,800 recordings of 1.4 s on average, in which one or a few speakers of each language say what a stamp
    shows: batches of `SpokenBatch`. The label is the language. Few people speak each, so a probe of languages also
    tells speakers apart.

    Stamps are divided into training, validation and test by a hash of their English captions: no stamp, and no two
    stamps of one caption, are on both sides, in whatever language. Sounds of what a stamp shows (NAME.ogg) are left
    out.

    Args:
        root: folder of the stamps; None means the system package tuxpaint-stamps-default.
        languages: as the files name them.
        val_share, test_share: shares of the captions, each above 0, together below 1.
        seconds: as in `AudioData`; 4 holds 97 % of the recordings whole.
        skip_damaged: as in `AudioData`, but True unless it is set: one recording of Debian's package ends too early.
        settings: those of `AudioData`.
    Raises: UserError at setup if there are no recordings of a language.
    """

    def __init__(
        self,
        root: ReadPath | None = None,
        languages: tuple[str, ...] = LANGUAGES,
        val_share: float = 0.1,
        test_share: float = 0.2,
        seconds: float = 4.0,
        skip_damaged: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(seconds=seconds, skip_damaged=skip_damaged, **settings)
        if min(val_share, test_share) <= 0 or val_share + test_share >= 1:
            raise UserError(f"val_share={val_share} and test_share={test_share} must be above 0, and together below 1")
        if not languages or len(set(languages)) < len(languages):
            raise UserError(f"languages={list(languages)} must name at least one, and each once")
        self.root, self.languages, self.val_share, self.test_share = root, tuple(languages), val_share, test_share

    @property
    def num_classes(self) -> int:
        return len(self.languages)

    def find(self) -> tuple[list[Path], dict[str, np.ndarray], dict[str, np.ndarray]]:
        folder = FOLDER if self.root is None else expanded(self.root, "data.init_args.root")
        spoken = sorted(folder.rglob("*_desc_*.ogg"))
        found = [[file for file in spoken if file.stem.split("_desc_")[1] == name] for name in self.languages]
        if lacking := [name for name, files in zip(self.languages, found, strict=True) if not files]:
            raise UserError(
                f"{folder} has no spoken captions of language {lacking[0]} (files *_desc_{lacking[0]}.ogg); install "
                "the system package tuxpaint-stamps-default, set data.init_args.root to the folder that has animals, "
                "clothes, food and so on, or name other data.init_args.languages"
            )
        self.classes = self.languages
        files = [file for of_language in found for file in of_language]
        stems = [file.parent / file.name.split("_desc_")[0] for file in files]
        of_stem = {stem: english(file) for stem, file in zip(stems, files, strict=True)}
        captions = [of_stem[stem] for stem in stems]
        shares = np.array(
            [_share(caption or file.name.split("_desc_")[0]) for caption, file in zip(captions, files, strict=True)]
        )
        labels = {
            "label": np.repeat(np.arange(len(found)), [len(of_language) for of_language in found]),
            "keyword": np.array([keyword(caption) for caption in captions], dtype=np.int64),
        }
        tests, validates = shares < self.test_share, shares < self.test_share + self.val_share
        parts = {"train": ~validates, "val": validates & ~tests, "test": tests}
        return files, labels, {name: np.flatnonzero(part) for name, part in parts.items()}


def _share(caption: str) -> float:
    """A number in [0, 1) that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:6], "big") / 2**48
