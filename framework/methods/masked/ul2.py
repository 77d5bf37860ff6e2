"""UL2: one network learns to fill in short gaps, long ones and ends of texts, and is told by a token which it is to be.

Source: Tay et al., "UL2: Unifying Language Learning Paradigms", 2022, arXiv 2205.05131, section 3. The mixture of
denoisers and their tokens are `lightspan.datamodules.text.denoising`. A run that begins with the weights of a finished
language model is the continued variant, UL2R (Tay et al., 2022, arXiv 2210.11399).
Shapes: B rows, T tokens of an input, U of a target, V vocabulary, D width, K denoisers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from lightspan.backbones.denoisers import require_denoiser, require_room
from lightspan.core.devices import wide
from lightspan.datamodules.text.batch import DenoisingBatch
from lightspan.evaluation.scores.bits_per_byte import BitsPerByte
from lightspan.nn.heads.pooling import masked_mean
from lightspan.nn.sequences.texts import require_denoising
from lightspan.objectives.means import known_mean
from lightspan.training.method import Method


class UL2(Method):
    """Trains `backbone` to say what is missing in corrupted texts, token by token, given those before it.

    The loss is the mean over the target tokens of all ranks, so a text weighs by its targets: under a high rate of
    corruption more than under a low one. Validation tells, for all denoisers and for each, nats of a target token,
    sentinels and the last one among them, and bits of all of them over the bytes of real text in the targets.

    Args:
        backbone: an encoder with a decoder, or a decoder alone; see `lightspan.backbones.denoisers`.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    Raises: UserError for another network.
    """

    def __init__(self, backbone: nn.Module, **optimization: Any) -> None:
        super().__init__(**optimization)
        self.backbone = require_denoiser(backbone, "UL2")
        self.num_tokens = self.backbone.num_tokens
        self._measure(())

    def setup(self, stage: str) -> None:
        """Takes the names of the denoisers from the data, where there are several.

        Raises: UserError for data whose tokens or rows the backbone has no room for.
        """
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        form: Any = getattr(data, "form", data)  # data of a single denoiser are their own form
        if data is not None and hasattr(form, "inputs") and hasattr(form, "targets"):
            require_room(self.backbone, data.num_tokens, form.inputs + form.targets)
        if hasattr(form, "names") and self.names != form.names:
            self._measure(form.names)

    def nats(self, batch: DenoisingBatch) -> tuple[Tensor, Tensor]:
        """(cross-entropy of each target token, in float32 or wider; which are no padding, bool), both [B U]."""
        require_denoising(batch, type(self).__name__)
        logits_BUV = self.backbone(
            batch["inputs"], batch["input_segments"], batch["decoder_inputs"], batch["target_segments"]
        )
        nats_BU = F.cross_entropy(wide(logits_BUV).transpose(1, 2), batch["targets"].long(), reduction="none")
        return nats_BU, batch["target_segments"] > 0

    def features(self, batch: DenoisingBatch) -> Tensor:
        """The mean of the states of an input, [B D]; of a row with several texts, that of all."""
        require_denoising(batch, type(self).__name__)
        states_BTD = self.backbone.states(batch["inputs"], batch["input_segments"])
        return masked_mean(states_BTD, (batch["input_segments"] > 0).long())

    def training_step(self, batch: DenoisingBatch, batch_idx: int) -> Tensor:
        loss = known_mean(*self.nats(batch))
        self.log_training({"train/loss_nats": loss}, prog_bar=True)
        return loss

    def validation_step(self, batch: DenoisingBatch, batch_idx: int) -> None:
        require_denoising(batch, type(self).__name__, measured=True)
        nats_BU, known_BU = self.nats(batch)
        metrics: Any = zip(self.nats_per_token, self.bits_per_byte, strict=True)
        for place, (nats_per_token, bits_per_byte) in enumerate(metrics):
            those_BU = known_BU & (batch["denoiser"] == place - 1) if place else known_BU
            nats_per_token.update(nats_BU.where(those_BU, 0), those_BU)
            bits_per_byte.update(nats_BU.where(those_BU, 0), batch["target_bytes"].where(those_BU, 0))

    def on_validation_epoch_end(self) -> None:
        metrics: Any
        for label, metrics in (("loss_nats", self.nats_per_token), ("bits_per_byte", self.bits_per_byte)):
            for name, metric in zip(("", *self.names), metrics, strict=True):
                figure = metric.compute()  # over all ranks, so that all log the same
                metric.reset()
                if figure.isfinite():
                    self.log(f"val/{label}_{name}" if name else f"val/{label}", figure, prog_bar=not name)

    def _measure(self, names: tuple[str, ...]) -> None:
        """Metrics of all denoisers together, and of each."""
        self.names, count = names, 1 + len(names)
        with torch.device(self.device):
            self.nats_per_token = nn.ModuleList([MeanMetric().set_dtype(torch.float64) for _ in range(count)])
            self.bits_per_byte = nn.ModuleList([BitsPerByte() for _ in range(count)])
