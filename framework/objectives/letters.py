"""Words guessed letter by letter in several orders.

Shapes: K orders, B words, T letters, S = T + 1 places, C classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.devices import wide
from lightspan.core.distributed import all_reduce_sums
from lightspan.objectives.means import own_mean

WITH_END = 2
"""The first orders, left to right and right to left, also learn where a word ends."""


def permuted_letter_loss(logits_KBSC: Tensor, letters_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the letters of words of all ranks over all orders, a scalar in float32 or wider; 0
    without any.

    The end of a word counts as a letter in the first two orders. Each letter weighs the same, whatever its word.
    Source: Bautista and Atienza, "PARSeq", 2022, arXiv 2207.06966, eq. 3, and the authors' code.

    Args:
        letters_BT: 0 behind the end of a word.
    """
    target_BS = F.pad(letters_BT, (0, 1))
    place_S = torch.arange(target_BS.shape[1], device=target_BS.device)
    end_B1 = (letters_BT > 0).sum(dim=1, keepdim=True)
    learned_KBS = torch.stack([place_S < end_B1 + (k < WITH_END) for k in range(len(logits_KBSC))])
    nats_KBS = F.cross_entropy(
        wide(logits_KBSC).flatten(0, 2), target_BS.expand(len(logits_KBSC), -1, -1).flatten(), reduction="none"
    ).view(learned_KBS.shape)
    nats = nats_KBS.where(learned_KBS, 0).sum()
    total, count = all_reduce_sums(nats, learned_KBS.sum().to(nats.dtype))
    return total / count.clamp_min(1)


def reading_scores(found_BT: Tensor, letters_BU: Tensor) -> dict[str, Tensor]:
    """How well the words of this rank were read, means over them, each in [0, 1]; 0 without any.

    `letter_accuracy` is the share of places right among those where the word, or what was read for it, has a
    letter: one too many is a mistake, as is one too few. `word_accuracy` is the share of words without a mistake. A
    word without letters of which none was read is right.

    Args:
        found_BT, letters_BU: both 0 behind the end of a word; T and U may differ.
    """
    longest = max(found_BT.shape[1], letters_BU.shape[1])
    found_BT, letters_BT = (F.pad(x, (0, longest - x.shape[1])) for x in (found_BT, letters_BU))
    told_BT = (found_BT > 0) | (letters_BT > 0)
    wrong_B = (found_BT != letters_BT).sum(dim=1)
    return {
        "letter_accuracy": own_mean(1 - wrong_B / told_BT.sum(dim=1).clamp_min(1)),
        "word_accuracy": own_mean((wrong_B == 0).float()),
    }
