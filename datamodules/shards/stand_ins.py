"""Members of samples made up for a plan where no shard is."""

import io

import numpy as np
import torch
from torchvision.io import encode_png

NOWHERE = {"__url__": "none", "__key__": "none"}
"""What a sample has beside its members."""


def black_png(height: int, width: int, channels: int = 3) -> bytes:
    return encode_png(torch.zeros(channels, height, width, dtype=torch.uint8)).numpy().tobytes()


def npy(values: np.ndarray) -> bytes:
    stored = io.BytesIO()
    np.save(stored, values)
    return stored.getvalue()
