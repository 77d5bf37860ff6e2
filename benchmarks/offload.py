"""What it costs, and saves, to keep optimiser state on the host: time and device memory of training steps on one GPU.

    python benchmarks/offload.py [--json FILE] [--steps N] [--dry-run]

Each optimiser trains the same stack of feed-forward blocks in bfloat16: by itself, from the same weights, one after the
other, since what is measured is the memory of each. The first steps are not counted: they make state and compile.
Figures are the median step, forward and backward included, and the largest allocation of torch's allocator in all
counted steps; both also as ratios to torch's fused AdamW with everything on the device.

torchao's CPUOffloadOptimizer keeps AdamW's state and a copy of the weights on the host and steps there: gradients are
sent to the host, and weights back. LowRank(offload=True) sends state to the device and back; gradients and weights stay
there. Peers that are not installed are named.

Results go to benchmarks/results/offload_<card>.json. --dry-run needs no GPU: tiny shapes on the CPU, where nothing is
away, and figures that say nothing.
"""

import argparse
import gc
import json
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import write_atomic
from lightspan.core.memory import MIB, state_bytes
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.matrices.matrix_optimizer import MatrixOptimizer
from lightspan.optim.matrices.moments import Int8Moments
from lightspan.optim.muon import FactoredMuon

RESULTS = Path(__file__).parent / "results"
REFERENCE = "torch AdamW fused"
LR, WARMUP = 1e-5, 3
Row = dict[str, Any]
Build = Callable[[Iterable[Parameter]], Any]


@dataclass(frozen=True)
class Sizes:
    """Feed-forward blocks: half a billion numbers, of which a tenth are an embedding."""

    width: int = 2048
    depth: int = 14
    vocabulary: int = 32_000
    tokens: int = 4096
    rank: int = 128


TINY = Sizes(width=16, depth=2, vocabulary=32, tokens=8, rank=4)


class Net(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.width
        self.embedding = nn.Embedding(sizes.vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(sizes.depth)
        )

    def forward(self, token_T: Tensor) -> Tensor:
        x_TD = self.embedding(token_T)
        for block in self.blocks:
            x_TD = x_TD + block(x_TD)
        return x_TD.float().square().mean()


def torchao(**options: Any) -> Build:
    def build(parameters: Iterable[Parameter]) -> Any:
        from torchao.optim import CPUOffloadOptimizer

        return CPUOffloadOptimizer(parameters, torch.optim.AdamW, lr=LR, fused=True, **options)

    return build


def cases(sizes: Sizes) -> dict[str, Build]:
    """How each optimiser is built, by its name in tables."""

    def ours(kind: type[MatrixOptimizer], **options: Any) -> Build:
        return lambda parameters: kind(parameters, lr=LR, **options)

    found: dict[str, Build] = {REFERENCE: lambda parameters: torch.optim.AdamW(parameters, lr=LR, fused=True)}
    found["torchao CPUOffloadOptimizer"] = torchao()
    found["torchao CPUOffloadOptimizer, gradients too"] = torchao(offload_gradients=True)
    for name, kind, options in (
        ("LowRank", LowRank, {"rank": sizes.rank}),
        ("LowRank int8", LowRank, {"rank": sizes.rank, "moments": Int8Moments()}),
        ("FactoredMuon", FactoredMuon, {}),
    ):
        found[name] = ours(kind, **options)
        found[f"{name}, offload"] = ours(kind, offload=True, **options)
    return found


def measured(build: Build, sizes: Sizes, steps: int, device: torch.device) -> Row:
    """Milliseconds of the median step, and MiB: the peak of the device, and state on the device and on the host."""
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)
    torch.manual_seed(0)
    net = Net(sizes).to(device, torch.bfloat16)
    token_T = torch.randint(sizes.vocabulary, (sizes.tokens,), device=device)
    optimizer, times = build(net.parameters()), []
    for number in range(WARMUP + steps):
        if number == WARMUP and on_gpu:
            torch.cuda.reset_peak_memory_stats()
        wait()
        start = time.perf_counter()
        net(token_T).backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        times.append(1e3 * (time.perf_counter() - start))
    row: Row = {"ms": median(times[WARMUP:]), "peak_mib": torch.cuda.max_memory_allocated() / MIB if on_gpu else None}
    if isinstance(optimizer, Optimizer):
        row["state_mib"] = state_bytes(optimizer) / MIB
    if isinstance(optimizer, MatrixOptimizer):
        row["offloaded_mib"] = optimizer.placement.sizes(optimizer.state)[0] / MIB
    return row


def benchmark(sizes: Sizes, steps: int, device: torch.device) -> Row:
    """All figures, as they are written to the file."""
    rows: dict[str, Row] = {}
    refused: dict[str, str] = {}
    for name, build in cases(sizes).items():
        try:
            rows[name] = measured(build, sizes, steps, device)
        except Exception as failure:  # one that does not run here must not hide the figures of the others
            how = "pip install torchao: " if isinstance(failure, ImportError) else ""
            refused[name] = f"{how}{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
    for row in rows.values():
        for key in ("ms", "peak_mib") if REFERENCE in rows else ():
            row[f"x_{key}"] = row[key] / rows[REFERENCE][key] if row[key] is not None else None
    card = torch.cuda.get_device_name() if device.type == "cuda" else "dry run"
    return {
        "card": card,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "steps": steps,
        "sizes": vars(sizes),
        "optimizers": rows,
        "refused": refused,
    }


def table(result: Row) -> Table:
    drawn = Table(title=f"{result['card']}: a training step with optimiser state on the device and on the host")
    drawn.add_column("optimiser", no_wrap=True)
    columns = {"ms": ".1f", "x_ms": ".2f", "peak_mib": ",.0f", "x_peak_mib": ".2f", "state_mib": ",.1f"}
    columns["offloaded_mib"] = ",.1f"
    for column in ("ms", "x", "peak MiB", "x", "state MiB", "offloaded"):
        drawn.add_column(column, justify="right")
    for name, row in result["optimizers"].items():
        drawn.add_row(name, *("" if row.get(key) is None else format(row[key], form) for key, form in columns.items()))
    return drawn


def main(argv: list[str] | None = None) -> int:
    """Exit status 2 if there is no GPU, 1 if something did not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: results/offload_<card>.json")
    parser.add_argument("--steps", type=int, default=20, help="counted steps of each optimiser (default 20)")
    parser.add_argument("--dry-run", action="store_true", help="no GPU, no meaning; written only with --json")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: there is no median of fewer than one")
    try:
        if not arguments.dry_run and not torch.cuda.is_available():
            raise UserError(
                "torch sees no GPU here, and without one state is nowhere but on the host; --dry-run shows the table"
            )
    except UserError as refusal:
        print(refusal, file=sys.stderr)
        return 2
    if arguments.dry_run:
        result = benchmark(TINY, 1, torch.device("cpu"))
    else:
        result = benchmark(Sizes(), arguments.steps, torch.device("cuda"))
    console = Console(width=120)
    console.print(table(result))
    for name, why in result["refused"].items():
        console.print(f"not timed: {name}: {why}", markup=False, highlight=False, soft_wrap=True)
    if arguments.json or not arguments.dry_run:
        card = re.sub(r"[^a-z0-9]+", "_", result["card"].lower()).strip("_")
        write_atomic(arguments.json or RESULTS / f"offload_{card}.json", json.dumps(result, indent=1) + "\n")
    return 1 if result["refused"] else 0


if __name__ == "__main__":
    sys.exit(main())
