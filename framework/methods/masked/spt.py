"""SPT: before an architecture is judged on sequences, the very same network learns to fill gaps in the same sequences.

Source: Amos, Berant, Gupta, "Never Train from Scratch: Fair Comparison of Long-Sequence Models Requires Data-Driven
Priors", 2023, arXiv 2310.02980 (ICLR 2024), sections 2 and 3, and the authors' code. Stage 1 is this method, on the
inputs of the training split alone; stage 2 is `lightspan.methods.supervised.sequence_classifier`, on the same samples.
- Masked: m is Bernoulli(q) for each step. Values enter as the linear map of concat(x (1 - m), m), symbols as a symbol
  of their own where m = 1; the network guesses x, and the loss counts where m = 1 alone.
- Next value: a causal network guesses x_(t+1) from x_1 ... x_t.
Guesses: cross-entropy over the symbols or over 256 levels of a value, or the absolute error of the value itself.
Differences: the map's column for m is a weight of this method, and not of the network, which therefore is the one of
stage 2 as it stands, where the code slices a column off: the map of concat(x (1 - m), m) is that of x (1 - m) plus m
times the column. The vector of the symbol is this method's for the same reason. The code marks steps that do not
count by the values -100 and -10,000, which a genuine value may equal; here they are told by the mask. Each counted
number weighs the same over all ranks.
Unverified: the shares of hidden steps for each task (about 0.15 for text, 0.5 for images, 0.1 for ListOps).
Shapes: B sequences, L steps, C numbers of a step, D width, K levels, V symbols, O outputs of a step.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.datamodules.sequence.batch import SequenceBatch
from lightspan.datamodules.text.batch import LabelledTextBatch
from lightspan.nn.image_numbers import index_in
from lightspan.nn.masking.step_masks import StepMasks
from lightspan.nn.sequences.series import require_series, series_in
from lightspan.objectives.classes import known_cross_entropy
from lightspan.objectives.masked import hidden_absolute_error
from lightspan.training.method import Method


class StepGuess(ABC):
    """What a head gives for each step, and how far that is from the step itself.

    Attributes:
        unit: of the loss, as its logged name ends.
        symbols: whether steps are symbols, else values.
    """

    unit = "loss_nats"
    symbols = False

    @abstractmethod
    def outputs(self, backbone: nn.Module) -> int:
        """O, of the head, for a network of `lightspan.backbones.sequence`."""

    @abstractmethod
    def loss(self, guess_BLO: Tensor, x: Tensor, counted_BL: Tensor) -> Tensor:
        """Mean over the counted numbers of all ranks, a scalar in float32 or wider; 0 without any."""


class SymbolGuess(StepGuess):
    """Cross-entropy over the vocabulary, in nats."""

    symbols = True

    def outputs(self, backbone: nn.Module) -> int:
        return int(backbone.vocab_size)  # type: ignore[arg-type]

    def loss(self, guess_BLO: Tensor, x: Tensor, counted_BL: Tensor) -> Tensor:
        return known_cross_entropy(guess_BLO.flatten(0, 1), x.flatten(), counted_BL.flatten())


class ValueGuess(StepGuess):
    """Absolute error of values, which the data have normalised."""

    unit = "absolute_error"

    def outputs(self, backbone: nn.Module) -> int:
        return int(backbone.channels)  # type: ignore[arg-type]

    def loss(self, guess_BLO: Tensor, x: Tensor, counted_BL: Tensor) -> Tensor:
        return hidden_absolute_error(guess_BLO, x, counted_BL[:, :, None])


@dataclass(frozen=True)
class LevelGuess(StepGuess):
    """Cross-entropy over equally spaced levels of each number, in nats; a value belongs to the nearest one.

    Args:
        count: K, at least 2; 256 for grey values of 8 bits.
        least, greatest: values of the first and the last level. What lies beyond belongs to them.
    """

    count: int = 256
    least: float = -1.0
    greatest: float = 1.0

    def __post_init__(self) -> None:
        if self.count < 2 or not self.least < self.greatest:
            raise UserError(
                f"LevelGuess count={self.count} must be at least 2, and least={self.least} below "
                f"greatest={self.greatest}"
            )

    def outputs(self, backbone: nn.Module) -> int:
        return self.count * int(backbone.channels)  # type: ignore[arg-type]

    def loss(self, guess_BLO: Tensor, x: Tensor, counted_BL: Tensor) -> Tensor:
        share_BLC = (x.float() - self.least) / (self.greatest - self.least)
        level_BLC = (share_BLC * (self.count - 1)).round().nan_to_num().clamp(0, self.count - 1).long()
        logits_RK = guess_BLO.unflatten(2, (x.shape[2], self.count)).flatten(0, 2)
        counted_BLC = counted_BL[:, :, None].expand_as(level_BLC)
        loss = known_cross_entropy(logits_RK, level_BLC.flatten(), counted_BLC.flatten())
        # NaN has no level: it is no class that torch could refuse, and its loss is no number either.
        return loss.masked_fill((share_BLC.isnan() & counted_BLC).any(), torch.nan)


class Denoised(NamedTuple):
    """states_BLD: of the steps from which a guess is made; x: what is guessed there; counted_BL: bool."""

    states_BLD: Tensor
    x: Tensor
    counted_BL: Tensor


class MaskedSteps(nn.Module):
    """Hidden steps are guessed from all others.

    Args:
        masks: which steps are hidden.
    """

    column_D: nn.Parameter

    def __init__(self, masks: StepMasks | None = None) -> None:
        super().__init__()
        self.masks = masks or StepMasks()

    def fit_to(self, backbone: nn.Module) -> None:
        """Makes the column of the input map that belongs to m, or the vector of the mask's symbol."""
        width = int(backbone.num_features)  # type: ignore[arg-type]
        if backbone.vocab_size is not None:
            self.column_D = nn.Parameter(torch.randn(width))  # as nn.Embedding starts
        else:
            bound = (backbone.channels + 1) ** -0.5  # as nn.Linear starts
            self.column_D = nn.Parameter(torch.empty(width).uniform_(-bound, bound))

    def embedded(self, backbone: Any, x: Tensor, hidden_BL: Tensor) -> Tensor:
        """What enters the network's blocks, [B L D]: nothing of the hidden steps but that they are hidden."""
        hidden_BL1 = hidden_BL[:, :, None]
        if backbone.vocab_size is not None:
            embedded_BLD = backbone.embed(x)
            return torch.where(hidden_BL1, self.column_D.to(embedded_BLD.dtype), embedded_BLD)
        embedded_BLD = backbone.embed(x.where(~hidden_BL1, 0))
        return embedded_BLD + hidden_BL1 * self.column_D.to(embedded_BLD.dtype)

    def forward(self, backbone: Any, x: Tensor, own_BL: Tensor | None, index_B: Tensor, step: int) -> Denoised:
        hidden_BL = self.masks.draw(x.shape[1], step, index_B)
        hidden_BL = hidden_BL if own_BL is None else hidden_BL & own_BL
        return Denoised(backbone.encode(self.embedded(backbone, x, hidden_BL), own_BL), x, hidden_BL)


