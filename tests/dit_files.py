"""Random tensors of the names and shapes that facebookresearch/DiT has."""

import torch
from torch import Tensor


def published(
    side: int = 8, patch: int = 2, chans: int = 3, width: int = 16, depth: int = 2, classes: int = 10
) -> dict[str, Tensor]:
    """With learned variance, for images of `side` pixels."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, list[int]] = {
        "pos_embed": [1, (side // patch) ** 2, width],
        "x_embedder.proj.weight": [width, chans, patch, patch],
        "y_embedder.embedding_table.weight": [classes + 1, width],
        "t_embedder.mlp.0.weight": [width, 256],
        "t_embedder.mlp.2.weight": [width, width],
        "final_layer.adaLN_modulation.1.weight": [2 * width, width],
        "final_layer.linear.weight": [2 * chans * patch**2, width],
    }
    for block in (f"blocks.{number}" for number in range(depth)):
        shapes |= {
            f"{block}.adaLN_modulation.1.weight": [6 * width, width],
            f"{block}.attn.qkv.weight": [3 * width, width],
            f"{block}.attn.proj.weight": [width, width],
            f"{block}.mlp.fc1.weight": [4 * width, width],
            f"{block}.mlp.fc2.weight": [width, 4 * width],
        }
    biases = {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items() if name.endswith("weight")}
    del biases["y_embedder.embedding_table.bias"]
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in (shapes | biases).items()}
