"""TERA: a Transformer rebuilds clean spectrograms of speech from ones altered in time, frequency and magnitude.

Source: Liu, Li, Lee, "TERA: Self-Supervised Learning of Transformer Encoder Representation for Speech", 2020, arXiv
2007.06028, as published in 2021, and the authors' code in s3prl. Loss: the mean of |guess - clean| over all labelled
cells, so that wide bands weigh more than blocks of frames; what is labelled says
`lightspan.nn.masking.spectrogram_alterations`.
Differences: a step without any labelled cell has loss 0 and leaves the weights to the optimiser, where the code ends
with an error; a recording ends where its length says, where the code ends it at the first frames whose features
add up to zero; draws are functions of seed, step and recording.
Unverified: that the head's hidden layer is as wide as the encoder, as in BERT.
Shapes: B recordings of this rank, S samples, T frames, F mel bands, D width of the encoder.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightspan.backbones.frames import FrameTransformer
from lightspan.core.errors import UserError
from lightspan.datamodules.audio.batch import AudioBatch
from lightspan.nn.audio.log_mel import LogMel, Spectrogram
from lightspan.nn.audio.waves import waves_of
from lightspan.nn.image_numbers import index_in
from lightspan.nn.init import bert_normal_
from lightspan.nn.masking.hidden_patches import Reconstruction
from lightspan.nn.masking.spectrogram_alterations import Altered, SpectrogramAlterations
from lightspan.nn.tokens import Tokens, valid_mean
from lightspan.objectives.masked import hidden_absolute_error
from lightspan.training.method import Method


class TERA(Method):
    """The encoder is kept, without the head that guesses: its features are the mean of a recording's valid frames.

    Each labelled cell of all ranks weighs the same. With accumulated gradients each micro-batch is a mean over its own
    cells, as in the code.

    Args:
        backbone: its `bands` are the mel bands.
        front: makes the spectrograms; None is `LogMel` of 16 kHz, of as many bands as the backbone reads.
        alterations: None is the authors' main configuration, time and frequency.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    Raises: UserError for another number of bands.
    """

    def __init__(
        self,
        backbone: FrameTransformer,
        front: LogMel | None = None,
        alterations: SpectrogramAlterations | None = None,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        self.front = front or LogMel(mels=backbone.bands)
        if self.front.mels != backbone.bands:
            raise UserError(
                f"TERA front.mels={self.front.mels} and backbone.bands={backbone.bands} must be equal; change one of "
                "them"
            )
        width = backbone.num_features
        self.backbone, self.alterations = backbone, alterations or SpectrogramAlterations()
        self.head = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, backbone.bands)
        )
        bert_normal_(self.head, width)

    def spectrogram(self, batch: AudioBatch) -> Spectrogram:
        """Clean, as the front end makes it."""
        return self.front(*waves_of(batch, self))

    def altered(self, batch: AudioBatch, step: int) -> tuple[Spectrogram, Altered]:
        """(clean spectrograms, what is seen of them in this step)."""
        clean = self.spectrogram(batch)
        return clean, self.alterations(*clean, index_in(batch, self), step)

    def guesses(self, batch: AudioBatch, step: int) -> tuple[Spectrogram, Altered, Tensor]:
        """(clean spectrograms, what is seen of them in this step, guesses [B T F])."""
        clean, altered = self.altered(batch, step)
        return clean, altered, self.head(self.backbone(altered.frames_BTF, clean.valid_BT))

    def training_step(self, batch: AudioBatch, batch_idx: int) -> Tensor:
        clean, altered, guess_BTF = self.guesses(batch, self.global_step)
        loss = hidden_absolute_error(guess_BTF, clean.frames_BTF, altered.labelled_BTF)
        self.log_training({"train/loss": loss})
        return loss

    def validation_step(self, batch: AudioBatch, batch_idx: int) -> None:
        """Logs val/loss, with the alterations of step 0 in each validation."""
        clean, altered, guess_BTF = self.guesses(batch, 0)
        loss = hidden_absolute_error(guess_BTF, clean.frames_BTF, altered.labelled_BTF)
        self.log("val/loss", loss, sync_dist=True, batch_size=len(guess_BTF))

    def features(self, batch: AudioBatch) -> Tensor:
        """Mean of the last block over the valid frames, float [B D]."""
        clean = self.spectrogram(batch)
        return valid_mean(self.backbone(*clean), clean.valid_BT)

    def token_features(self, batch: AudioBatch, layers: Sequence[int] = (-1,)) -> list[Tokens]:
        """The frames of each layer; see `Method`."""
        valid_BT = self.spectrogram(batch).valid_BT
        return [replace(tokens, valid_BT=valid_BT) for tokens in super().token_features(batch, layers)]

    def pictures(self, batch: AudioBatch) -> dict[str, Tensor]:
        """For the picture of the first batch: what is seen of each spectrogram, [B 3 F T] with low frequencies below,
        and the same with the cells that are guessed in red.
        """
        clean, altered = self.altered(batch, self.global_step)
        low, high = clean.frames_BTF.aminmax()
        grey_BTF = ((altered.frames_BTF - low) / (high - low).clamp_min(1e-9)).clamp(0, 1)
        grey_B1FT, labelled_B1FT = (_upright(part) for part in (grey_BTF, altered.labelled_BTF))
        red = grey_BTF.new_tensor([1.0, 0, 0]).view(3, 1, 1)
        seen = grey_B1FT.expand(-1, 3, -1, -1)
        return {"what the network sees": seen, "in red what it guesses": seen.lerp(red, 0.5 * labelled_B1FT)}

    def reconstruct(self, batch: AudioBatch) -> Reconstruction:
        """Spectrograms, low frequencies below: clean, labelled cells, guessed, and as they were seen."""
        clean, altered, guess_BTF = self.guesses(batch, self.global_step)
        guess_BTF = guess_BTF.to(clean.frames_BTF).masked_fill(~clean.valid_BT[..., None], 0)
        parts = clean.frames_BTF, altered.labelled_BTF, guess_BTF, altered.frames_BTF
        return Reconstruction(*(_upright(part) for part in parts))


def _upright(frames_BTF: Tensor) -> Tensor:
    """As pictures [B 1 F T] with low frequencies below."""
    return frames_BTF.transpose(1, 2).flip(1)[:, None]
