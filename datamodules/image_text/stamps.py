"""Tux Paint's stamps, photographs and drawings with a caption of one line, from a system package: no download."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import expanded
from lightspan.core.files.foreign import content_of
from lightspan.core.files.places import ReadPath
from lightspan.datamodules.image_text.captioned import Captioned, CaptionedImages
from lightspan.datamodules.shards.headers import UNDECODABLE, open_image

FOLDER = Path("/usr/share/tuxpaint/stamps")
SIDE = 32
TOPICS = (
    *("animals", "clothes", "food", "hobbies", "household", "medical", "military", "naturalforces", "people", "plants"),
    *("seasonal", "space", "sports", "symbols", "town", "vehicles"),
)


def caption_of(picture: Path) -> str | None:
    """The English caption beside a picture: the first line of the text file of that name. None if there is none."""
    text = picture.with_suffix(".txt")
    if not text.is_file():
        return None
    lines = content_of(text).decode(errors="replace").splitlines()
    return lines[0].strip() or None if lines else None


def thumbnail(picture: Path) -> np.ndarray:
    """uint8 [3, SIDE, SIDE]: what a stamp shows, on white, its longer side across the picture."""
    try:
        with open_image(content_of(picture)) as stored:
            stamp = stored.convert("RGBA")
    except UNDECODABLE as error:
        raise UserError(f"{picture} cannot be decoded: {error}; install tuxpaint-stamps-default again") from error
    stamp = stamp.crop(stamp.getchannel("A").getbbox())
    stamp.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    page = Image.new("RGBA", (SIDE, SIDE), "white")
    page.alpha_composite(stamp, ((SIDE - stamp.width) // 2, (SIDE - stamp.height) // 2))
    return np.asarray(page.convert("RGB")).transpose(2, 0, 1)


class Stamps(CaptionedImages):
    """Stamps of 32 x 32 pixels in colour with their English captions and the topic they belong to, one of 16.

    One stamp in five of each folder is for testing, those with one caption together. Mirrored copies and stamps without
    a caption are left out.

    Args:
        root: folder of the stamps; None means the system package tuxpaint-stamps-default.
        settings: those of `CaptionedImages`.
    Raises: UserError at setup if there are no stamps.
    """

    image_shape = (3, SIDE, SIDE)
    class_names = TOPICS

    def __init__(self, root: ReadPath | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.root = root

    def load(self) -> tuple[Captioned, Captioned]:
        folder = FOLDER if self.root is None else expanded(self.root, "data.init_args.root")
        found = {topic: sorted((folder / topic).rglob("*.png")) for topic in TOPICS}
        stamps = [
            (picture, caption, label)
            for label, topic in enumerate(TOPICS)
            for picture in found[topic]
            if "mirror" not in picture.name and (caption := caption_of(picture)) is not None
        ]
        if len(stamps) < 2 * len(TOPICS):
            raise UserError(
                f"{folder} has {len(stamps)} stamps with captions; install the system package tuxpaint-stamps-default, "
                "or set data.init_args.root to the folder that has animals, clothes, food and so on"
            )
        place = {caption: number for number, caption in enumerate(dict.fromkeys(caption for _, caption, _ in stamps))}
        in_test = np.array([place[caption] % 5 == 0 for _, caption, _ in stamps])
        pairs = Captioned(
            np.stack([thumbnail(picture) for picture, _, _ in stamps]),
            [caption for _, caption, _ in stamps],
            np.array([label for _, _, label in stamps], dtype=np.int64),
        )
        return pairs.kept(np.flatnonzero(~in_test)), pairs.kept(np.flatnonzero(in_test))
