"""Two photographs of each scene from tar shards, such as CroCo's renders of Habitat's rooms from two places."""

from dataclasses import dataclass, replace
from typing import Any

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.datamodules.image.augment.views import Views
from lightspan.datamodules.image.batch import PairBatch
from lightspan.datamodules.shards.decoders import IMAGES, place_of
from lightspan.datamodules.shards.stand_ins import NOWHERE, black_png
from lightspan.datamodules.shards.stream import Decoding, Shards


@dataclass(frozen=True)
class PairedDecoding(Decoding):
    """Both pictures of a sample as its views, each changed at random by itself."""

    batch_type = PairBatch

    def __call__(self, members: dict[str, Any], seed: int) -> dict[str, Any]:
        names = sorted(name for name in members if name.rpartition(".")[2] in IMAGES)
        if len(names) != 2:
            raise UserError(
                f"{place_of(members)} has {len(names)} pictures; a pair has two, such as KEY.1.jpg and KEY.2.jpg"
            )
        views = []
        for number, name in enumerate(names):
            made = super().__call__(members | {name.rpartition(".")[2]: members[name]}, 2 * seed + number)
            views += made.get("views", [made.get("image")])
        return {"views": views}


class PairedShards(Shards):
    """Batches are `PairBatch`: the two photographs of each scene in the order of their names. Order, resume, damage and
    memory are those of `Shards`; a sample is a pair.

    Args:
        shards, val_shards: as in `Shards`. A pair has two members such as KEY.1.jpg and KEY.2.jpg.
        view: makes the one view of a training photograph, drawn for each by itself; None leaves them as they are.
        settings: `batch_size`, `image_size`, `mean`, `std`, `window`, `seed`, `num_workers` and the others of `Shards`
            but `fields`, `views` and `views_on`.
    """

    def __init__(
        self,
        shards: list[ReadPath],
        val_shards: list[ReadPath] | None = None,
        view: Views | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(shards, val_shards, fields={"image": "|".join(IMAGES)}, **settings)
        image = replace(self.decode.image, views=view)
        self.decode = PairedDecoding(**vars(self.decode) | {"image": image})

    def example(self) -> dict[str, Any]:
        """A pair of black pictures."""
        return self.decode(NOWHERE | dict.fromkeys(("1.png", "2.png"), black_png(256, 256)), seed=0)
