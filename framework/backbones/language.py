"""Language models from transformers, built from a config: no hub, no download."""

import inspect
from typing import Literal

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from lightspan.backbones.huggingface import kind_of, stored_network
from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath

# A recipe may name the functions listed here.
__all__ = ["bert", "llama", "stored_causal_lm", "stored_encoder", "stored_t5", "t5"]

Precision = Literal["float32", "bfloat16", "float16"]


def bert(
    vocab_size: int = 30522,
    width: int = 768,
    depth: int = 12,
    heads: int = 12,
    mlp_width: int = 3072,
    context: int = 512,
    dropout: float = 0.1,
) -> BertModel:
    """A BERT encoder without pooler, with random weights; the defaults are BERT-base.

    Args:
        vocab_size: tokens.
        width, depth, heads, mlp_width: of states, blocks, attention heads, width of the MLP.
        context: longest text in tokens.
        dropout: of states and attention, in [0, 1).
    Raises: UserError if `heads` does not divide `width`, or for another dropout.
    """
    if width % heads or not 0 <= dropout < 1:
        raise UserError(f"bert width={width} must be a multiple of heads={heads}, and dropout={dropout} in [0, 1)")
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=mlp_width,
        max_position_embeddings=context,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertModel(config, add_pooling_layer=False).train()


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


def stored_causal_lm(folder: ReadPath, dtype: Precision | None = "float32") -> PreTrainedModel:
    """A causal language model, such as a Llama, Qwen2 or GPT-2, from a folder as transformers saves it, with its
    weights as safetensors.

    Its class follows from the folder's config.json and is one of transformers' own; no code of the folder runs.

    Args:
        dtype: of the weights; None keeps that of the files. In half precision a weight that trains loses steps that are
            small beside it, so take it for weights that adapters leave frozen.
    Raises: UserError as `lightspan.backbones.huggingface.kind_of` and `stored_network`.
    """
    kind = kind_of(folder, causal=True)
    network = stored_network(kind, folder, "causal language model", dtype and getattr(torch, dtype))
    network.config.use_cache = False  # useful only for generation
    return network


def stored_encoder(folder: ReadPath, dtype: Precision | None = "float32") -> PreTrainedModel:
    """A text encoder without head and pooler, such as a BERT or RoBERTa, as `stored_causal_lm`. A causal language model
    without its head is one too: each state then knows only the tokens before it.
    """
    kind = kind_of(folder, causal=False)
    settings = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind).parameters else {}
    return stored_network(kind, folder, "text encoder", dtype and getattr(torch, dtype), **settings)


def t5(
    vocab_size: int = 361,
    width: int = 128,
    depth: int = 2,
    decoder_depth: int | None = None,
    heads: int = 4,
    head_width: int | None = None,
    mlp_width: int = 256,
    gated: bool = True,
    dropout: float = 0.0,
    tied: bool = True,
) -> T5ForConditionalGeneration:
    """A T5 encoder and decoder with relative positions and random weights.

    Source: Raffel et al., 2019, arXiv 1910.10683; gated as in Shazeer, 2020, arXiv 2002.05202. T5 1.1 is gated and not
    tied.

    Args:
        vocab_size: tokens; 361 for bytes with 5 special tokens and 100 sentinels.
        width, heads, mlp_width: residual width, attention heads, width of the MLP.
        depth, decoder_depth: blocks of the encoder and of the decoder; None is as many.
        head_width: of a head; None divides the width among the heads.
        gated: GELU with a gate (T5 1.1) instead of ReLU (T5).
        dropout: of activations and attention; UL2 is pretrained without.
        tied: one table for inputs and outputs, with states scaled by width^-0.5 before it, as in T5. T5 1.1 has a head
            of its own and does not scale; here it starts at N(0, 1 / width), so that logits start alike in both.
    Raises: UserError if `heads` does not divide `width` and `head_width` is not given.
    """
    if head_width is None and width % heads:
        raise UserError(f"width={width} does not divide into heads={heads}; set head_width, or another number of heads")
    config = T5Config(
        vocab_size=vocab_size,
        d_model=width,
        d_kv=head_width or width // heads,
        d_ff=mlp_width,
        num_layers=depth,
        num_decoder_layers=decoder_depth or depth,
        num_heads=heads,
        dropout_rate=dropout,
        feed_forward_proj="gated-gelu" if gated else "relu",
        use_cache=False,
        tie_word_embeddings=tied,  # to transformers it says whether states are scaled
    )
    network = T5ForConditionalGeneration(config)
    if not tied:  # where transformers ties a network that it makes, and only unties one that it loads
        network.lm_head = nn.Linear(width, vocab_size, bias=False)
        nn.init.normal_(network.lm_head.weight, std=width**-0.5)
        network.all_tied_weights_keys.pop("lm_head.weight", None)
    return network


def stored_t5(folder: ReadPath) -> T5ForConditionalGeneration:
    """A T5 from a folder as transformers saves it, with its weights as safetensors; T5 1.1 and its LM-adapted ones too.

    Raises: UserError as `lightspan.backbones.huggingface.stored_network`.
    """
    network = stored_network(T5ForConditionalGeneration, folder, "T5")
    network.config.use_cache = False
    return network
