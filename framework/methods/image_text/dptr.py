"""DPTR: the decoder of a reader of words learns from strings alone, from a text encoder that knows pictures.

Source: Zhao et al., "Decoder Pre-Training with only Text for Scene Text Recognition", ACM MM 2024, arXiv 2408.05706,
sections 3.1 and 3.2, and the authors' code. A word stands in a sentence; what CLIP's text encoder says of its tokens
takes the place of what an image encoder would say of a picture of it, disturbed by features of natural pictures:
M' = M + 0.1 Z[pictures, places]. From M' the decoder guesses letters in six orders, as PARSeq does
(`lightspan.nn.decoders.letter_decoder`, `lightspan.objectives.letters`).
On pictures the decoder goes on in `lightspan.methods.supervised.word_reader.WordReader`, behind a feature merge unit.
Difference from the authors' code: pictures are drawn by the numbers of samples, so that ranks agree; orders run over
all places that a batch's words may have, not only over those of its longest.
Shapes: B words of this rank, T letters, S = T + 1 places, P tokens of a sentence, M = 1 + P tokens of memory, w width.
"""

from typing import Any

from torch import Tensor, nn

from lightspan.backbones.text import TextMemory
from lightspan.nn.bank_noise import BankNoise
from lightspan.nn.decoders.letter_decoder import LetterDecoder, LetterOrders, letters_of
from lightspan.nn.image_numbers import image_numbers, index_in
from lightspan.nn.sequences.texts import captions_of
from lightspan.nn.teachers.frozen import Frozen
from lightspan.nn.widths import require_width
from lightspan.objectives.letters import permuted_letter_loss, reading_scores
from lightspan.training.method import Method


class DPTR(Method):
    """Trains `decoder` to spell words from what a frozen text encoder says of them.

    Validation logs val/letter_accuracy and val/word_accuracy of words as the decoder reads them, without noise.

    Args:
        encoders: a trained `lightspan.backbones.dual_encoder.DualEncoder`; its text half is kept, frozen.
        decoder: of the width of the text encoder's states.
        noise: None adds none.
        orders: in which letters are guessed; None is six of them.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    def __init__(
        self,
        encoders: nn.Module,
        decoder: LetterDecoder,
        noise: BankNoise | None = None,
        orders: LetterOrders | None = None,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        memory = TextMemory(encoders)
        require_width(memory, "decoder.width", decoder.in_features)
        self.memory, self.decoder, self.noise = Frozen(memory), decoder, noise
        self.orders = orders or LetterOrders()

    def features(self, batch: Any) -> Tensor:
        """What the text encoder says of the words' sentences, [B w]: of pictures this method knows nothing."""
        return self._memory(batch)[:, 0]

    def _memory(self, batch: Any) -> Tensor:
        return self.memory(*captions_of(batch, "DPTR")[:2])

    def memories(self, batch: Any) -> Tensor:
        """M' of a step, [B M w]."""
        memory_BMw = self._memory(batch)
        if self.noise is None:
            return memory_BMw
        return self.noise(memory_BMw, self.global_step, image_numbers(index_in(batch, self)))

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        letters_of(batch, self.decoder, "DPTR")
        return super()._on_before_batch_transfer(batch, dataloader_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        letters_BT, memory_BMw = letters_of(batch, self.decoder, "DPTR"), self.memories(batch)
        logits_KBSC = self.decoder.in_orders(memory_BMw, letters_BT, self.orders, self.global_step)
        loss = permuted_letter_loss(logits_KBSC, letters_BT)
        self.log_training({"train/loss_nats": loss})
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        letters_BT = letters_of(batch, self.decoder, "DPTR")
        found_BT = self.decoder.read(self._memory(batch))
        figures = {f"val/{name}": value for name, value in reading_scores(found_BT, letters_BT).items()}
        self.log_dict(figures, batch_size=len(letters_BT), prog_bar=True, sync_dist=True)
