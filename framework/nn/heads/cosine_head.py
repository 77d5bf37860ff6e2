"""A linear classifier of directions."""

from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.unit_length import unit_length


class CosineHead(nn.Linear):
    """Features -> logits w_k . x / |x| + b_k: [B F] -> [B K]; the cosine with each class times the length of its row.

    With rows that are CLIP's embeddings of the classes times its scale it is CLIP's zero-shot classifier (Radford et
    al., 2021, arXiv 2103.00020, section 3.1.2), and the frozen head of merges of its image encoders (Ilharco et al.,
    2023, arXiv 2212.04089). A feature of zeros has the biases as its logits. Arguments are those of `torch.nn.Linear`.
    """

    def forward(self, x_BF: Tensor) -> Tensor:
        return super().forward(unit_length(wide(x_BF)).to(x_BF.dtype))
