"""WordReader: an image encoder, a feature merge unit and a decoder that spells the word on a picture.

Source: Zhao et al., "Decoder Pre-Training with only Text for Scene Text Recognition" (DPTR), ACM MM 2024, arXiv
2408.05706, section 3.3: what an image encoder says of patches is merged into as many tokens as a word has places, and
the decoder learns to guess letters from them in several orders. Without the merge unit it is PARSeq (Bautista and
Atienza, ECCV 2022, arXiv 2207.06966), whose decoder and loss it has.
Shapes: B pictures of this rank, C h w picture, T letters, S = T + 1 places, M tokens of memory, D width.
"""

from typing import Any

from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.datamodules.image.batch import ReadingBatch
from lightspan.nn.decoders.letter_decoder import LetterDecoder, LetterOrders, letters_of
from lightspan.nn.heads.attention_pool import FeatureMerge
from lightspan.nn.sequences.token_backbone import require_tokens
from lightspan.nn.views import image_of
from lightspan.nn.widths import require_width
from lightspan.objectives.letters import permuted_letter_loss, reading_scores
from lightspan.training.method import Method


class WordReader(Method):
    """Trains all three parts on pictures of words.

    Validation logs val/letter_accuracy and val/word_accuracy of words as they are read.

    Args:
        backbone: a `lightspan.nn.sequences.token_backbone.TokenBackbone`; what probes read.
        decoder: a `LetterDecoder` of the backbone's width; with weights from a run of DPTR, say.
        merge: with a query for each place of the decoder's longest word; None lets the decoder read the patches.
        orders: in which letters are guessed; None is six of them.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        decoder: nn.Module,
        merge: FeatureMerge | None = None,
        orders: LetterOrders | None = None,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_tokens(backbone, "WordReader")
        if not isinstance(decoder, LetterDecoder):
            raise UserError(f"WordReader's decoder is a LetterDecoder, not {type(decoder).__name__}; set that")
        require_width(backbone, "decoder.width", decoder.in_features)
        if merge is not None:
            require_width(backbone, "merge.width", merge.in_features)
        self.backbone, self.merge, self.decoder = backbone, merge, decoder
        self.orders = orders or LetterOrders()

    def memories(self, image_BChw: Tensor) -> Tensor:
        """What the decoder looks at, [B M D]."""
        tokens_BMD = require_tokens(self.backbone, "WordReader").tokens(image_BChw)
        return tokens_BMD if self.merge is None else self.merge(tokens_BMD)

    def forward(self, image_BChw: Tensor) -> Tensor:
        """Letters as they are read, int64 [B length]."""
        return self.decoder.read(self.memories(image_BChw))

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        letters_of(batch, self.decoder, "WordReader")
        return super()._on_before_batch_transfer(batch, dataloader_idx)

    def training_step(self, batch: ReadingBatch, batch_idx: int) -> Tensor:
        letters_BT = letters_of(batch, self.decoder, "WordReader")
        memory_BMD = self.memories(image_of(batch, "WordReader"))
        logits_KBSC = self.decoder.in_orders(memory_BMD, letters_BT, self.orders, self.global_step)
        loss = permuted_letter_loss(logits_KBSC, letters_BT)
        self.log_training({"train/loss_nats": loss})
        return loss

    def validation_step(self, batch: ReadingBatch, batch_idx: int) -> None:
        letters_BT = letters_of(batch, self.decoder, "WordReader")
        found_BT = self(image_of(batch, "WordReader"))
        figures = {f"val/{name}": value for name, value in reading_scores(found_BT, letters_BT).items()}
        self.log_dict(figures, batch_size=len(letters_BT), prog_bar=True, sync_dist=True)
