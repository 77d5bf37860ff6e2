"""Images of classes and one sentence about each class find each other: a dual encoder trained on a labelled set.

Source: the loss of Lu et al., "Adaptive Rank, Reduced Forgetting: Knowledge Retention in Continual Learning VLMs with
Dynamic Rank-Selective LoRA" (CoDyRA), 2024, arXiv 2412.01004, as its authors' code has it; what they train with it are
`lightspan.adapters.codyra.GatedLoRA` of both encoders. One run is one task: of other tasks no class has a say. The code
divides the second term by the classes of all tasks so far, although those of earlier ones add nothing to it; here it is
divided by those of the task.
Shapes: B images of this rank, N of all ranks, C H W image, C classes, T tokens of a sentence, D common width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightspan.backbones.dual_encoder import DualEncoder
from lightspan.core.devices import wide
from lightspan.core.distributed import all_reduce_sums, gather_rows, register_replicated
from lightspan.core.errors import UserError
from lightspan.core.tokenizing import cut
from lightspan.datamodules.image.batch import ImageBatch
from lightspan.nn.labels import labels_of
from lightspan.nn.sequences.texts import names_and_tokenizer
from lightspan.nn.views import image_of
from lightspan.objectives.classes import label_cross_entropy, share_right
from lightspan.training.method import Method


def from_texts(logits_CN: Tensor, label_B: Tensor, first: int = 0) -> Tensor:
    """-1/C sum_c sum_(n of class c) log softmax_n(logits_cn): each image counts for the text of its class, among the
    images of all ranks. A class without an image adds nothing.

    Args:
        logits_CN: of all texts and the images of all ranks.
        label_B: of this rank's images, which are those from `first` on.
    Returns: scalar >= 0 in nats, the same on all ranks.
    """
    column_B = torch.arange(first, first + len(label_B), device=label_B.device)
    own_B = wide(logits_CN).log_softmax(dim=1)[label_B, column_B]
    (total,) = all_reduce_sums(-own_B.sum())
    return total / len(logits_CN)


class NamedClasses(Method):
    """Trains a dual encoder, or adapters in it, on images of classes that it knows by a sentence about each.

    The loss is the cross-entropy from each image to the sentences of all classes plus that from each sentence to the
    images of all ranks. Sentences are encoded in each step. The temperature stays as it is.

    Args:
        encoders: a trained `DualEncoder`; probes read its image encoder, before the map into the common space.
        template: the sentence, with {} where the class is named.
        class_names, tokenizer: what the classes are called, label by label, and how that is read; None takes those of
            the datamodule. Pictures in folders have the names of these.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    Raises: UserError for other encoders, or a template without {}.
    """

    tokens_CT: Tensor
    mask_CT: Tensor

    def __init__(
        self,
        encoders: nn.Module,
        template: str = "a photo of a {}.",
        class_names: list[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        if not isinstance(encoders, DualEncoder):
            raise UserError(
                f"NamedClasses needs a lightspan.backbones.dual_encoder.DualEncoder, not {type(encoders).__name__}"
            )
        if "{}" not in template:
            raise UserError(f"template={template!r} has no {{}} where the class is named")
        self.encoders, self.template = encoders, template
        self.class_names, self.tokenizer = class_names, tokenizer
        encoders.log_scale.requires_grad_(False)

    @property
    def backbone(self) -> nn.Module:
        """The image encoder, which gives the features."""
        return self.encoders.image

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = getattr(self._trainer, "datamodule", None)
        self.name_classes(*names_and_tokenizer(data, self.class_names, self.tokenizer, "NamedClasses"))

    def name_classes(self, names: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
        """Reads the sentences of the classes. Raises: UserError for one that is longer than the text encoder reads."""
        sentences = [self.template.format(name) for name in names]
        read = cut(tokenizer, sentences, padding=True, padding_side="right")
        # Buffers, so that they go where the method goes; the sentences are no part of a checkpoint.
        for buffer, key in (("tokens_CT", "input_ids"), ("mask_CT", "attention_mask")):
            register_replicated(self, buffer, torch.as_tensor(read[key], device=self.device), persistent=False)
        context, longest = getattr(self.encoders.text, "context", None), self.tokens_CT.shape[1]
        if context is not None and longest > context:
            raise UserError(
                f"the longest sentence has {longest} tokens, and the text encoder {context} positions; shorten the "
                "template or the class names"
            )
        self.num_classes = len(names)

    def class_rows(self) -> Tensor:
        """[C D], rows of length 1, of the sentences."""
        return self.encoders.encode_text(self.tokens_CT, self.mask_CT)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits of all classes, [B C]."""
        return self.encoders.scale * self.encoders.encode_image(image_BCHW) @ self.class_rows().T

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        image_BCHW, label_B = image_of(batch, "NamedClasses"), labels_of(batch, "NamedClasses")
        image_BD, class_CD = self.encoders.encode_image(image_BCHW), self.class_rows()
        image_ND, first = gather_rows(image_BD)
        logits_BC = self.encoders.scale * image_BD @ class_CD.T
        to_text = label_cross_entropy(logits_BC, label_B)
        to_image = from_texts(self.encoders.scale * class_CD @ image_ND.T, label_B, first)
        figures = {
            "train/loss_nats": to_text + to_image,
            "train/image_to_text": to_text,
            "train/text_to_image": to_image,
        }
        figures["train/accuracy"] = share_right(logits_BC, label_B)
        self.log_training(figures, prog_bar=True)
        return figures["train/loss_nats"]

    def on_validation_epoch_start(self) -> None:
        self._rows_CD: Tensor | None = None

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        if self._rows_CD is None:  # in a step, where sharded encoders are gathered
            self._rows_CD = self.class_rows()
        scores_BC = self.encoders.encode_image(image_of(batch, "NamedClasses")) @ self._rows_CD.T
        label_B = labels_of(batch, "NamedClasses")
        accuracy = share_right(scores_BC, label_B)
        self.log("val/accuracy", accuracy, batch_size=len(label_B), sync_dist=True, prog_bar=True)

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Logits [B C]."""
        return self(image_of(batch, "NamedClasses"))
