"""PLLaVA: a model that answers about images answers about clips, without new parameters: tokens of frames are pooled.

Source: Xu et al., "PLLaVA: Parameter-free LLaVA Extension from Images to Videos for Video Dense Captioning", 2024,
arXiv 2404.16994, sections 3.2 and 3.3, and the authors' code. Each frame goes through the frozen image encoder and the
projector by itself; the tokens of all are pooled in time and space, X = AdaptiveAvgPool3d(projector(encoder(frame))),
and stand at the clip's place in a text, of which the answer is learned: the mean of -log P(token | what stands before).
What trains is the projector, and LoRA of the language model's query and value projections (the callback `Adaptation`).
Afterwards W0 + (alpha / r) B A with a smaller alpha than the trained one mixes the image model with the tuned one
(`lightspan.adapters.lora.rescale`); the projector has no scale.
As in the code, pooling comes after the projector. Difference: images are not repeated; of one frame, T' is one.
Shapes: B clips, C channels, T frames, h w pixels, H W grid of a frame's tokens, D width of the encoder, d of the
language model, L tokens of a text, T' H' W' pooled, K = T' H' W' tokens of a clip, V vocabulary.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.adapters.lora import rescaled
from lightspan.backbones.image_language import ImageLanguage
from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.datamodules.video.batch import ClipTextBatch
from lightspan.nn.sequences.texts import clip_at_of, learned_of, tokens_of
from lightspan.nn.submodule_alias import submodule_alias
from lightspan.nn.views import image_of
from lightspan.objectives.language import next_token_loss
from lightspan.training.method import Method


def pool_clip(x_BTHWd: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Means over windows in time and space, [B T'H'W' d], frame by frame and row by row, in float32 or wider.

    Window i of n along an axis of m tokens has those from floor(i m / n) up to ceil((i + 1) m / n): blocks where n
    divides m; elsewhere neighbours overlap, and some tokens count twice. The shape of the input gives the input.

    Raises: UserError for more windows than there are tokens along an axis, which would repeat tokens.
    """
    found = x_BTHWd.shape[1:4]
    if any(new > old for new, old in zip(shape, found, strict=True)):
        raise UserError(
            f"pooled={[*shape]} is more than the {' x '.join(map(str, found))} tokens (frames, rows, columns) of a "
            "clip, and would repeat some; lower it, or raise data.init_args.frames or size"
        )
    pooled_BdTHW = F.adaptive_avg_pool3d(wide(x_BTHWd).movedim(4, 1), shape)
    return pooled_BdTHW.flatten(2).mT.to(x_BTHWd.dtype)


