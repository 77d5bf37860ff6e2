"""Reads an exported PEFT folder back with peft alone and compares the outputs of both models."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightspan.adapters.inject import adapted_layers, plain_tensors, remove
from lightspan.adapters.layers import LayerShape
from lightspan.cli.exports.huggingface import is_causal, output, seeded_inputs
from lightspan.core.errors import UserError, install_extra

ROWS, SEED = 4, 0


def adapted_part(model: nn.Module) -> nn.Module:
    """`model.backbone` if it contains all that trained, otherwise `model`: the part that PEFT gets with the folder.

    Raises: UserError for a model without adapters.
    """
    if not adapted_layers(model):
        raise UserError(
            f"--to peft exports adapters, but {type(model).__name__} of this run has none; add the callback "
            "lightspan.callbacks.training.adaptation.Adaptation to the recipe, or use --to safetensors"
        )
    backbone = getattr(model, "backbone", None)
    trained = [name for name, tensor in plain_tensors(model) if tensor.requires_grad]
    inside = all(name.startswith("backbone.") for name in (*adapted_layers(model), *trained))
    return backbone if inside and isinstance(backbone, nn.Module) else model


def require_changes(part: nn.Module) -> None:
    """Raises: UserError if no adapter changes anything, so that the folder would lose what the run learned."""
    adapters = [adapter for layer in adapted_layers(part).values() for adapter in layer.adapters.values()]
    if not any(bool(adapter.low_rank()[0].any()) for adapter in adapters):
        raise UserError(
            "every adapter of this run is zero: nothing was trained, or RankSelection(merge=True) wrote the changes "
            "into the weights; export those with --to huggingface or --to safetensors"
        )


def largest_difference(part: nn.Module, folder: Path) -> float:
    """The largest difference between outputs of `part` and of the frozen part under peft's LoRA from `folder`.

    Compared in float32: every adapted layer on seeded inputs, modules that trained completely tensor by tensor, and for
    transformers models logits or last hidden states. Raises: UserError without peft.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UserError(
            f"--to peft reads its folder back with peft, which is not installed: {install_extra('peft')}"
        ) from error
    ours = copy.deepcopy(part).float().eval()
    frozen = copy.deepcopy(ours)
    remove(frozen)
    with torch.no_grad():
        for parameter in frozen.parameters():
            if parameter.requires_grad:
                parameter.zero_()  # what trained completely has to come from the folder
    loaded: Any = PeftModel.from_pretrained(frozen, str(folder)).eval()
    theirs = loaded.base_model.model
    apart = [0.0]
    with torch.no_grad():
        for name, layer in adapted_layers(ours).items():
            x = _input_of(layer.base)
            apart.append(_largest(layer(x), theirs.get_submodule(name)(x)))
        for name, tensor in plain_tensors(ours):
            if tensor.requires_grad:
                module, _, key = name.rpartition(".")
                saved = theirs.get_submodule(module).modules_to_save["default"]
                apart.append(_largest(tensor, dict(saved.named_parameters())[key]))
        if isinstance(ours, PreTrainedModel):
            inputs, causal = seeded_inputs(ours), is_causal(ours)
            mine, others = (m if causal else m.base_model for m in (ours, theirs))
            apart.append(_largest(output(mine, inputs, causal), output(others, inputs, causal)))
    return max(apart)


def _input_of(layer: nn.Module) -> Tensor:
    shape, generator = LayerShape.of(layer), torch.Generator().manual_seed(SEED)
    if shape.linear:
        return torch.randn(ROWS, shape.fan_in, generator=generator)
    kernel = zip(shape.weight[2:], shape.dilation, strict=True)
    sizes = [dilation * (size - 1) + 4 for size, dilation in kernel]
    return torch.randn(ROWS, shape.groups * shape.weight[1], *sizes, generator=generator)


def _largest(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().amax().nan_to_num(float("inf")))
