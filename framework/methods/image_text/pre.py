"""PRE: prompt tokens for a frozen dual encoder, learned through a small network that ties them together.

Source: Minh et al., "PRE: Vision-Language Prompt Learning with Reparameterization Encoder", 2023, arXiv 2309.07760,
after Zhou et al., "Learning to Prompt for Vision-Language Models" (CoOp), 2021, arXiv 2109.01134, which is this class
without the network. A class is read as [start] v_1 ... v_M [name] . [end] with v = E(ctx) + ctx, and
p(c|x) = softmax_c(scale <w_c, z>). The authors' separate network for each token and its other kinds are left out.
Shapes: B images of this rank, C classes, M prompt tokens, T tokens of a name, F width of the text encoder, D common
width.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import PreTrainedTokenizerBase

from lightspan.backbones.dual_encoder import DualEncoder
from lightspan.core.devices import has_values
from lightspan.core.distributed import register_replicated
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.core.tokenizing import cut
from lightspan.datamodules.image.batch import ImageBatch
from lightspan.nn.labels import labels_of
from lightspan.nn.sequences.texts import names_and_tokenizer
from lightspan.nn.views import image_of
from lightspan.nn.widths import require_width
from lightspan.objectives.classes import label_cross_entropy, share_right
from lightspan.training.method import Method


class PRE(Method):
    """Learns M tokens that stand before the name of any class, on few images of the base classes.

    Validation logs val/base_accuracy, of images of base classes among these, val/new_accuracy, of all other classes
    among these, and their harmonic mean, val/harmonic_accuracy.

    Args:
        encoders: a trained `DualEncoder`; it is frozen, always in evaluation mode.
        encoder: E, [M F] -> [M F], such as `lightspan.nn.sequences.token_lstm.TokenLSTM`; None is CoOp. `drop_encoder`
            puts what it gave in its place.
        prompt_tokens: M.
        phrase: text of M tokens, such as "a photo of a", that the prompt begins as; None begins from N(0, 0.02^2).
        base_classes: to train on; None takes all, and there are no new ones.
        class_names, tokenizer: what the classes are called, and how that is read; None takes the datamodule's.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    name_tokens_CT: Tensor
    name_mask_CT: Tensor

    def __init__(
        self,
        encoders: nn.Module,
        encoder: nn.Module | None = None,
        prompt_tokens: int = 4,
        phrase: str | None = None,
        base_classes: list[int] | None = None,
        class_names: list[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        if not isinstance(encoders, DualEncoder) or not hasattr(encoders.text, "read"):
            raise UserError(
                "PRE needs a lightspan.backbones.dual_encoder.DualEncoder whose text encoder reads embedded tokens, "
                f"not {type(encoders).__name__}"
            )
        require_in("[1, inf)", prompt_tokens=prompt_tokens)
        width: Any = encoders.text.num_features
        if encoder is not None:
            require_width(encoder, "encoders.text.num_features", width)
        self.encoders, self.encoder, self.phrase = encoders.requires_grad_(False), encoder, phrase
        self.base_classes, self.class_names, self.tokenizer = base_classes, class_names, tokenizer
        self.prompt_tokens = nn.Parameter(0.02 * torch.randn(prompt_tokens, width))
        self.base_accuracy, self.new_accuracy = MeanMetric(), MeanMetric()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.encoders.eval()
        return self

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        names, tokenizer = names_and_tokenizer(data, self.class_names, self.tokenizer, "PRE")
        self.name_classes(tokenizer, names)

    def name_classes(self, tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> None:
        """Reads the names of the classes, and the phrase that the prompt begins as.

        Raises: UserError for a phrase of another number of tokens than the prompt, base classes that have no name, or
            prompts that the text encoder has no positions for.
        """
        classes = self.base_classes
        if classes is not None and (not classes or not set(classes) <= set(range(len(names)))):
            raise UserError(f"PRE base_classes={classes} must name some of the {len(names)} classes, counted from 0")
        read = cut(tokenizer, [f"{name}." for name in names], padding=True, padding_side="right")
        device, rows = self.prompt_tokens.device, len(self.prompt_tokens)
        # Buffers, so that they go where the method goes; the names are no part of a checkpoint.
        for buffer, key in (("name_tokens_CT", "input_ids"), ("name_mask_CT", "attention_mask")):
            register_replicated(self, buffer, torch.as_tensor(read[key], device=device), persistent=False)
        longest, context = self.name_tokens_CT.shape[1] + rows, getattr(self.encoders.text, "context", None)
        if context is not None and longest > context:
            raise UserError(
                f"the longest prompt has {longest} tokens, {rows} of them learned, and the text encoder {context} "
                "positions; lower prompt_tokens or shorten the class names"
            )
        self.num_classes = len(names)
        if self.phrase is not None:
            words = torch.as_tensor(cut(tokenizer, self.phrase, add_special_tokens=False)["input_ids"], device=device)
            if len(words) != rows:
                raise UserError(
                    f"phrase={self.phrase!r} has {len(words)} tokens, but prompt_tokens={rows}; make them equal"
                )
            text: Any = self.encoders.text
            with torch.no_grad():
                self.prompt_tokens.copy_(text.tokens(words))

    def prompt(self) -> Tensor:
        """v, [M F]."""
        ctx_MF = self.prompt_tokens
        return ctx_MF if self.encoder is None else self.encoder(ctx_MF) + ctx_MF

    @torch.no_grad()
    def drop_encoder(self) -> None:
        """Keeps v alone: the same classifier without E."""
        self.prompt_tokens.copy_(self.prompt())
        self.encoder = None

    def class_rows(self, classes: Sequence[int] | None = None) -> Tensor:
        """w, [C D], rows of length 1, of these classes; None takes all."""
        kept = slice(None) if classes is None else list(classes)
        tokens_CT, mask_CT = self.name_tokens_CT[kept], self.name_mask_CT[kept]
        text: Any = self.encoders.text
        name_CTF = text.tokens(tokens_CT)
        prompt_CMF = self.prompt().to(name_CTF.dtype).expand(len(tokens_CT), -1, -1)
        embedded = torch.cat([name_CTF[:, :1], prompt_CMF, name_CTF[:, 1:]], dim=1)
        mask = torch.cat([mask_CT.new_ones(prompt_CMF.shape[:2]), mask_CT], dim=1)
        return self.encoders.map_text(text.read(embedded, mask))

    def logits(self, image_BCHW: Tensor, class_CD: Tensor) -> Tensor:
        """[B C]."""
        return self.encoders.scale * self.encoders.encode_image(image_BCHW) @ class_CD.T

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits of all classes, [B C]."""
        return self.logits(image_BCHW, self.class_rows())

    def features(self, batch: Any) -> Tensor:
        """Of the frozen image encoder, before its map to the common space."""
        return self.encoders.image(batch["image"])

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """Raises: UserError for images to train on that are of no base class."""
        batch = super()._on_before_batch_transfer(batch, dataloader_idx)
        if self._trainer is not None and not self.trainer.training:
            return batch
        label_B = labels_of(batch, "PRE")
        if label_B.device.type == "cpu" and has_values(label_B):
            new = sorted(set(label_B.tolist()) - set(self._base()))
            if new:
                raise UserError(
                    f"label {new[0]} is not one of the {len(self._base())} base classes; train on images of these "
                    "alone (data.init_args.train_classes)"
                )
        return batch

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        place_C = torch.zeros(int(self.num_classes or 0), dtype=torch.int64, device=self.device)
        place_C[self._base()] = torch.arange(len(self._base()), device=self.device)
        label_B = place_C[labels_of(batch, "PRE")]
        logits_BC = self.logits(image_of(batch, "PRE"), self.class_rows(self._base()))
        loss, accuracy = label_cross_entropy(logits_BC, label_B), share_right(logits_BC, label_B)
        self.log_training({"train/loss_nats": loss, "train/accuracy": accuracy}, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self._rows_CD: Tensor | None = None

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        if self._rows_CD is None:  # in a step, where sharded encoders are gathered
            self._rows_CD = self.class_rows()
        logits_BC = self.logits(image_of(batch, "PRE"), self._rows_CD)
        is_base_C = torch.zeros(logits_BC.shape[1], dtype=torch.bool, device=logits_BC.device)
        is_base_C[self._base()] = True
        label_B = labels_of(batch, "PRE")
        of_base_B = is_base_C[label_B]
        among_own_BC = of_base_B[:, None] == is_base_C
        right_B = logits_BC.masked_fill(~among_own_BC, -torch.inf).argmax(dim=1) == label_B
        for metric, here_B in ((self.base_accuracy, of_base_B), (self.new_accuracy, ~of_base_B)):
            if here_B.any():
                metric.update(right_B[here_B].float())

    def on_validation_epoch_end(self) -> None:
        figures = {"val/base_accuracy": (base := self.base_accuracy.compute())}
        if len(self._base()) < int(self.num_classes or 0):
            new = self.new_accuracy.compute()
            figures |= {"val/new_accuracy": new, "val/harmonic_accuracy": harmonic_mean(base, new)}
        self.log_dict(figures, prog_bar=True)
        self.base_accuracy.reset()
        self.new_accuracy.reset()

    def _base(self) -> list[int]:
        return list(range(int(self.num_classes or 0))) if self.base_classes is None else self.base_classes


def harmonic_mean(base: Tensor, new: Tensor) -> Tensor:
    """2 B N / (B + N), 0 if both are 0."""
    return 2 * base * new / (base + new).clamp_min(torch.finfo(base.dtype).tiny)
