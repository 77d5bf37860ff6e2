"""The adapters that the contract suite runs over: one line each."""

from lightspan.adapters.adapter import AdapterSpec
from lightspan.adapters.diffscaler import DiffScaler
from lightspan.adapters.full import Full
from lightspan.adapters.lora import LoRA

CASES: dict[str, AdapterSpec] = {
    "DiffScaler": DiffScaler(rank=2),
    "scale and shift": DiffScaler(rank=0),
    "Full": Full(),
    "LoRA": LoRA(rank=1, alpha=2.0),
}
