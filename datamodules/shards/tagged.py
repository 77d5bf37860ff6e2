"""Images with the tags that are known of each, from tar shards, such as Open Images' image-level labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightspan.core.errors import UserError, one_line
from lightspan.core.files.places import ReadPath
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.image.augment.views import Views
from lightspan.datamodules.image.batch import TaggedBatch, TaggedViewsBatch
from lightspan.datamodules.shards.decoders import IMAGES, place_of
from lightspan.datamodules.shards.stream import Decoding, Shards


@dataclass(frozen=True)
class TaggedDecoding(Decoding):
    """As `Decoding`, with the field `tags` as two rows of 0 and 1.

    Args:
        num_tags: G.
        complete: whether a tag that is in neither list is known not to hold.
    """

    num_tags: int
    complete: bool

    @property
    def batch_type(self) -> type:
        return self.image.one_of(TaggedBatch, TaggedViewsBatch)

    def __call__(self, members: dict[str, Any], seed: int) -> dict[str, Any]:
        sample = super().__call__(members, seed)
        return sample | tags_in(sample.pop("tags"), self.num_tags, self.complete, place_of(members))


def tags_in(given: Any, num_tags: int, complete: bool, where: str) -> dict[str, torch.Tensor]:
    """`tags` and `tags_known` of a sample, int64 [G], from what its .json member says.

    Args:
        num_tags, complete: as in `TaggedDecoding`.
        where: the sample, for messages.
    Raises: UserError for anything but lists of numbers below G.
    """
    given = {} if given is None else given
    lists = {name: given.get(name, []) for name in ("present", "absent")} if isinstance(given, Mapping) else {}
    numbers = [number for of in lists.values() for number in (of if isinstance(of, list) else [None])]
    right = lists and all(type(number) is int and 0 <= number < num_tags for number in numbers)
    if not right or set(given) - set(lists):
        raise UserError(
            f'{where} has tags {one_line(str(given)[:80])}; its .json member must be {{"present": [...], "absent": '
            f"[...]}}, lists of numbers from 0 to num_tags - 1 = {num_tags - 1}, or null"
        )
    tags_G = torch.zeros(num_tags, dtype=torch.int64)
    known_G = torch.full_like(tags_G, int(complete))
    known_G[lists["absent"]] = 1
    # What is in both lists holds: an annotator saw it.
    tags_G[lists["present"]] = known_G[lists["present"]] = 1
    return {"tags": tags_G, "tags_known": known_G}


class TaggedShards(Shards):
    """Batches have `tags`, int64 [B, G], 1 for each tag that holds, and `tags_known`, int64 [B, G], 0 where nothing is
    known, beside `views` or `image`: `TaggedBatch` or `TaggedViewsBatch`. Order, resume, damage and memory are those of
    `Shards`.

    Args:
        shards, val_shards: as in `Shards`, of members KEY.jpg and KEY.json. The second is {"present": [3, 17],
            "absent": [5]}, tags that an annotator saw and did not see; both lists may be left out.
        num_tags: G, at least 1.
        complete: whether tags that are in neither list count as absent, as in most tag sets, or as unknown.
        views: makes the views of a training image.
        settings: the others of `Shards` but `fields`.
    """

    def __init__(
        self,
        shards: list[ReadPath],
        val_shards: list[ReadPath] | None = None,
        num_tags: int = 9605,
        complete: bool = True,
        views: Views | None = None,
        **settings: Any,
    ) -> None:
        if num_tags < 1:
            raise UserError(f"TaggedShards num_tags={num_tags} must be at least 1")
        require_numbers(2 * num_tags, num_tags=num_tags)
        super().__init__(
            shards, val_shards, fields={"image": "|".join(IMAGES), "tags": "json"}, views=views, **settings
        )
        self.num_tags = num_tags
        self.decode = TaggedDecoding(**vars(self.decode), num_tags=num_tags, complete=complete)
