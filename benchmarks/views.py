"""How many views a second one core makes: lightspan's, one image at a time and in batches, torchvision's, and kornia's.

    python benchmarks/views.py [--json FILE] [--rounds N] [--quick]

All make two views of the same pictures with the same steps and probabilities: crop and resize, mirror, jitter (with a
probability of 0.8), grey and blur. torchvision's transforms get bytes, as its documentation advises, or floats; kornia
has batches of floats, and no antialiasing. Every figure is the minimum of interleaved rounds, in which an arm has the
same seed each time, in the thread's own time, which waits for no other process. Reading and decoding are left out.
Results go to benchmarks/results/views.json.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision.transforms import v2

from lightspan.core.files.atomic import write_atomic
from lightspan.datamodules.image.augment.rendering import unit_float
from lightspan.datamodules.image.augment.views import RandomViews
from lightspan.datamodules.image.batch import ViewParameters

RESULTS = Path(__file__).parent / "results" / "views.json"
BASELINE = "torchvision on bytes"
BLUR_SIGMA, BLUR_KERNEL = (0.1, 2.0), 9  # as far as lightspan's blur reaches at the largest deviation
RATIO = (0.75, 4 / 3)
Arm = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """Pictures, uint8 of `shape` [C, H, W], and the settings of their views."""

    name: str
    shape: tuple[int, int, int]
    images: int
    size: int
    scale: tuple[float, float]
    jitter: tuple[float, float, float, float]  # brightness, contrast, saturation, hue
    grey: float = 0.0
    blur: float = 0.0

    def pictures(self) -> Tensor:
        """[B, C, H, W], with the channels last in memory, as decoders leave them."""
        channels, height, width = self.shape
        pixels = torch.randint(256, (self.images, height, width, channels), generator=torch.Generator().manual_seed(0))
        return pixels.to(torch.uint8).permute(0, 3, 1, 2)


# The recipes' base `imagenet`, on pictures of ImageNet's usual size; and the default views of small grey pictures.
PHOTOS = Case("photographs", (3, 375, 500), 16, 224, (0.08, 1.0), (0.8, 0.8, 0.8, 0.2), grey=0.2, blur=0.5)
CLOTHES = Case("28 x 28 grey", (1, 28, 28), 128, 28, (0.3, 1.0), (0.4, 0.4, 0.0, 0.0))
QUICK = Case("quick", (3, 20, 30), 2, 16, (0.08, 1.0), (0.8, 0.8, 0.8, 0.2), grey=0.2, blur=0.5)


def lightspan_arms(case: Case) -> dict[str, Arm]:
    brightness, contrast, saturation, hue = case.jitter
    views = RandomViews(
        size=case.size,
        scale=case.scale,
        ratio=RATIO,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        grey=case.grey,
        blur=case.blur,
        blur_sigma=BLUR_SIGMA,
    )
    pictures = case.pictures()

    def batch() -> list[Tensor]:
        table_BVP = torch.tensor([[one.parameters for one in views.draw(case.shape)] for _ in pictures])
        images, seed = unit_float(pictures), torch.arange(len(pictures))
        return [
            rendering.many(images, ViewParameters(*table_BVP[:, v].unbind(1)), seed, v)
            for v, rendering in enumerate(views.renderings)
        ]

    return {
        "lightspan, one image at a time": lambda: [views(picture) for picture in pictures],
        "lightspan, a batch at a time": batch,
    }


def torchvision_arms(case: Case) -> dict[str, Arm]:
    steps: list[nn.Module] = [
        v2.RandomResizedCrop(case.size, case.scale, RATIO, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(*case.jitter)], 0.8),
        v2.RandomGrayscale(case.grey),
        v2.RandomApply([v2.GaussianBlur(BLUR_KERNEL, BLUR_SIGMA)], case.blur),
    ]
    in_colour = case.shape[0] == 3
    steps = steps if in_colour else steps[:3]
    to_float = v2.ToDtype(torch.float32, scale=True)
    on_bytes, on_floats = v2.Compose([*steps, to_float]), v2.Compose([to_float, *steps])
    pictures = case.pictures()
    return {
        BASELINE: lambda: [[on_bytes(picture) for _ in range(2)] for picture in pictures],
        "torchvision on floats": lambda: [[on_floats(picture) for _ in range(2)] for picture in pictures],
    }


def kornia_arms(case: Case) -> dict[str, Arm]:
    """None without the package."""
    try:
        from kornia import augmentation as K
    except ImportError:
        return {}
    steps = [
        K.RandomResizedCrop((case.size, case.size), case.scale, RATIO),
        K.RandomHorizontalFlip(),
        K.ColorJitter(*case.jitter, p=0.8),
    ]
    if case.shape[0] == 3:
        steps += [K.RandomGrayscale(p=case.grey), K.RandomGaussianBlur((BLUR_KERNEL,) * 2, BLUR_SIGMA, p=case.blur)]
    whole, pictures = nn.Sequential(*steps), case.pictures()
    return {"kornia, a batch at a time": lambda: [whole(pictures.float().div_(255)) for _ in range(2)]}


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """One row for each arm."""
    arms = lightspan_arms(case) | torchvision_arms(case) | kornia_arms(case)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, arm in arms.items():
            torch.manual_seed(0)
            start_s = time.thread_time()
            arm()
            if number:  # the first warms up
                times[name].append(time.thread_time() - start_s)
    rates = {name: 2 * case.images / min(found) for name, found in times.items()}
    return [
        {"case": case.name, "arm": name, "views_per_s": rate, "x_baseline": rate / rates[BASELINE]}
        for name, rate in rates.items()
    ]


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Views a second on one core", title_justify="left")
    for column in ("pictures", "", "views/s", f"x {BASELINE}"):
        table.add_column(column, justify="right" if "/" in column or "x " in column else "left")
    for row in rows:
        table.add_row(row["case"], row["arm"], f"{row['views_per_s']:,.0f}", f"{row['x_baseline']:.2f}")
    Console().print(table)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a few small pictures, to see that it runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    before = os.getloadavg()
    rows = [row for case in ([QUICK] if options.quick else [PHOTOS, CLOTHES]) for row in measure(case, options.rounds)]
    result = {
        "device": platform.processor() or platform.machine(),
        "threads": 1,
        "rounds": options.rounds,
        "baseline": BASELINE,
        **{package: installed(package) for package in ("torch", "torchvision", "kornia")},
        "load": {"before": before, "after": os.getloadavg()},
        "rows": rows,
    }
    show(rows)
    write_atomic(options.json, json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
