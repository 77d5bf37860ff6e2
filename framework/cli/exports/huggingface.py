"""Reads an exported Hugging Face folder back with transformers alone and compares the outputs of both models."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lightspan.core.errors import UserError

ROWS, TOKENS, SEED = 2, 64, 0


def require_pretrained(model: nn.Module) -> None:
    """Raises: UserError unless `model.backbone` is a transformers model, which is what the format can store."""
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, PreTrainedModel):
        what = (
            f"its backbone is a {type(backbone).__name__}" if backbone is not None else "it has no attribute `backbone`"
        )
        raise UserError(
            f"--to huggingface exports methods whose backbone is a network of transformers or timm, but "
            f"{type(model).__name__} is not one: {what}; use --to onnx, --to torch-export or --to safetensors"
        )


def largest_output_difference(backbone: PreTrainedModel, folder: Path) -> float:
    """The largest difference between outputs of `backbone` and of the model that transformers loads from `folder`.

    Compared in float32 on one seeded batch: logits of causal language models, last hidden states of all others.
    """
    causal = is_causal(backbone)
    loader = AutoModelForCausalLM if causal else AutoModel
    loaded = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False, dtype=backbone.dtype)
    inputs = seeded_inputs(backbone)
    ours, theirs = (output(part, inputs, causal) for part in (backbone if causal else backbone.base_model, loaded))
    return float((ours - theirs).abs().amax())


def timm_wrapper(folder: Path) -> Any:
    """The network of timm that transformers builds from a folder; its `pooler_output` is float [B D]."""
    return AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False).eval()


def is_causal(backbone: nn.Module) -> bool:
    """Whether it is a language model of transformers with logits."""
    return type(backbone) in MODEL_FOR_CAUSAL_LM_MAPPING.values()


def task_of(network: nn.Module) -> str | None:
    """What the Hub calls the use of a network; None where the network does not say."""
    return "text-generation" if is_causal(network) else None


def output(model: Any, inputs: dict[str, Tensor], causal: bool) -> Tensor:
    """Logits of causal language models, last hidden states of all others, in float32 and without dropout."""
    was_training, dtype = model.training, model.dtype
    try:
        with torch.no_grad():
            found = model.float().eval()(**inputs)
    finally:
        model.to(dtype).train(was_training)
    return found.logits if causal else found.last_hidden_state


def seeded_inputs(backbone: PreTrainedModel) -> dict[str, Tensor]:
    """A small batch of what the model reads. Raises: UserError for models that read neither tokens nor pixels."""
    generator = torch.Generator().manual_seed(SEED)
    config, name = backbone.config, backbone.main_input_name
    if name == "input_ids":
        length = min(TOKENS, getattr(config, "max_position_embeddings", TOKENS))
        return {name: torch.randint(config.vocab_size, (ROWS, length), generator=generator)}
    if name == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {name: torch.randn(ROWS, config.num_channels, height, width, generator=generator)}
    raise UserError(
        f"--to huggingface can check models that read input_ids or pixel_values, but {type(backbone).__name__} reads "
        f"{name}; use --to safetensors"
    )
