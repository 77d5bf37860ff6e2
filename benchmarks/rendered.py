"""How many rendered samples a second one core makes, in batches of 64 as loaders ask for them, and one at a time.

    python benchmarks/rendered.py [--json FILE] [--rounds N] [--quick] [--sheets FOLDER]

A sample comes with all its labels, standardised, as tensors. Every figure is the best of the rounds, in which arms take
turns, in the thread's own time, which waits for no other process. `--sheets` also writes a picture of each kind of
data, to be looked at. Results go to benchmarks/results/rendered.json.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from lightspan.backbones.tokenizers import HashedWords
from lightspan.core.files.atomic import write_atomic
from lightspan.datamodules.rendered.data import RenderedSets
from lightspan.datamodules.rendered.heads import LitHeads
from lightspan.datamodules.rendered.land import LandScenes
from lightspan.datamodules.rendered.pairs import ScenePairs
from lightspan.datamodules.rendered.persons import Persons
from lightspan.datamodules.rendered.scene_data import PosedViews, RenderedScenes, TwoDomains
from lightspan.datamodules.rendered.slices import BodySlices
from lightspan.datamodules.rendered.words import PrintedWords

RESULTS = Path(__file__).parent / "results" / "rendered.json"
BATCH = 64
# Name, what a sample has, how many pictures that are, and how the data are made.
CASES: dict[str, tuple[str, int, Callable[[], RenderedSets]]] = {
    "RenderedScenes": ("one picture, 48 x 48", 1, lambda: RenderedScenes()),
    "RenderedScenes, captions": (
        "one picture, 48 x 48, and tokens",
        1,
        lambda: RenderedScenes(tokenizer=HashedWords()),
    ),
    "TwoDomains": ("two pictures, 32 x 32", 2, lambda: TwoDomains()),
    "PosedViews": ("two pictures, 32 x 32", 2, lambda: PosedViews()),
    "ScenePairs": ("two views, 48 x 48", 2, lambda: ScenePairs()),
    "Persons": ("one picture, 48 x 24", 1, lambda: Persons()),
    "PrintedWords": ("one picture, 32 x 96", 1, lambda: PrintedWords()),
    "BodySlices": ("one grey picture, 64 x 64", 1, lambda: BodySlices()),
    "LitHeads": ("six frames of a head and another one, 16 x 16", 7, lambda: LitHeads()),
    "LandScenes": ("one picture of 13 bands, 64 x 64", 1, lambda: LandScenes()),
}


def measure(rounds: int, batch: int) -> list[dict[str, Any]]:
    """One row for each kind of data."""
    made = {name: make() for name, (_, _, make) in CASES.items()}
    for data in made.values():
        data.setup()
    best: dict[str, tuple[float, float]] = dict.fromkeys(made, (np.inf, np.inf))
    for number in range(rounds):
        for name, data in made.items():
            # Other numbers in each round, so that nothing is at hand by chance.
            numbers = [(number * batch + i) % len(data.train) for i in range(batch)]  # type: ignore[arg-type]
            together = timed(lambda n=numbers, d=data: d.train.batch(n, n))  # type: ignore[misc]
            alone = timed(lambda n=numbers, d=data: [d.train.sample(i, i) for i in n[:8]]) / 8  # type: ignore[misc]
            best[name] = min(best[name][0], together / batch), min(best[name][1], alone)
    return [
        {
            "data": name,
            "sample": CASES[name][0],
            "samples_per_s": 1 / together,
            "pictures_per_s": CASES[name][1] / together,
            "x_one_at_a_time": alone / together,
        }
        for name, (together, alone) in best.items()
    ]


def timed(work: Callable[[], Any]) -> float:
    start_s = time.thread_time()
    work()
    return time.thread_time() - start_s


def sheet(data: RenderedSets, columns: int = 12, rows: int = 4, scale: int = 3) -> Image.Image:
    """The first training samples side by side; the views of one stand below each other. Of many bands in colours."""
    data.setup()
    pixels = (
        torch.from_numpy(data.pictures(np.arange(columns * rows)))
        if hasattr(data, "shown_bands")
        else views(data, columns * rows)
    )
    _, _, height, width = pixels.shape
    grid = pixels.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    size = (scale * columns * width, scale * rows * height)
    return Image.fromarray(grid.numpy()).resize(size, Image.Resampling.NEAREST)


def views(data: RenderedSets, count: int) -> torch.Tensor:
    """All pictures of the first training samples, below each other, uint8 [N 3 V*H W]."""
    shown = data.train.batch(range(count), [0] * count)  # type: ignore[union-attr]
    moments = data.train.moments  # type: ignore[union-attr]
    found = [*shown.get("views", []), *(shown["clip"].unbind(2) if "clip" in shown else ())]
    found += [shown[field] for field in ("image", "target_image", "reference") if field in shown]
    pixels = torch.cat([view * moments.std + moments.mean for view in found], dim=2)  # [N, C, V H, W]
    return pixels.mul(255).round().clamp(0, 255).byte().expand(-1, 3, -1, -1)


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Rendered on one core", title_justify="left")
    for column in ("data", "a sample", "samples/s", "pictures/s", "x one at a time"):
        table.add_column(column, justify="left" if column in ("data", "a sample") else "right")
    for row in rows:
        rates = (f"{row['samples_per_s']:,.0f}", f"{row['pictures_per_s']:,.0f}", f"{row['x_one_at_a_time']:.1f}")
        table.add_row(row["data"], row["sample"], *rates)
    Console().print(table)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="batches of four, to see that it runs")
    parser.add_argument("--sheets", type=Path, help="a folder for a picture of each kind of data")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    before = os.getloadavg()
    batch = 4 if options.quick else BATCH
    rows = measure(options.rounds, batch)
    result = {
        "device": platform.processor() or platform.machine(),
        "threads": 1,
        "rounds": options.rounds,
        "batch": batch,
        **{package: version(package) for package in ("numpy", "torch", "pillow")},
        "load": {"before": before, "after": os.getloadavg()},
        "rows": rows,
    }
    show(rows)
    write_atomic(options.json, json.dumps(result, indent=1) + "\n")
    if options.sheets is not None:
        options.sheets.mkdir(parents=True, exist_ok=True)
        for name, (_, _, make) in CASES.items():
            if "," not in name:
                sheet(make()).save(options.sheets / f"{name}.png")
    return result


if __name__ == "__main__":
    main()
