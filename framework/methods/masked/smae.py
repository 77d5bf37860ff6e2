"""SMAE: masked words are guessed at all sizes of an encoder, and its first token's state carries the rest of the text.

Source: Zhuang et al., "Starbucks: Improved Training for 2D Matryoshka Embeddings", 2024, arXiv 2410.13230, section 3.2,
and the authors' code. The encoder reads a text with few words masked. At each size (n, d) one shared head guesses them
from the first d coordinates of what n blocks give, and a decoder of one block reads the same text with more words
masked, its first embedding replaced by the head's transform of the first d coordinates of the first token's state, and
guesses these with the same head. The loss is the mean over sizes of half the one cross-entropy and half the other.
As in the authors' code: the decoder has the encoder's embeddings and starts as a copy of its first block, dropout acts
in it, and masked words are replaced as in BERT. Theirs takes means over the tokens of a rank, here of all ranks.
Shapes: B texts of this rank, T tokens, D width, V words, M and N masked tokens of encoder and decoder.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertModel

from lightspan.core.devices import wide
from lightspan.core.distributed import all_reduce_sums
from lightspan.core.errors import UserError
from lightspan.datamodules.text.batch import WholeWordBatch
from lightspan.nn.heads.nested_lm_head import NestedLMHead
from lightspan.nn.heads.pooling import masked_mean
from lightspan.nn.image_numbers import image_numbers, index_in
from lightspan.nn.masking.word_masks import NestedWordMasks
from lightspan.nn.sequences.nested_sizes import FixedSizes, NestedSizes, require_positions, states_of
from lightspan.nn.sequences.texts import texts_of, tokens_of, words_of
from lightspan.training.method import Method


class MaskedTexts(NamedTuple):
    """What the encoder or the decoder reads, int64 [B T], and where to guess: places in the flat batch, int64 [M]."""

    tokens_BT: Tensor
    place_M: Tensor


class SMAE(Method):
    """After training, keep `backbone`.

    Args:
        backbone: BERT from transformers, of which the first block, the embeddings and the config are read.
        sizes: `FixedSizes`, of which each step trains all.
        mask_token: the number of the token that hides a word, in [0, V).
        masks: encoder's and decoder's, the one inside the other.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    Raises: UserError for a network that is no BERT, sizes that do not end with the whole of it, or a token that it does
        not have.
    """

    def __init__(
        self,
        backbone: nn.Module,
        sizes: FixedSizes,
        mask_token: int,
        masks: NestedWordMasks | None = None,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        if not isinstance(backbone, BertModel):
            raise UserError(
                f"SMAE needs transformers' BertModel, whose first block becomes the decoder, not {backbone}"
            )
        sizes.require(backbone, "SMAE")
        config = backbone.config
        if not 0 <= mask_token < config.vocab_size:
            raise UserError(f"SMAE mask_token={mask_token} must lie in [0, {config.vocab_size}), the encoder's words")
        self.backbone, self.mask_token, self.masks = backbone, mask_token, masks or NestedWordMasks()
        self.num_tokens = config.vocab_size
        self.sizes: NestedSizes = sizes
        self.head = NestedLMHead(config.hidden_size, config.vocab_size, config.layer_norm_eps)
        self.decoder = copy.deepcopy(backbone.encoder.layer[0])

    @property
    def words_VD(self) -> Tensor:
        """The embeddings with which the encoder reads, and the head writes."""
        return self.backbone.embeddings.word_embeddings.weight

    def features(self, batch: WholeWordBatch) -> Tensor:
        """Mean of the last states over the mask, [B D], nothing hidden."""
        tokens_BT, mask_BT = texts_of(batch, "SMAE")
        states_BTD = self.backbone(input_ids=tokens_BT, attention_mask=mask_BT).last_hidden_state
        return masked_mean(states_BTD, mask_BT)

    @torch.compiler.disable  # words are drawn on the host
    def masked(self, batch: WholeWordBatch) -> tuple[MaskedTexts, MaskedTexts]:
        """What the encoder reads, and what the decoder does."""
        tokens_BT, word_BT = tokens_of(batch, "SMAE"), words_of(batch, "SMAE")
        indices, device = image_numbers(index_in(batch, self)), tokens_BT.device
        hidden_2BT = self.masks.draw(word_BT.cpu().numpy(), self.global_step, indices)
        read = []
        for stream, mask_BT in enumerate(hidden_2BT, 1):
            new_BT = self.masks.hide(
                tokens_BT.cpu().numpy(), mask_BT, self.mask_token, len(self.words_VD), self.global_step, indices, stream
            )
            places = torch.from_numpy(mask_BT.ravel().nonzero()[0]).to(device)
            read.append(MaskedTexts(torch.from_numpy(new_BT).to(device), places))
        return read[0], read[1]

    def losses(self, batch: WholeWordBatch) -> tuple[Tensor, Tensor]:
        """Of encoder and decoder at each size, [S]: means over the masked tokens of all ranks; 0 without any."""
        seen, guessed = self.masked(batch)
        mask_BT, label = batch["mask"], batch["tokens"].flatten().long()
        require_positions(self.backbone, seen.tokens_BT, "SMAE")
        sizes = self.sizes.listed
        states = states_of(self.backbone, seen.tokens_BT, mask_BT, [size.layer for size in sizes])
        embedded_BTD = self.backbone.embeddings(input_ids=guessed.tokens_BT)
        open_B11T = (mask_BT[:, None, None] == 0).to(embedded_BTD.dtype) * torch.finfo(embedded_BTD.dtype).min
        sums: list[Tensor] = []
        for size, states_BTD in zip(sizes, states, strict=True):
            small_BTd = states_BTD[..., : size.width]
            sums.append(self.wrong(small_BTd, seen.place_M, label))
            first_B1D = self.head.transform(small_BTd[:, :1]).to(embedded_BTD.dtype)
            decoded = self.decoder(torch.cat([first_B1D, embedded_BTD[:, 1:]], dim=1), open_B11T)
            decoded_BTD = decoded[0] if isinstance(decoded, tuple) else decoded
            sums.append(self.wrong(decoded_BTD, guessed.place_M, label))
        counts = sums[0].new_tensor([len(seen.place_M), len(guessed.place_M)])
        total_S2, count_2 = all_reduce_sums(torch.stack(sums).view(-1, 2), counts)
        encoder_S, decoder_S = (total_S2 / count_2.clamp_min(1)).unbind(1)
        return encoder_S, decoder_S

    def wrong(self, states_BTd: Tensor, place_M: Tensor, label: Tensor) -> Tensor:
        """The sum of cross-entropies over these places, in nats."""
        logits_MV = self.head(states_BTd.flatten(0, 1)[place_M], self.words_VD)
        return F.cross_entropy(wide(logits_MV), label[place_M], reduction="sum")

    def training_step(self, batch: WholeWordBatch, batch_idx: int) -> Tensor:
        encoder_S, decoder_S = self.losses(batch)
        loss = ((encoder_S + decoder_S) / 2).mean()
        figures = {"encoder": encoder_S.mean(), "decoder": decoder_S.mean(), "smallest": encoder_S[0]}
        self.log_training({"train/loss_nats": loss} | {f"train/{name}_nats": one for name, one in figures.items()})
        return loss

    def validation_step(self, batch: WholeWordBatch, batch_idx: int) -> None:
        for name, loss_S in zip(("encoder", "decoder"), self.losses(batch), strict=True):
            figures = {f"val/{name}_nats_{size}": one for size, one in zip(self.sizes.listed, loss_S, strict=True)}
            self.log_dict(figures, batch_size=len(batch["tokens"]), sync_dist=True)
