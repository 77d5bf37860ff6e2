"""Features of texts that go with samples: captions of a data set, or the lines of a file.

Shapes: N texts, D width.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import expanded
from lightspan.core.files.foreign import whole_text
from lightspan.core.files.places import ReadPath
from lightspan.core.tokenizing import cut
from lightspan.evaluation.features.encoded import Split, split_loader
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.features.input import Input
from lightspan.evaluation.features.store import FeatureStore

AT_A_TIME = 256


class EncodedTexts(Input):
    """What an encoder makes of N texts, [N D]. They are short, and computed each time. A subclass knows the texts.

    Args:
        encoder: called with tokens and mask, int64 [B T], such as `lightspan.backbones.text.MeanTokens`; of one that
            has `encode_text`, as `lightspan.backbones.dual_encoder.DualEncoder`, that is called.
        tokenizer: how texts are read.
        length: tokens of a text that are read, special ones included, at least 1.
    """

    def __init__(self, encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, length: int = 128) -> None:
        if length < 1:
            raise UserError(f"{type(self).__name__} length={length} must be at least 1")
        self.encoder: Any = encoder
        self.tokenizer, self.length = tokenizer, length

    @abstractmethod
    def texts(self) -> Sequence[str]:
        """In the order of the samples' index. Raises: UserError where there is none."""

    def load(self, store: FeatureStore) -> Features:
        texts = self.texts()
        # Each once: of equal texts the features are equal to the last bit, whatever they are padded with.
        own = [*dict.fromkeys(texts)]
        modes = [(part, part.training) for part in self.encoder.modules()]
        encode = getattr(self.encoder.to(store.device).eval(), "encode_text", self.encoder)
        rows = list[Tensor]()
        try:
            with torch.no_grad():
                for at in range(0, len(own), AT_A_TIME):
                    read = cut(
                        self.tokenizer, own[at : at + AT_A_TIME], padding=True, padding_side="right",
                        truncation=True, max_length=self.length,
                    )  # fmt: skip
                    given = (torch.as_tensor(read[name]).to(store.device) for name in ("input_ids", "attention_mask"))
                    rows.append(encode(*given).float().cpu())
        finally:
            for part, training in modes:
                part.training = training
        place = {text: number for number, text in enumerate(own)}
        return Features(torch.cat(rows)[[place[text] for text in texts]], index_N=torch.arange(len(texts)))

    def outlook(self, store: FeatureStore) -> str:
        return f"features of {len(self.texts())} texts, to be computed"


class Captions(EncodedTexts):
    """Of the captions of a data set.

    Args:
        data: has `captions`, or for its other splits `val_captions`, by the samples' index, such as
            `lightspan.datamodules.points.sets.ldraw.LDrawParts`.
        split: "bank" (the training samples), "val" or "test".
        encoder, tokenizer, length: as in `EncodedTexts`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        data: LightningDataModule,
        split: Split = "bank",
        length: int = 128,
    ) -> None:
        super().__init__(encoder, tokenizer, length)
        self.data, self.split = data, split

    def texts(self) -> Sequence[str]:
        split_loader(self.data, self.split)  # sets the data up
        found: Sequence[str] = getattr(self.data, "captions" if self.split == "bank" else "val_captions", ())
        if not found:
            raise UserError(
                f"{type(self.data).__name__} has no captions of the split {self.split}; take data that have, or write "
                "them into a file for lightspan.evaluation.features.captions.TextLines"
            )
        return found


class TextLines(EncodedTexts):
    """Of the lines of a text file in UTF-8; line i belongs to sample i. Empty lines count.

    Args:
        path: of the file.
        encoder, tokenizer, length: as in `EncodedTexts`.
    """

    def __init__(
        self, encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, path: ReadPath, length: int = 128
    ) -> None:
        super().__init__(encoder, tokenizer, length)
        self.path = path

    def texts(self) -> Sequence[str]:
        file = expanded(self.path, "path")
        if not file.is_file():
            raise UserError(f"there are no texts at {file}; write one a line, in the order of the samples")
        try:
            text = whole_text(file)
        except ValueError as error:
            raise UserError(f"{file} cannot be read: {error}; write one text a line") from error
        if not text:
            raise UserError(f"{file} has no line; write one text a line, in the order of the samples")
        return text.removesuffix("\n").split("\n")  # splitlines also cuts at characters that texts may hold
