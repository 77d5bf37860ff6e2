"""Features of sentences that name classes, beside features of images from the same encoder.

Shapes: C classes, S sentences of each, D width of the common space.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightspan.core.errors import UserError
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.features.input import Input
from lightspan.evaluation.features.store import FeatureStore
from lightspan.evaluation.probes.zero_shot import class_rows
from lightspan.nn.sequences.texts import names_and_tokenizer


class ClassTexts(Input):
    """What an encoder of images and texts makes of the sentences of all classes: S C rows of length 1, labelled with
    the class. They are few, and computed each time.

    Args:
        encoders: has `encode_text`, as `lightspan.backbones.dual_encoder.DualEncoder`.
        data: has a `tokenizer` and `class_names`, as those of `lightspan.datamodules.image_text`; no image is read.
            None needs the two below.
        templates: S sentences with {} where the class is named.
        class_names, tokenizer: what the classes are called, label by label, and how that is read; None takes those of
            the data.
    Raises: UserError if encoders lack this, or a name or tokenizer is missing, and without a template or for one
        without {}.
    """

    def __init__(
        self,
        encoders: nn.Module,
        data: LightningDataModule | None = None,
        templates: Sequence[str] = ("a photo of a {}",),
        class_names: list[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        if not callable(getattr(encoders, "encode_text", None)):
            raise UserError(
                f"ClassTexts needs encoders with encode_text, and {type(encoders).__name__} has none; take "
                "lightspan.backbones.dual_encoder.DualEncoder"
            )
        self.encoders: Any = encoders
        self.class_names, self.tokenizer = names_and_tokenizer(data, class_names, tokenizer, "ClassTexts")
        self.templates = tuple(templates)

    def load(self, store: FeatureStore) -> Features:
        self.encoders.to(store.device).eval()

        def encode(*text: Tensor) -> Tensor:
            with torch.no_grad():
                return self.encoders.encode_text(*(each.to(store.device) for each in text)).cpu()

        # One sentence at a time: the estimator averages those of a class.
        rows = [class_rows(self.tokenizer, encode, self.class_names, (each,)) for each in self.templates]
        if not rows:
            raise UserError("ClassTexts templates=[] has no sentence; give at least one, such as 'a photo of a {}'")
        return Features(torch.cat(rows), torch.arange(len(self.class_names)).repeat(len(rows)))

    def outlook(self, store: FeatureStore) -> str:
        return f"features of {len(self.class_names)} classes in {len(self.templates)} sentences each, to be computed"
