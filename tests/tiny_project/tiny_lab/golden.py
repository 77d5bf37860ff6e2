"""A model that starts the same on every machine, to the last bit."""

import torch
from transformers import LlamaForCausalLM

from lightspan.backbones.language import llama


def exact_llama(vocab_size: int, width: int, depth: int, heads: int, mlp_width: int, context: int) -> LlamaForCausalLM:
    """A Llama whose matrices are drawn as whole numbers over a power of two: torch's normal numbers differ in their
    last bits from one processor to the next.
    """
    model = llama(vocab_size, width, depth, heads, mlp_width, context)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # the norms' vectors are ones
                drawn = torch.randint(-(2**15), 2**15 + 1, parameter.shape, generator=generator)
                parameter.copy_(drawn / 2**20)  # within 1/32, a standard deviation of 0.018
    return model
