"""What devices can compute with."""

import torch

WITHOUT_FLOAT64 = {"mps"}
"""Types of device that stop at float32; of Intel's GPUs some do."""


def widest_float(device: torch.device) -> torch.dtype:
    """float64 where the device has it, float32 elsewhere."""
    lacks = device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64
    return torch.float32 if lacks or device.type in WITHOUT_FLOAT64 else torch.float64
