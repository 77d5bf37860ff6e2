"""A large batch through an encoder in the memory of a small one.

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache), 2021, arXiv
2101.06983: rows are encoded in chunks, and each chunk once more when its gradient is due. That is what checkpointing
each chunk does, which also restores the random numbers of its first pass. Shapes: B rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_chunks(encode: Callable[..., Tensor], chunk: int | None, *inputs: Tensor) -> Tensor:
    """`encode(*inputs)` of at most `chunk` rows at a time: the same rows and gradient, one more forward pass, and the
    activations of one chunk only.

    An encoder that mixes rows, as BatchNorm does, mixes those of a chunk alone, and updates running means twice.

    Args:
        encode: rows in, rows out.
        chunk: None encodes all at once.
    """
    if chunk is None or len(inputs[0]) <= chunk:
        return encode(*inputs)
    parts = zip(*(x.split(chunk) for x in inputs), strict=True)
    return torch.cat([checkpoint(encode, *part, use_reentrant=False) for part in parts])
