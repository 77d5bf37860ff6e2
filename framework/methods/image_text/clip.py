"""CLIP: images and their captions find each other in one space.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, arXiv 2103.00020,
section 2 and figure 3. The temperature is learned, and after each step held to exp(s) <= 100, as in section 2.5.
Zero-shot classification while training is the callback `lightspan.callbacks.watching.zero_shot.ZeroShot`.
Shapes: B pairs of this rank, C H W image, T tokens, D common width.
"""

import math
from typing import Any

from torch import Tensor, nn

from lightspan.backbones.dual_encoder import DualEncoder
from lightspan.core.ranges import require_in
from lightspan.datamodules.image_text.batch import ImageTextBatch
from lightspan.nn.grad_cache import in_chunks
from lightspan.nn.sequences.texts import captions_of
from lightspan.nn.views import image_of
from lightspan.objectives.info_nce import paired_info_nce
from lightspan.training.method import Method


def clip_loss(image_BD: Tensor, text_BD: Tensor, temperature: float | Tensor) -> Tensor:
    """Mean over the pairs of all ranks of half the cross-entropy from an image to all texts and half of that from a
    text to all images, in nats (figure 3).

    Each rank has the logits of its own rows alone, with gradients through the rows of all: the gradient is that of one
    process with the whole batch.

    Args:
        image_BD, text_BD: row i of both is one pair; lengths do not matter, and ranks may differ in B.
        temperature: > 0; a tensor may be trained.
    Returns: scalar >= 0, the same on all ranks; log N if all N rows are equal, 0 without any pair.
    """
    from_image = paired_info_nce(image_BD, text_BD, temperature)
    return (from_image + paired_info_nce(text_BD, image_BD, temperature)) / 2


class CLIP(Method):
    """Pulls each image and its text together, away from the texts and images of all other pairs of all ranks.

    Args:
        encoders: image and text encoder with their common space. Probes read the image encoder, before its map.
        chunk: pairs that are encoded at once on a rank; all, if None. A smaller number takes less memory and a third
            more time for the same gradient; with gradient accumulation, in contrast, a pair would meet only the others
            of its own part of the batch.
        most_scale: largest 1 / temperature, at least 1.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    least_rows = 2
    keeps_apart = "there are enough negatives (data.init_args.batch_size), and captions differ"

    def __init__(
        self, encoders: DualEncoder, chunk: int | None = None, most_scale: float = 100.0, **optimization: Any
    ) -> None:
        super().__init__(**optimization)
        require_in("[1, inf]", most_scale=most_scale)
        require_in("[1, inf)", chunk=chunk)
        self.encoders, self.chunk, self.most_scale = encoders, chunk, most_scale

    @property
    def backbone(self) -> nn.Module:
        """The image encoder, which gives the features: those before its map to the common space."""
        return self.encoders.image

    def embeddings(self, batch: Any) -> Tensor:
        """Of the images, in the common space, [B D]."""
        return self.encoders.encode_image(batch["image"])

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> Tensor:
        image_BD = in_chunks(self.encoders.encode_image, self.chunk, image_of(batch, "CLIP"))
        text_BD = in_chunks(self.encoders.encode_text, self.chunk, *captions_of(batch, "CLIP")[:2])
        loss = clip_loss(image_BD, text_BD, 1 / self.encoders.scale)
        self.log_training({"train/loss_nats": loss, "train/scale": self.encoders.scale}, prog_bar=True)
        return loss

    def after_optimizer_step(self) -> None:
        self.encoders.log_scale.clamp_(0, math.log(self.most_scale))
