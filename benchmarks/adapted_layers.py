"""Forward and forward with backward of an adapted layer, as a ratio to LoRA of the same rank, and what it keeps for the
backward pass: `python benchmarks/adapted_layers.py [--json benchmarks/results/adapted_layers.json]`.

One process and one thread, in processor time, so that what else runs on the machine counts little. A round times every
adapter once, in an order that rotates from round to round; a ratio is taken within its round, and the median over
rounds counts.
The layer's own product is part of every time, as it is in training.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lightspan.adapters.adapter import Adapted, AdapterSpec
from lightspan.adapters.codyra import GatedLoRA
from lightspan.adapters.flora import FLoRA
from lightspan.adapters.inject import adapt
from lightspan.adapters.lora import LoRA
from lightspan.adapters.paca import PaCA
from lightspan.adapters.svfit import SVFit
from lightspan.core.files.atomic import write_atomic

RANK, LIMIT = 16, 1.15
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear 768 x 768, 512 tokens": (lambda: nn.Linear(768, 768), (512, 768)),
    "convolution 3x3, 128 x 128, 4 images of 16 x 16": (lambda: nn.Conv2d(128, 128, 3, padding=1), (4, 128, 16, 16)),
}
ARMS: dict[str, AdapterSpec] = {
    "LoRA": LoRA(rank=RANK),
    "PaCA": PaCA(rank=RANK),
    "SVFit": SVFit(rank=RANK),
    "FLoRA": FLoRA(rank=RANK),
    "GatedLoRA": GatedLoRA(rank=RANK),
}


def made(layer: Callable[[], nn.Module], spec: AdapterSpec) -> Adapted:
    torch.manual_seed(0)
    model = nn.Sequential(layer())
    adapt(model, ["0"], spec, show=False)
    return model[0]


def forward(layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def forward_backward(layer: nn.Module, x: Tensor) -> None:
    """With a gradient for the input, which the layers before would need."""
    layer(x).sum().backward()


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """What autograd keeps of a forward pass besides parameters and buffers, each memory once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept[place] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    return sum(kept.values())


def seconds(work: Callable[[nn.Module, Tensor], None], layer: nn.Module, x: Tensor, repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        work(layer, x)
    return (time.process_time() - start) / repeats


def measure(rounds: int, repeats: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for layer_name, (layer, shape) in LAYERS.items():
        layers = {name: made(layer, spec) for name, spec in ARMS.items()}
        for work_name, work in (("forward", forward), ("forward and backward", forward_backward)):
            x = torch.randn(shape, requires_grad=work is forward_backward)
            times: dict[str, list[float]] = {name: [] for name in ARMS}
            for turn in range(rounds + 1):
                order = list(ARMS)[turn % len(ARMS) :] + list(ARMS)[: turn % len(ARMS)]
                for name in order:
                    took = seconds(work, layers[name], x, repeats)
                    if turn:  # the first round warms up
                        times[name].append(took)
            for name in ARMS:
                ratios = [own / lora for own, lora in zip(times[name], times["LoRA"], strict=True)]
                rows.append(
                    {
                        "layer": layer_name,
                        "work": work_name,
                        "adapter": name,
                        "kept_kib": kept_bytes(layers[name], x) / 2**10 if work is forward_backward else None,
                        "ms": 1000 * statistics.median(times[name]),
                        "of_lora": statistics.median(ratios),
                        "of_lora_quartiles": statistics.quantiles(ratios, n=4)[::2],
                    }
                )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=6, help="calls a round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(args.rounds, args.repeats)
    for row in rows:
        print(f"{row['layer']:50} {row['work']:22} {row['adapter']:10} {row['ms']:8.3f} ms  {row['of_lora']:.3f}")
    worst = max(float(str(row["of_lora"])) for row in rows if row["adapter"] in ("SVFit", "FLoRA"))
    print(f"worst of SVFit and FLoRA: {worst:.3f} of LoRA at rank {RANK} (limit {LIMIT})")
    if args.json:
        about = {"rank": RANK, "rounds": args.rounds, "threads": 1, "limit": LIMIT}
        machine = {"torch": torch.__version__, "processor": platform.processor() or platform.machine()}
        write_atomic(args.json, json.dumps({**about, **machine, "rows": rows}, indent=2) + "\n")
    return int(worst > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
