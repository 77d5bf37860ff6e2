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


class PackedLinear(nn.Linear):
    """Eight-bit integers and a scale each row under a forward pass of its own, as bitsandbytes has it."""

    def __init__(self, dtype: torch.dtype = torch.int8) -> None:
        super().__init__(6, 5)
        scale = self.weight.detach().abs().amax(dim=1, keepdim=True) / 100
        self.register_buffer("row_scale", scale)
        self.weight = nn.Parameter((self.weight.detach() / scale).to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.row_scale.to(x.dtype), self.bias)


class PackedTensor(Tensor):
    """Integers and a scale that say they are floats, as torchao has it."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> "PackedTensor":
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)  # type: ignore[attr-defined]

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        plain = [a.codes.to(a.scale.dtype) * a.scale if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))


def packed_tensor() -> nn.Linear:
    layer, packed = nn.Linear(6, 5), PackedLinear()
    layer.weight = nn.Parameter(PackedTensor(packed.weight.detach(), packed.row_scale), requires_grad=False)
    return layer


CLOSED = {
    "integers": PackedLinear,
    "float8": lambda: PackedLinear(torch.float8_e4m3fn),
    "tensor subclass": packed_tensor,
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)),
}
"""Linear layers whose weight is none that may be read and written."""
