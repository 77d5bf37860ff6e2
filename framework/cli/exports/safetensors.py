"""A checkpoint as one safetensors file."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_model
from torch import nn

from lightspan.core.files.runs import MODEL


def write_safetensors(model: nn.Module, folder: Path, metadata: dict[str, str]) -> float:
    """Writes model.safetensors with all of `model.state_dict()`; returns the largest difference after reading back.

    Tensors that share memory are stored once; the file's metadata names the others, as safetensors does.
    """
    path = folder / MODEL
    save_model(model, str(path), metadata={"format": "pt", **metadata})
    largest = 0.0
    with safe_open(str(path), framework="pt") as file:
        stored = file.metadata() or {}
        for name, tensor in model.state_dict().items():
            back = file.get_tensor(stored.get(name, name))
            if back.dtype != tensor.dtype or back.shape != tensor.shape:
                return float("inf")
            if not torch.equal(back, tensor) and tensor.numel():
                wide = torch.complex128 if tensor.is_complex() else torch.float64
                apart = (back.to(wide) - tensor.to(wide)).abs().nan_to_num(float("inf"))
                # NaN is unequal to itself and infinity minus itself is NaN, even if they are stored correctly.
                same = (back == tensor) | (back.isnan() & tensor.isnan())
                largest = max(largest, float(apart.masked_fill(same, 0.0).amax()))
    return largest
