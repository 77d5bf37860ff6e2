"""In which precision to compute: what a device supports, and what a result needs."""

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

WITHOUT_FLOAT64 = {"mps"}
"""Types of device without float64; some of Intel's GPUs lack it."""


def widest_float(device: torch.device) -> torch.dtype:
    """float64 if the device has it, otherwise float32."""
    lacks = device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64
    return torch.float32 if lacks or device.type in WITHOUT_FLOAT64 else torch.float64


def wide_type(*dtypes: torch.dtype) -> torch.dtype:
    """float32, or the widest of the types if that is wider: half types are stored, not computed in."""
    wide = torch.float32
    for dtype in dtypes:
        wide = torch.promote_types(wide, dtype)
    return wide


def wide(x: Tensor) -> Tensor:
    """The tensor in float32 or wider, itself if it is."""
    return x.to(wide_type(x.dtype))


@torch.compiler.assume_constant_result  # compiled code is made again when it changes
def float32_precision() -> str:
    """How exact products of float32 numbers are, in the words of `torch.set_float32_matmul_precision`: "highest" is
    exact. Where backends were set one by one (`torch.backends.cuda.matmul.fp32_precision`), that of the least exact.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch does not answer in these words once a backend was set by itself
        found = {backend.matmul.fp32_precision for backend in (torch.backends.cuda, torch.backends.mkldnn)}
        return "medium" if "bf16" in found else "high" if "tf32" in found else "highest"


def has_values(x: Tensor) -> bool:
    """Whether a tensor holds numbers; those of `lightspan plan` are shapes alone."""
    return not isinstance(x, FakeTensor)
