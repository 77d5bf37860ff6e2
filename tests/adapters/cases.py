"""The adapters that the contract suite runs over: one line each."""

from lightspan.adapters.adapter import AdapterSpec
from lightspan.adapters.lora import LoRA

CASES: dict[str, AdapterSpec] = {
    "LoRA": LoRA(rank=1, alpha=2.0),
}
