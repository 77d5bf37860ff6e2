"""One head that guesses words from the first coordinates of a state, however many there are.

Source: Zhuang et al., "Starbucks", 2024, arXiv 2410.13230, section 3.2, and the authors' code: BERT's head for masked
words, of whose first layer only the first d columns act on d coordinates, with its whole bias. Its output is always D
wide, so that LayerNorm and word embeddings are those of all sizes.
Shapes: D width, d <= D coordinates, V words.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NestedLMHead(nn.Module):
    """States [... d] -> logits [... V]; a state of d numbers has the logits of the same with D - d zeros behind.

    Args:
        width: D.
        words: V.
        eps: of the LayerNorm.
    """

    def __init__(self, width: int, words: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=eps)
        self.bias = nn.Parameter(torch.zeros(words))
        nn.init.normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)

    def transform(self, x: Tensor) -> Tensor:
        """[... d] -> [... D]."""
        return self.norm(F.gelu(F.linear(x, self.dense.weight[:, : x.shape[-1]], self.dense.bias)))

    def forward(self, x: Tensor, words_VD: Tensor) -> Tensor:
        """[... d] -> [... V], by the embeddings of words that the encoder reads with."""
        return F.linear(self.transform(x), words_VD, self.bias)
