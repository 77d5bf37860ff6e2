"""Members of samples made up for a plan where no shard is."""

import io

import numpy as np
import torch

from lightspan.core.pixels import png_of

NOWHERE = {"__url__": "none", "__key__": "none"}
"""What a sample has beside its members."""


def black_png(height: int, width: int, channels: int = 3) -> bytes:
    return png_of(torch.zeros(channels, height, width))


def npy(values: np.ndarray) -> bytes:
    stored = io.BytesIO()
    np.save(stored, values)
    return stored.getvalue()