class PLLaVA(Method):
    """Trains `network` to answer questions about clips; one of single frames makes the image model that comes before.

    Validation and test log the loss and the share of answers of which every token is the most likely one: those that
    `generate` gives word by word.

    Args:
        network: trains as a whole but for its encoder, unless an `Adaptation` says what does.
        pooled: T', H', W'.
        alpha: with which the LoRAs answer in validation, test and prediction; None is that of training.
        longest: tokens that a generated answer may have.
        end: token that ends an answer; None is that of the language model.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    backbone = submodule_alias("network.image.module", "The frozen image encoder.")
    batch_type = ClipTextBatch

    def __init__(
        self,
        network: ImageLanguage,
        pooled: tuple[int, int, int] = (16, 12, 12),
        alpha: float | None = None,
        longest: int = 64,
        end: int | None = None,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_in("[1, inf)", pooled=pooled, longest=longest)
        require_in("[0, inf)", alpha=alpha, end=end)
        self.network, self.pooled, self.alpha, self.longest, self.end = network, pooled, alpha, longest, end
        self.num_tokens = network.language.config.vocab_size

    def setup(self, stage: str) -> None:
        """Raises: UserError for texts that are, with a clip, longer than the positions of the language model."""
        super().setup(stage)
        texts, clip = getattr(getattr(self.trainer, "datamodule", None), "length", 0), self.clip_tokens
        positions = getattr(self.network.language.config, "max_position_embeddings", None)
        if positions is not None and texts + clip > positions:
            raise UserError(
                f"pooled={[*self.pooled]} makes {clip} tokens of a clip, and with data.init_args.length={texts} they "
                f"are more than the {positions} positions of {type(self.network.language).__name__}; lower one of them"
            )

    @property
    def clip_tokens(self) -> int:
        """K."""
        frames, rows, columns = self.pooled
        return frames * rows * columns

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        clip_at_of(batch, "PLLaVA")
        return super()._on_before_batch_transfer(batch, dataloader_idx)

    def frames(self, batch: Any) -> Tensor:
        """What the encoder says of each patch of each frame, [B T H W D]."""
        clip_BCThw = image_of(batch, "PLLaVA")
        if clip_BCThw.ndim != 5:
            raise UserError(
                f"PLLaVA reads clips [B C T h w], and this batch gives {[*clip_BCThw.shape]}; take a data module of "
                "clips with texts, such as lightspan.datamodules.video.captioned.CaptionedVideos"
            )
        found_NHWD = self.network.grid(clip_BCThw.transpose(1, 2).flatten(0, 1))
        return found_NHWD.unflatten(0, (clip_BCThw.shape[0], clip_BCThw.shape[2]))

    def features(self, batch: Any) -> Tensor:
        """The mean of a clip's tokens before the projector, [B D]."""
        return wide(self.frames(batch)).mean(dim=(1, 2, 3))

    def shown(self, batch: Any) -> Tensor:
        """The tokens of each clip, [B K d]."""
        return pool_clip(self.network.project(self.frames(batch)), self.pooled)

    def logits(self, batch: Any) -> Tensor:
        """[B L V], see `ImageLanguage.logits`."""
        tokens_BL, at_B = tokens_of(batch, "PLLaVA"), clip_at_of(batch, "PLLaVA")
        return self.network.logits(self.shown(batch), tokens_BL, at_B)

    def learned(self, batch: Any) -> Tensor:
        """Which tokens are learned, bool [B L]: those of `learned` that do not stand before the clip."""
        learned_BL, at_B = learned_of(batch, "PLLaVA"), clip_at_of(batch, "PLLaVA")
        if learned_BL is None:
            raise UserError("PLLaVA learns answers, and this batch has no field `learned` that tells them apart")
        return learned_BL & (torch.arange(learned_BL.shape[1], device=at_B.device) >= at_B[:, None])

    def training_step(self, batch: ClipTextBatch, batch_idx: int) -> Tensor:
        loss = next_token_loss(self.logits(batch), batch["tokens"], self.learned(batch))
        self.log_training({"train/loss_nats": loss}, prog_bar=True)
        return loss

    def generate(self, batch: Any) -> Tensor:
        """Greedy answers to what stands before the first token that is learned, int64 [B A]; see `ImageLanguage`.

        A row in which nothing is learned is a question as a whole.
        """
        tokens_BL, at_B, learned_BL = tokens_of(batch, "PLLaVA"), clip_at_of(batch, "PLLaVA"), self.learned(batch)
        own_BL = batch["mask"] > 0 if "mask" in batch else torch.ones_like(learned_BL)
        length_B = (own_BL & (learned_BL.cumsum(dim=1) == 0)).sum(dim=1).maximum(at_B)
        return self.network.generate(self.shown(batch), tokens_BL, at_B, length_B, self.longest, self.end)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """`generate`, with `alpha`."""
        with self.mixed():
            return self.generate(batch)

    def mixed(self) -> AbstractContextManager[None]:
        """Inside, LoRAs have `alpha`."""
        return nullcontext() if self.alpha is None else rescaled(self, self.alpha)

    def validation_step(self, batch: ClipTextBatch, batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: ClipTextBatch, batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def evaluate(self, batch: Any, stage: str) -> None:
        with self.mixed():
            logits_BLV = self.logits(batch)
        tokens_BL, learned_BL = batch["tokens"], self.learned(batch)
        loss = next_token_loss(logits_BLV, tokens_BL, learned_BL)
        self.log(f"{stage}/loss_nats", loss, batch_size=max(1, int(learned_BL.sum())), prog_bar=True, sync_dist=True)
        right_B = ((logits_BLV.argmax(dim=2) == tokens_BL) | ~learned_BL).all(dim=1)
        asked_B = learned_BL.any(dim=1)
        right = (right_B & asked_B).float().sum() / asked_B.sum().clamp_min(1)
        self.log(f"{stage}/answers_right", right, batch_size=max(1, int(asked_B.sum())), prog_bar=True, sync_dist=True)
