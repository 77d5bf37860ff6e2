"""How much arithmetic a step takes, and how much a GPU could do at most."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightspan.core.devices import float32_precision

# Dense products with float32 accumulation, in FLOPs per second: (bfloat16 and float16, TF32, float32), which is half of
# what is published for sparse matrices. A100, H100 SXM and H200 agree between independent sources; the others are from
# secondary ones, which differ by up to 4 %. A name begins as torch.cuda.get_device_name gives it.
PEAKS = {
    r"NVIDIA A100\b": (312e12, 156e12, 19.5e12),
    r"NVIDIA H100 (80GB HBM3|SXM)": (989.4e12, 494.7e12, 66.9e12),
    r"NVIDIA H100 PCIe": (756e12, 378e12, 51.2e12),
    r"NVIDIA H200$": (989.4e12, 494.7e12, 66.9e12),
    r"NVIDIA L4$": (121e12, 60e12, 30.3e12),
    r"NVIDIA L40S\b": (362e12, 183e12, 91.6e12),
    r"NVIDIA A10$": (125e12, 62.5e12, 31.2e12),
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The most that a device can compute in FLOPs per second; None for a CPU, an unknown GPU, or float64.

    Args:
        precision: the trainer's, such as "bf16-mixed". Of "32-true", torch.set_float32_matmul_precision decides.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peaks = next((found for pattern, found in PEAKS.items() if re.match(pattern, name)), None)
    if peaks is None or "64" in precision:
        return None
    half, tf32, full = peaks
    if "16" in precision:
        return half
    return full if float32_precision() == "highest" else tf32


class FlopCount(TorchDispatchMode):
    """Inside it, the FLOPs of matrix products, convolutions and attention add up in `flops`, by torch's formulas: two
    for each product with its sum. Other operations, and kernels that torch has no formula for, count nothing.

    It only looks on: every operation runs as it would without it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> Any:
        out = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=out))
        return out
