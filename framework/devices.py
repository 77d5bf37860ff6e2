"""What devices can compute with."""

import torch


def widest_float(device: torch.device) -> torch.dtype:
    """float64 where the device has it. Apple's GPUs and some of Intel's stop at float32."""
    if device.type == "mps":
        return torch.float32
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return torch.float32
    return torch.float64
