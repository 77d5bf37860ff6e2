"""What evidence on scikit-learn's 8 x 8 digits shares: the images in an order of each seed, training, and accuracy."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F


def shuffled(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(images [1797 8 8] in [0, 1], labels)."""
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.images))
    return data.images[order] / 16, data.target[order]


def parted(seed: int, searching: bool) -> tuple[np.ndarray, np.ndarray]:
    """As `shuffled`, of the 597 digits that a search may use, or of the other 1,200, which figures are taken on."""
    images, labels = shuffled(100)
    part = slice(597) if searching else slice(597, None)
    order = np.random.default_rng(seed).permutation(len(labels[part]))
    return images[part][order], labels[part][order]


def pretrain(model: nn.Module, x: Tensor, y: Tensor, epochs: int, batch: int, lr: float) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(batch):
            step(model, optimizer, x[rows], y[rows])


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In per cent."""
    return 100 * (model(x).argmax(dim=1) == y).float().mean().item()
