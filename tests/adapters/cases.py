"""The adapters that the contract suite runs over: one line each."""

from lightspan.adapters.adapter import AdapterSpec
from lightspan.adapters.codyra import GatedLoRA
from lightspan.adapters.diffscaler import DiffScaler
from lightspan.adapters.flora import FLoRA
from lightspan.adapters.full import Full
from lightspan.adapters.lora import LoRA
from lightspan.adapters.paca import PaCA
from lightspan.adapters.svfit import SVFit

CASES: dict[str, AdapterSpec] = {
    "DiffScaler": DiffScaler(rank=2),
    "scale and shift": DiffScaler(rank=0),
    "Full": Full(),
    "LoRA": LoRA(rank=1, alpha=2.0),
    "SVFit": SVFit(),
    "SVFit-energy": SVFit(energy=0.8),
    "FLoRA": FLoRA(rank=3, kernel_rank=2, scale=0.5),
    "GatedLoRA": GatedLoRA(rank=2),
    "PaCA": PaCA(rank=2, alpha=3.0, cap=True),
}
