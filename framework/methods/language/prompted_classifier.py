"""Classification by a language model: the text in a prompt is read, and the words of its label are said.

Source: Uppaal et al., "How Useful is Continued Pre-Training for Generative Unsupervised Domain Adaptation?", 2024,
arXiv 2401.17514: the second of two stages, which learns from labelled texts of a source domain alone and is judged in a
target domain. The first continues to pre-train the same network on raw texts of both domains in the same prompt:
`lightspan.methods.masked.ul2.UL2` with the data `lightspan.datamodules.text.domains.DomainDenoising`. `Discrepancy` in
the place of that first stage is the paper's baseline of invariant features. There is no code of the authors to compare
with. Assumed: the states that are aligned are means over the encoder's last ones, and only they are.
Shapes: B texts, T tokens of a prompt, K labels, U tokens of a label's words, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.denoisers import require_denoiser, require_room
from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in, require_weights
from lightspan.datamodules.text.batch import PromptBatch
from lightspan.nn.heads.pooling import masked_mean
from lightspan.nn.labels import labels_of
from lightspan.nn.sequences.texts import prompts_of, target_prompts_of
from lightspan.objectives.means import known_mean
from lightspan.objectives.mmd import WIDTHS, mmd, require_widths
from lightspan.training.method import Method


class Discrepancy:
    """The discrepancy between source and target, a part of the loss of `PromptedClassifier`.

    Args:
        weight: of it, > 0.
        widths: of the kernels, in units of the mean squared distance.
    """

    def __init__(self, weight: float = 1.0, widths: Sequence[float] = WIDTHS) -> None:
        require_weights(weight=weight)
        require_widths(widths)
        self.weight, self.widths = weight, tuple(widths)


class PromptedClassifier(Method):
    """Trains `backbone` to say the words of a text's label, in nats of a token over the batch of all ranks.

    Prediction ranks the words of all labels by their likelihood. Validation and test log its accuracy and the
    likelihood of the right words among those of all labels.

    Args:
        backbone: an encoder with a decoder, or a decoder alone; see `lightspan.backbones.denoisers`.
        num_classes: K, at least 2.
        alignment: makes states of source and target texts alike; None learns from the source alone.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int = 2,
        alignment: Discrepancy | None = None,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_in("[2, inf)", num_classes=num_classes)
        self.backbone = require_denoiser(backbone, "PromptedClassifier")
        self.num_classes, self.alignment, self.num_tokens = num_classes, alignment, self.backbone.num_tokens

    def setup(self, stage: str) -> None:
        """Raises: UserError for data whose tokens or prompts the backbone has no room for."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and hasattr(data, "num_tokens"):
            longest = getattr(data, "inputs", 0) + getattr(data, "targets", 0)
            require_room(self.backbone, data.num_tokens, longest)

    def features(self, batch: PromptBatch) -> Tensor:
        """The mean of the states of a prompt, [B D]."""
        prompts = prompts_of(batch, "PromptedClassifier")
        return self.pooled(prompts["inputs"], prompts["input_segments"])

    def pooled(self, inputs_BT: Tensor, segments_BT: Tensor) -> Tensor:
        return masked_mean(self.backbone.states(inputs_BT, segments_BT), (segments_BT > 0).long())

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        prompts, label_B = self.prompts(batch), self.labels(batch)
        own = torch.arange(len(label_B), device=label_B.device), label_B
        choice, read, said = (prompts[name][own] for name in ("choices", "decoder_inputs", "choice_segments"))
        task = known_mean(self.nats(prompts, choice, read, said), said > 0)
        if self.alignment is None:
            self.log_training({"train/loss_nats": task}, prog_bar=True)
            return task
        source_BD = self.pooled(prompts["inputs"], prompts["input_segments"])
        target_BD = self.pooled(*target_prompts_of(batch, "PromptedClassifier"))
        apart = mmd(source_BD, target_BD, self.alignment.widths)
        loss = task + self.alignment.weight * apart
        self.log_training({"train/loss": loss, "train/loss_nats": task, "train/discrepancy": apart}, prog_bar=True)
        return loss

    def nats(self, prompts: dict[str, Tensor], choice_BU: Tensor, read_BU: Tensor, said_BU: Tensor) -> Tensor:
        """Cross-entropy of each token of a choice, [B U], in float32 or wider."""
        logits_BUV = self.backbone(prompts["inputs"], prompts["input_segments"], read_BU, said_BU)
        return F.cross_entropy(wide(logits_BUV).transpose(1, 2), choice_BU.long(), reduction="none")

    def scores(self, batch: PromptBatch) -> Tensor:
        """Log-likelihood in nats of the words of each label, [B K]."""
        prompts = self.prompts(batch)
        nats = [
            self.nats(prompts, *(prompts[name][:, k] for name in ("choices", "decoder_inputs", "choice_segments")))
            for k in range(prompts["choices"].shape[1])
        ]
        return -(torch.stack(nats, dim=1) * (prompts["choice_segments"] > 0)).sum(dim=2)

    def prompts(self, batch: PromptBatch) -> dict[str, Tensor]:
        """Raises: UserError for a batch that cannot be read, or with words for another number of labels."""
        prompts = prompts_of(batch, "PromptedClassifier")
        if (found := prompts["choices"].shape[1]) != self.num_classes:
            raise UserError(
                f"this batch has the words of {found} labels, and num_classes={self.num_classes}; set model.init_args."
                f"num_classes={found}"
            )
        return prompts

    def labels(self, batch: PromptBatch) -> Tensor:
        """int64 [B]."""
        return labels_of(batch, "PromptedClassifier", len(batch["inputs"])).long()

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """`scores`, [B K]."""
        return self.scores(batch)

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def evaluate(self, batch: PromptBatch, stage: str) -> None:
        scores_BK, label_B = self.scores(batch), self.labels(batch)
        right_B = scores_BK.argmax(dim=1) == label_B
        nats_B = -scores_BK.log_softmax(dim=1).gather(1, label_B[:, None])[:, 0]
        figures = {f"{stage}/accuracy": right_B.float().mean(), f"{stage}/loss_nats": nats_B.mean()}
        self.log_dict(figures, batch_size=len(label_B), prog_bar=True, sync_dist=True)
