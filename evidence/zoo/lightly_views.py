"""How long lightly's and lightspan's random views of a batch take, apart from the step: lightly's work on PIL images.

The same kinds of changes with the same ranges on the same pictures, one picture at a time in one thread.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image

from evidence.zoo.pictures import Split, views_of

PICTURES, ROUNDS = 64, 7


def lightly_transforms(split: Split) -> dict[str, Callable[[Any], Any]]:
    """By the kind of views in `pictures.views_of`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lightly.transforms.simclr_transform import SimCLRTransform
        from lightly.transforms.swav_transform import SwaVTransform
    common: dict[str, Any] = {
        "cj_bright": 0.4, "cj_contrast": 0.4, "cj_sat": 0.0, "cj_hue": 0.0, "random_gray_scale": 0.0,
        "gaussian_blur": 0.0, "normalize": {"mean": split.mean.flatten().tolist(), "std": split.std.flatten().tolist()},
    }  # fmt: skip
    crops: dict[str, Any] = {
        "crop_sizes": (split.side, split.side // 2), "crop_counts": (2, 4), "crop_min_scales": (0.3, 0.1),
        "crop_max_scales": (1.0, 0.4),
    }  # fmt: skip
    return {"two": SimCLRTransform(split.side, min_scale=0.3, **common), "crops": SwaVTransform(**crops, **common)}


def measure(split: Split) -> Iterator[dict[str, Any]]:
    """Milliseconds that the views of `PICTURES` take, of each round, in turns."""
    images = split.train.images[:PICTURES]
    drawn, tensors = [Image.fromarray(image) for image in images], torch.from_numpy(images)[:, None]
    for kind, transform in lightly_transforms(split).items():
        samples = split.samples(split.train, views_of(kind, split))
        work = {
            "ours_ms": lambda made=samples.fields: [made(image, seed) for seed, image in enumerate(tensors)],
            "theirs_ms": lambda made=transform: [made(image) for image in drawn],
        }
        times: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(ROUNDS):
            for name, call in work.items():
                start_s = time.thread_time()
                call()
                times[name].append(1000 * (time.thread_time() - start_s))
        yield {"kind": "views", "views": kind, "pictures": PICTURES, **times}
