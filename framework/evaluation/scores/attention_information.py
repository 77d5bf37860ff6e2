"""How much the keys that a query attends to tell of the query: local, hybrid and global patterns of attention.

Source: Zhang et al., "UNIP: Rethinking Pre-trained Attention Patterns for Infrared Semantic Segmentation",
ICLR 2025, arXiv 2502.02257, which takes the measure from Xie et al., "Revealing the Dark Secrets of Masked Image
Modeling", 2022, arXiv 2205.13543. With a query q drawn evenly and its key k by attention:

    I = sum_qk (1/N) A_qk log(A_qk / p(k)),   p(k) = (1/N) sum_q A_qk,   NMI = I / sqrt(H(q) H(k))

1 for a query that attends to itself alone, 0 where all queries attend alike. It depends on the number of tokens, so
that a level found at one size of images is not that of another. Assumed: all tokens count, those of the prefix too.
Shapes: B images, H heads, Q queries, K keys, N tokens.
"""

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from lightspan.core.devices import widest_float
from lightspan.core.distributed import all_reduce_sums
from lightspan.nn.sequences.attention_maps import attention_logits, attention_of
from lightspan.nn.tokens import feature_modules


def normalised_mutual_information(attention_BHQK: Tensor) -> Tensor:
    """NMI of each map, [B H] in [0, 1] up to rounding, in the device's widest type.

    Args:
        attention_BHQK: rows that are distributions. Where all queries look at one key alone, or there is one query, it
            is 0.
    """
    p_BHQK = attention_BHQK.to(widest_float(attention_BHQK.device))
    key_BHK = p_BHQK.mean(dim=2)
    log_key_BHK = key_BHK.clamp_min(torch.finfo(key_BHK.dtype).tiny).log()
    information_BH = (torch.xlogy(p_BHQK, p_BHQK) - p_BHQK * log_key_BHK[:, :, None]).sum(dim=3).mean(dim=2)
    entropies_BH = -torch.xlogy(key_BHK, key_BHK).sum(dim=2) * math.log(max(p_BHQK.shape[2], 1))
    known_BH = entropies_BH > 0
    nmi_BH = information_BH.clamp_min(0) / torch.where(known_BH, entropies_BH, 1).sqrt()
    return torch.where(known_BH | entropies_BH.isnan(), nmi_BH, 0)


@torch.no_grad()
def information_of_layers(network: nn.Module, batches: Iterable[Tensor]) -> tuple[int, list[Tensor]]:
    """(number of images, mean NMI of each head by layer: [H] each, NaN without images) over the images of all ranks.

    Args:
        network: in evaluation mode; see `lightspan.nn.sequences.attention_maps`. Each rank gives its own images.
        batches: [B C h w] each.
    Raises: UserError for a network whose attention cannot be read.
    """
    layers, count = range(len(feature_modules(network))), 0
    totals: list[Tensor] | None = None
    for image_BChw in batches:
        nmi = attention_logits(network, partial(network, image_BChw), layers, keep=_of_logits)
        totals = nmi if totals is None else [total + one for total, one in zip(totals, nmi, strict=True)]
        count += len(image_BChw)
    if totals is None:  # a rank without images still takes part in the sums
        totals = [torch.zeros(attention_of(network, layer).num_heads, dtype=torch.float64) for layer in layers]
    images, *sums = all_reduce_sums(totals[0].new_tensor([count]), *totals)
    return int(images), [total / images for total in sums]


def _of_logits(logits_BHNN: Tensor) -> Tensor:
    """Sum over images, [H]."""
    maps_BHNN = logits_BHNN.to(widest_float(logits_BHNN.device)).softmax(dim=3)
    return normalised_mutual_information(maps_BHNN).sum(dim=0)
