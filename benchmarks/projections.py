"""How close a Fastfood push comes to its floor, log2(D) passes over memory, and how long the other projections take.

    python benchmarks/projections.py [--json FILE] [--rounds N] [--threads N] [--quick]

A pass reads and writes L float32 numbers once: a copy on the same device, timed in the same rounds. A transform that
sums pairs makes log2(L) of them, and Fastfood is published with two transforms. Every figure is the minimum of
interleaved rounds; with one thread on a CPU it is the thread's own time, which waits for no other process. The target
is 4 times the floor. Results go to benchmarks/results/projections.json.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lightspan.core.files.atomic import write_atomic
from lightspan.subspaces.projections import DENSE_LIMIT, Dense, Fastfood, Projection, Sparse

RESULTS = Path(__file__).parent / "results" / "projections.json"
SIZES, QUICK_SIZES = (199_210, 2**20, 10**7), (3000,)
DIM, DENSE_DIM = 1000, 100
TARGET = 4.0
KINDS: dict[str, type[Projection]] = {"Fastfood": Fastfood, "Sparse": Sparse, "Dense": Dense}


def timed_ms(function: Callable[[], Any], device: torch.device) -> float:
    own_time = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if own_time else time.perf_counter
    start = clock()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (clock() - start)


def measure(size: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """One row for each projection of `size` weights: times of push and pull, of a pass, and what is kept."""
    length = 1 << (size - 1).bit_length()
    source, target = torch.randn(length, device=device), torch.empty(length, device=device)
    rows = []
    for name, kind in KINDS.items():
        dim = DENSE_DIM if name == "Dense" else DIM
        if name == "Dense" and size * dim > DENSE_LIMIT:
            continue
        projection = kind(size, dim)
        z_d, g_D = torch.randn(dim, device=device), torch.randn(size, device=device)
        cases = {
            "pass": lambda: target.copy_(source),
            "push": lambda p=projection, z=z_d: p.push(z),
            "pull": lambda p=projection, g=g_D: p.pull(g),
        }
        times: dict[str, list[float]] = {case: [] for case in cases}
        for number in range(rounds + 2):
            for case, function in cases.items():
                ms = timed_ms(function, device)
                if number >= 2:
                    times[case].append(ms)
        ms = {case: min(found) for case, found in times.items()}
        floor_ms = ms["pass"] * (length.bit_length() - 1)
        kept = sum(value.nbytes for value in vars(projection).values() if isinstance(value, torch.Tensor))
        rows.append(
            {
                "projection": name,
                "weights": size,
                "dim": dim,
                "push_ms": ms["push"],
                "pull_ms": ms["pull"],
                "pass_ms": ms["pass"],
                "floor_ms": floor_ms,
                "push_x_floor": ms["push"] / floor_ms,
                "pull_x_floor": ms["pull"] / floor_ms,
                "kept_mib": kept / 2**20,
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Projections against log2(D) passes over memory", title_justify="left")
    for column in ("", "weights", "d", "push ms", "pull ms", "pass ms", "push / floor", "pull / floor", "MiB"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        times = [f"{row[key]:.3g}" for key in ("push_ms", "pull_ms", "pass_ms", "push_x_floor", "pull_x_floor")]
        table.add_row(row["projection"], f"{row['weights']:,}", str(row["dim"]), *times, f"{row['kept_mib']:.1f}")
    Console().print(table)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one small size, to see that it runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    rows = [row for size in (QUICK_SIZES if options.quick else SIZES) for row in measure(size, options.rounds, device)]
    worst = max(row["push_x_floor"] for row in rows if row["projection"] == "Fastfood")
    result = {
        "device": card,
        "threads": options.threads,
        "torch": torch.__version__,
        "rounds": options.rounds,
        "target_x_floor": TARGET,
        "worst_fastfood_push_x_floor": worst,
        "rows": rows,
    }
    show(rows)
    print(f"Fastfood push: at most {worst:.2f} times the floor (target {TARGET:g})")
    write_atomic(options.json, json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
