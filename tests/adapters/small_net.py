"""A network with every kind of layer that adapters take, small enough to check each of them exactly."""

import torch
from torch import Tensor, nn

LAYERS = ["stem", "grouped", "depthwise", "line", "volume", "dense"]


class SmallNet(nn.Module):
    """[B 3 8 8] -> [B 4], deterministic in `seed`. `head` is left to train whole."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2, padding_mode="circular")
        self.depthwise = nn.Conv2d(12, 12, 3, padding="same", groups=12)
        self.line = nn.Conv1d(12, 6, 3, dilation=2)
        self.volume = nn.Conv3d(1, 4, (3, 2, 1), bias=False)
        self.dense = nn.Linear(4, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h = self.norm(self.stem(x_BCHW)).tanh()
        h = self.depthwise(self.grouped(h).tanh()).tanh()
        h = self.line(h.flatten(2)).tanh().unflatten(2, (3, 4))[:, None]
        h = self.volume(h).tanh().mean(dim=(2, 3, 4))
        return self.head(self.dense(h).tanh())


def images(rows: int = 4, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def perturb(model: nn.Module, seed: int = 2) -> nn.Module:
    """Moves everything that trains, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model
