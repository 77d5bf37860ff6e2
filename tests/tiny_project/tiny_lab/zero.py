"""ZeRO where there is no GPU, and where DeepSpeed's CPU communication is built."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy

from lightspan.training.deepspeed import ZeRO

EXTENSIONS = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path(__file__).parents[3] / "build/torch_extensions"))
BUILT = (EXTENSIONS / "deepspeed_shm_comm/deepspeed_shm_comm.so").is_file()
READY = importlib.util.find_spec("deepspeed") is not None and BUILT
NOT_READY = f"DeepSpeed is not installed, or its CPU communication is not built in {EXTENSIONS}: run `make deepspeed`"


def environment() -> dict[str, str]:
    """What a process needs that trains with `OnCPU`."""
    # ninja, which DeepSpeed asks whether its build is new enough, lies beside the interpreter.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(EXTENSIONS), "PATH": path}


class OnCPU(ZeRO):
    """`ZeRO` without Lightning's demand for CUDA."""

    def __init__(self, stage: int, **settings: Any) -> None:
        super().__init__(stage=stage, process_group_backend="gloo", **settings)

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank)