class NextValue(nn.Module):
    """Each step is guessed from those before it, by a causal network."""

    def fit_to(self, backbone: nn.Module) -> None:
        """Raises: UserError for a network whose steps depend on later ones, which they would only have to copy."""
        if not backbone.causal:
            raise UserError("NextValue needs a causal network; set causal=true of the backbone, or take MaskedSteps")

    def forward(self, backbone: Any, x: Tensor, own_BL: Tensor | None, index_B: Tensor, step: int) -> Denoised:
        own_BL = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if own_BL is None else own_BL
        return Denoised(backbone.encode(backbone.embed(x), own_BL)[:, :-1], x[:, 1:], own_BL[:, 1:])


class SPT(Method):
    """Self-pretraining of a network for sequences; the network is kept, without its head.

    A batch of which nothing is hidden has loss 0. Validation hides the same steps of each sequence every time.

    Args:
        backbone: one of `lightspan.backbones.sequence`.
        pretext: `MaskedSteps` or `NextValue`; None is MaskedSteps with half of the steps hidden.
        guess: `SymbolGuess`, `ValueGuess` or `LevelGuess`; None takes the first for symbols and the second for values.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    Raises: UserError for a network of another kind, or parts that do not fit it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        pretext: MaskedSteps | NextValue | None = None,
        guess: StepGuess | None = None,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_series(backbone, "SPT")
        symbols = backbone.vocab_size is not None
        guess = guess or (SymbolGuess() if symbols else ValueGuess())
        if guess.symbols != symbols:
            raise UserError(
                f"{type(guess).__name__} guesses {'symbols' if guess.symbols else 'values'}, and the network reads "
                f"{'symbols' if symbols else 'values'}; take {'SymbolGuess' if symbols else 'ValueGuess or LevelGuess'}"
            )
        self.backbone, self.pretext, self.guess = backbone, pretext or MaskedSteps(), guess
        self.num_tokens = backbone.vocab_size  # type: ignore[assignment]
        self.pretext.fit_to(backbone)
        self.denoising_head = nn.Linear(backbone.num_features, guess.outputs(backbone))  # type: ignore[arg-type]

    def features(self, batch: SequenceBatch | LabelledTextBatch) -> Tensor:
        """Mean of the states over the steps with nothing hidden, [B D]: what stage 2 starts from."""
        return self.backbone(*series_in(batch, self.backbone, "SPT"))

    def loss(self, batch: SequenceBatch | LabelledTextBatch, step: int) -> Tensor:
        x, own_BL = series_in(batch, self.backbone, "SPT")
        states_BLD, target, counted_BL = self.pretext(self.backbone, x, own_BL, index_in(batch, self), step)
        return self.guess.loss(self.denoising_head(states_BLD), target, counted_BL)

    def training_step(self, batch: SequenceBatch | LabelledTextBatch, batch_idx: int) -> Tensor:
        loss = self.loss(batch, self.global_step)
        self.log_training({f"train/{self.guess.unit}": loss}, prog_bar=True)
        return loss

    def validation_step(self, batch: SequenceBatch | LabelledTextBatch, batch_idx: int) -> None:
        size = len(index_in(batch, self))
        self.log(f"val/{self.guess.unit}", self.loss(batch, 0), batch_size=size, prog_bar=True, sync_dist=True)
