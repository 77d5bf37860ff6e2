"""Pairs of images and texts from WebDataset tar shards, such as CC12M or LAION as img2dataset writes them."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lightspan.core.files.places import ReadPath
from lightspan.datamodules.image.augment.views import Views, view_as_image
from lightspan.datamodules.image_text.batch import ImageTextBatch
from lightspan.datamodules.shards.stream import Decoding, Shards
from lightspan.datamodules.text.tokenized import require_length, tokenized


@dataclass(frozen=True)
class PairDecoding(Decoding):
    """As `Decoding`, with the field `text` as tokens and mask, [T], and one view in place of the image."""

    batch_type = ImageTextBatch

    tokenizer: PreTrainedTokenizerBase
    length: int

    def __call__(self, members: dict[str, Any], seed: int) -> dict[str, Any]:
        sample = view_as_image(super().__call__(members, seed))
        tokens, mask = tokenized(self.tokenizer, [sample.pop("text")], self.length)
        return sample | {"tokens": torch.from_numpy(tokens[0]), "mask": torch.from_numpy(mask[0])}


class ImageTextShards(Shards):
    """Training batches are `ImageTextBatch`, from members such as `KEY.jpg` and `KEY.txt`; order, resume, damage and
    memory are those of `Shards`.

    Validation shards have images with classes, members such as `KEY.jpg` and `KEY.cls`, and give `ImageBatch`: for
    zero-shot classification and probes.

    Args:
        shards, val_shards: as in `Shards`.
        tokenizer: turns a text into tokens, special tokens included.
        length: T, tokens of a text that are read, at least 3.
        view: makes the one view of a training image; None trains on the images themselves.
        image: endings of the images, as in `fields` of `Shards`; texts are `txt` members.
        settings: the others of `Shards`.
    """

    def __init__(
        self,
        shards: list[ReadPath],
        tokenizer: PreTrainedTokenizerBase,
        val_shards: list[ReadPath] | None = None,
        length: int = 77,
        view: Views | None = None,
        image: str = "jpg|jpeg|png|webp",
        **settings: Any,
    ) -> None:
        super().__init__(shards, val_shards, fields={"image": image, "text": "txt"}, views=view, **settings)
        require_length(length)
        self.tokenizer, plain = tokenizer, self.decode
        self.decode = PairDecoding(**vars(plain), tokenizer=tokenizer, length=length)
        self.decode_labelled = replace(
            plain, fields={"image": image, "label": "cls"}, image=replace(plain.image, views=None, made_on="workers")
        )

    def setup(self, stage: str | None = None) -> None:
        """As `Shards.setup`; validation samples then have classes instead of texts."""
        if self.train is None:
            super().setup(stage)
            assert self.val is not None
            self.val = self.val.decoded_by(self.decode_labelled)
