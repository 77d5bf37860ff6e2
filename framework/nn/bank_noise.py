"""Features of pictures as noise on those of texts.

Source: Zhao et al., "DPTR", 2024, arXiv 2408.05706, section 3.2, "offline randomised perturbation".
Shapes: B samples, M tokens of a memory, N pictures, S tokens of each, w width.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lightspan.core.distributed import register_replicated
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in


class BankNoise(nn.Module):
    """memory + weight * Z[pictures, places]: to each sample the tokens of one picture, of M places out of S that are
    the same for the whole batch, in an order of their own.

    Both are drawn anew in each step, as functions of seed, step and the sample's number; samples whose numbers differ
    by no multiple of N get different pictures.

    Args:
        bank_NSw: Z, what an image encoder said of pictures, once and for all; not trained, and no part of checkpoints.
        weight: >= 0; 0 leaves a memory as it is, bit for bit.
        seed: >= 0.
    Raises: UserError for values out of range.
    """

    bank_NSw: Tensor

    def __init__(self, bank_NSw: Tensor, weight: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        if bank_NSw.ndim != 3 or not len(bank_NSw) or not bank_NSw.is_floating_point():
            raise UserError(
                f"a bank of noise holds features of pictures, floats [N, S, w] of at least one, and this one is "
                f"{bank_NSw.dtype} {[*bank_NSw.shape]}"
            )
        require_in("[0, inf)", weight=weight, seed=seed)
        register_replicated(self, "bank_NSw", bank_NSw, persistent=False)
        self.weight, self.seed = weight, seed

    def forward(self, memory_BMw: Tensor, step: int, numbers: Sequence[int]) -> Tensor:
        """[B M w]. Raises: UserError for a memory of another width or with more tokens than a picture has.

        Args:
            numbers: of the samples.
        """
        pictures, places, width = self.bank_NSw.shape
        if memory_BMw.shape[2] != width or memory_BMw.shape[1] > places:
            raise UserError(
                f"the bank of noise has {places} tokens of {width} features for each picture, and the memory "
                f"{memory_BMw.shape[1]} of {memory_BMw.shape[2]}; build it with the image encoder beside the text "
                "encoder on pictures of at least as many patches, or shorten the texts"
            )
        if not self.weight:
            return memory_BMw
        generator = np.random.default_rng((self.seed, step))
        chosen = generator.permutation(pictures)[np.asarray(numbers, dtype=np.int64) % pictures]
        at = generator.permutation(places)[: memory_BMw.shape[1]]
        rows_B, at_M = (torch.from_numpy(one).to(memory_BMw.device) for one in (chosen, at))
        return memory_BMw + self.weight * self.bank_NSw[rows_B[:, None], at_M].to(memory_BMw.dtype)
