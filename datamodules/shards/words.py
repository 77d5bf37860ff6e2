"""Pictures of words from tar shards, such as Union14M-L's."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torchvision.transforms.v2 import functional as F

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.image.augment.views import Views, view_as_image
from lightspan.datamodules.image.batch import ReadingBatch
from lightspan.datamodules.shards.decoders import IMAGES, decode_fields, place_of
from lightspan.datamodules.shards.stand_ins import NOWHERE, black_png
from lightspan.datamodules.shards.stream import Decoding, Shards
from lightspan.datamodules.text.spelling import normalised, require_alphabet, spelled

LEFT_OUT = "data.init_args.skip_damaged=true takes another sample in place of each such word"


@dataclass(frozen=True)
class WordDecoding(Decoding):
    """A picture scaled to `sides`, with one view in its place, and its word as letters.

    Args:
        sides: height and width in pixels.
        longest, alphabet: as in `spelled`.
    """

    batch_type = ReadingBatch

    sides: tuple[int, int]
    longest: int
    alphabet: str

    def __call__(self, members: dict[str, Any], seed: int) -> dict[str, Any]:
        decoded = decode_fields(members, self.fields)
        where = place_of(members)
        word = normalised(decoded["text"])
        if not word:
            raise UserError(
                f"{where} has the word {decoded['text'][:40]!r}, of which no letter of ASCII is left; {LEFT_OUT}"
            )
        try:
            letters = spelled([word], self.longest, self.alphabet)[0]
        except UserError as error:
            raise UserError(f"{where}: {error}; {LEFT_OUT}") from error
        image = F.resize_image(decoded["image"], list(self.sides), antialias=True)
        return view_as_image(self.image(image, seed)) | {"characters": torch.from_numpy(letters)}


class WordShards(Shards):
    """Batches are `ReadingBatch`, from members KEY.jpg and KEY.txt, the word on the picture; order, resume, damage and
    memory are those of `Shards`. Words are `lightspan.datamodules.text.spelling.normalised`. One that is empty, too
    long or has other letters stops the run, or with `skip_damaged` another takes its place.

    Args:
        shards, val_shards: as in `Shards`.
        alphabet: letters in the order of their numbers; None is the 94 printable characters of ASCII.
        longest: T, letters of the longest word, at least 1.
        sides: height and width in pixels to which each picture is scaled, whatever its shape.
        view: makes the one view of a training picture after that; None trains on the pictures themselves.
        settings: the others of `Shards` but `fields`, `image_size`, `views` and `views_on`.
    """

    def __init__(
        self,
        shards: list[ReadPath],
        val_shards: list[ReadPath] | None = None,
        alphabet: str | None = None,
        longest: int = 25,
        sides: tuple[int, int] = (32, 128),
        view: Views | None = None,
        **settings: Any,
    ) -> None:
        fields = {"image": "|".join(IMAGES), "text": "txt"}
        super().__init__(shards, val_shards, fields=fields, image_size=None, views=view, views_on="workers", **settings)
        if longest < 1 or min(sides) < 1:
            raise UserError(f"WordShards longest={longest} and both of sides={[*sides]} must be at least 1")
        require_numbers(longest + 3 * math.prod(sides), longest=longest, sides=sides)
        self.alphabet, self.longest = require_alphabet(alphabet), longest
        self.decode = WordDecoding(**vars(self.decode), sides=sides, longest=longest, alphabet=self.alphabet)

    def example(self) -> dict[str, Any]:
        """A black picture of a word of one letter."""
        return self.decode(NOWHERE | {"png": black_png(64, 256), "txt": self.alphabet[0].encode()}, seed=0)
