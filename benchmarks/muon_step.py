"""How long a step of whole matrices takes beside one of torch's Muon on the same matrices, and where bfloat16 counts.

    python benchmarks/muon_step.py [--json FILE] [--rounds N] [--threads N] [--quick]

The matrices are those of `optim_step.py`: six blocks of a transformer of width 384. torch's Muon takes its products in
bfloat16 whatever its weights are; here it also takes them in float32, by the same calls. It steps matrices alone, and
so do ours here. `by heads` says that the first weight of each block has queries and keys of six heads, as parameter
groups do for models. Every figure is the minimum of interleaved rounds; with one thread it is the thread's own time,
which waits for no other process. Results go to benchmarks/results/muon_step.json.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from optim_step import QUICK, Sizes, Weights, machine
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer, _muon

from lightspan.core.files.atomic import write_atomic
from lightspan.optim.matrices.moments import Float32Moments
from lightspan.optim.muon import FactoredMuon, Muon

RESULTS = Path(__file__).parent / "results" / "muon_step.json"
REFERENCE = "torch Muon"
LR = 1e-5


class Float32Muon(torch.optim.Muon):
    """torch's, with products in float32."""

    def step(self, closure: Any = None) -> Any:
        kept, _muon._zeropower_via_newtonschulz = _muon._zeropower_via_newtonschulz, in_float32
        try:
            return super().step(closure)
        finally:
            _muon._zeropower_via_newtonschulz = kept


def in_float32(
    gradient: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:  # fmt: skip
    """torch's iteration without its first cast."""
    a, b, c = coefficients
    x = gradient.T if len(gradient) > gradient.shape[1] else gradient
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if len(gradient) > gradient.shape[1] else x


def heads_of(matrices: list[Parameter], width: int) -> dict[str, list[int]]:
    """Six heads of queries, six of keys, and the values, in every weight that is three times as long as wide."""
    fused = [str(i) for i, weight in enumerate(matrices) if weight.shape == (3 * width, width)]
    return {name: [width // 6 or 1] * 12 + [3 * width - 12 * (width // 6 or 1)] for name in fused}


def cases(sizes: Sizes) -> dict[str, Callable[[list[Parameter]], Optimizer]]:
    """By the names of rows."""

    def own(kind: Any, by_heads: bool = False, **settings: Any) -> Callable[[list[Parameter]], Optimizer]:
        def build(matrices: list[Parameter]) -> Optimizer:
            group: dict[str, Any] = {"params": [(str(i), weight) for i, weight in enumerate(matrices)]}
            if by_heads:
                group["heads"] = heads_of(matrices, sizes.width)
            return kind([group], lr=LR, **settings)

        return build

    half = {"precision": "bfloat16"}
    polar = {"coefficients": "polar_express"}
    return {
        REFERENCE: lambda matrices: torch.optim.Muon(matrices, lr=LR, weight_decay=0.0),
        "torch Muon, products in float32": lambda matrices: Float32Muon(matrices, lr=LR, weight_decay=0.0),
        "lightspan Muon": own(Muon),
        "lightspan FactoredMuon": own(FactoredMuon),
        "lightspan FactoredMuon, by heads": own(FactoredMuon, by_heads=True),
        "lightspan FactoredMuon, polar_express": own(FactoredMuon, **polar),
        "lightspan FactoredMuon, moments in float32": own(FactoredMuon, moments=Float32Moments()),
        "lightspan Muon, products in bfloat16": own(Muon, **half),
        "lightspan FactoredMuon, products in bfloat16": own(FactoredMuon, **half),
        "lightspan FactoredMuon, products in bfloat16, by heads": own(FactoredMuon, by_heads=True, **half),
        "lightspan FactoredMuon, products in bfloat16, polar_express": own(FactoredMuon, **half, **polar),
    }


def measure(sizes: Sizes, rounds: int) -> dict[str, float]:
    """Milliseconds of a step by row."""
    weights = Weights.make(sizes, torch.float32)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    built = {}
    for name, build in cases(sizes).items():
        built[name] = build(weights.matrices)
        built[name].step()
    least = dict.fromkeys(built, float("inf"))
    for _ in range(rounds):
        for name, optimizer in built.items():
            start = clock()
            optimizer.step()
            least[name] = min(least[name], 1e3 * (clock() - start))
    return least


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.zeros(31 * 2**18)  # as in optim_step.py: glibc then keeps memory that is freed
    sizes = QUICK if options.quick else Sizes()
    least = measure(sizes, 2 if options.quick else options.rounds)
    rows = {
        name: {
            "ms": ms,
            "x_torch": ms / least[REFERENCE],
            "x_torch_float32": ms / least["torch Muon, products in float32"],
        }
        for name, ms in least.items()
    }
    known = machine()
    result = {
        "cpu": known["cpu"],
        "threads": options.threads,
        "torch": torch.__version__,
        "rounds": options.rounds,
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    table = Table(title="A step of the same matrices", title_justify="left")
    for column in ("", "ms", "x torch's", "x torch's in float32"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in rows.items():
        table.add_row(name, f"{row['ms']:.1f}", f"{row['x_torch']:.2f}", f"{row['x_torch_float32']:.2f}")
    Console(width=120).print(table)
    write_atomic(options.json, json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
