"""Language models from transformers, built from a config: no hub, no download."""

from transformers import LlamaConfig, LlamaForCausalLM

from lightspan.errors import UserError

# A recipe may name the functions listed here.
__all__ = ["llama"]


def llama(
    vocab_size: int = 256, width: int = 192, depth: int = 4, heads: int = 6, mlp_width: int = 512, context: int = 256
) -> LlamaForCausalLM:
    """A Llama decoder with untied head and random weights.

    Args:
        vocab_size: tokens; 256 for bytes.
        width, depth, heads, mlp_width: residual width, blocks, attention heads, width of the gated MLP.
        context: longest sequence in tokens.
    Raises: UserError if `heads` does not divide `width` into even heads (rotary positions turn pairs).
    """
    if width % heads or (width // heads) % 2:
        raise UserError(
            f"width={width} must split into heads={heads} parts of even size; try heads={max(width // 64, 1)}"
        )
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=mlp_width,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        use_cache=False,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)
