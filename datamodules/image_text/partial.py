"""Images of which some have a class, some a text and some neither, from tar shards of any such sets together."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lightspan.core.files.places import ReadPath
from lightspan.datamodules.image.augment.views import Views, view_as_image
from lightspan.datamodules.image_text.batch import PartlyLabelledBatch
from lightspan.datamodules.shards.decoders import IMAGES, decode_fields
from lightspan.datamodules.shards.stream import Decoding, Shards
from lightspan.datamodules.text.tokenized import require_length, tokenized


@dataclass(frozen=True)
class PartialDecoding(Decoding):
    """As `Decoding`, of the image alone, with the class and the text that a sample has; one view in place of the
    image.
    """

    batch_type = PartlyLabelledBatch

    tokenizer: PreTrainedTokenizerBase
    length: int

    def __call__(self, members: dict[str, Any], seed: int) -> dict[str, Any]:
        sample = view_as_image(super().__call__(members, seed))
        there = {field: ending for field, ending in (("label", "cls"), ("text", "txt")) if ending in members}
        said = decode_fields(members, there)
        tokens, mask = tokenized(self.tokenizer, [said.get("text", "")], self.length)
        return sample | {
            "tokens": torch.from_numpy(tokens[0]),
            "mask": torch.from_numpy(mask[0]),
            "caption_known": torch.tensor(int("text" in said)),
            "label": torch.tensor(said.get("label", 0)),
            "label_known": torch.tensor(int("label" in said)),
        }


class PartlyLabelledShards(Shards):
    """Batches are `PartlyLabelledBatch`, from members KEY.jpg and, where a sample has them, KEY.cls and KEY.txt; order,
    resume, damage and memory are those of `Shards`. Shards of several sets are mixed as those of one.

    Args:
        shards, val_shards: as in `Shards`.
        tokenizer: turns a text into tokens, special tokens included.
        length: T, tokens of a text that are read, at least 3.
        view: makes the one view of a training image; None trains on the images themselves.
        settings: the others of `Shards` but `fields`.
    """

    def __init__(
        self,
        shards: list[ReadPath],
        tokenizer: PreTrainedTokenizerBase,
        val_shards: list[ReadPath] | None = None,
        length: int = 77,
        view: Views | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(shards, val_shards, fields={"image": "|".join(IMAGES)}, views=view, **settings)
        require_length(length)
        self.tokenizer = tokenizer
        self.decode = PartialDecoding(**vars(self.decode), tokenizer=tokenizer, length=length)
