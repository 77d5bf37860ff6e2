"""Places in a plane for things of which only the distances are known.

Source: Torgerson's classical scaling to start with, then stress majorisation with weights 1 / D^2, so that near things
are near (Gansner, Koren, North, "Graph Drawing by Stress Majorization", 2004). Shapes: N things.
"""

import numpy as np
import torch
from torch import Tensor


def plane_layout(distance_NN: Tensor, steps: int = 200) -> Tensor:
    """Places [N 2] in float64, centred, whose distances are nearly those given; the same each time.

    Args:
        distance_NN: symmetric and at least 0; things at distance 0 get one place, nearly.
        steps: of the majorisation, at least 0.
    """
    distance = distance_NN.double().cpu().numpy()
    count = len(distance)
    if count < 2 or not distance.any():
        return torch.zeros(count, 2, dtype=torch.float64)
    scale = distance.max()
    distance = distance / scale
    centring = np.eye(count) - 1 / count
    values, vectors = np.linalg.eigh(-centring @ distance**2 @ centring / 2)
    x = np.zeros((count, 2))
    x[:, : min(2, count)] = (vectors * np.sqrt(values.clip(0)))[:, ::-1][:, :2]
    # A sign of its own for each axis, which eigenvectors do not have.
    x *= np.where(x[np.abs(x).argmax(axis=0), [0, 1]] < 0, -1, 1)
    # What lies on one line, or on one point, cannot leave it by majorisation alone.
    x += 1e-3 * np.stack([np.cos(np.arange(count) * 2.4), np.sin(np.arange(count) * 2.4)], axis=1)
    weight = 1 / np.maximum(distance, 1e-3) ** 2
    np.fill_diagonal(weight, 0)
    laplacian = np.diag(weight.sum(axis=1)) - weight
    inverse = np.linalg.pinv(laplacian, hermitian=True)
    for _ in range(steps):
        apart = np.sqrt(((x[:, None] - x[None]) ** 2).sum(axis=2))
        ratio = -weight * distance / np.maximum(apart, 1e-12)
        np.fill_diagonal(ratio, 0)
        np.fill_diagonal(ratio, -ratio.sum(axis=1))
        x = inverse @ ratio @ x
    return torch.from_numpy(scale * (x - x.mean(axis=0)))
