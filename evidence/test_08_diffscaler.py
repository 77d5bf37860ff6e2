"""DiffScaler (arXiv 2404.09976) on digits: a frozen diffusion transformer that knows 0 to 4 learns to draw 5 to 9.

8 x 8 digits and a transformer of 4 blocks and width 64; arms, figures and search are those of evidence/diffscaler.py,
with 100 validation images and four draws of noise. `python evidence/test_08_diffscaler.py` repeats the search.
"""

from functools import partial

from diffscaler import Task, measure, search

from lightspan.backbones.diffusion import DiT
from lightspan.datamodules.image.sets.small import Digits

DIGITS = Task(
    data=Digits,
    network=partial(DiT, image_size=8, num_classes=10),
    rates={"DiffScaler": 1e-2, "scale and shift": 9e-2, "BitFit": 3e-2, "full": 9e-3},
    schedule="linear",
    prediction="noise",
    old_steps=1000,
    old_rate=2e-3,
    steps=200,
    batch=64,
    validation=100,
    draws=4,
)


def test_diffscaler_comes_near_full_fine_tuning_and_forgets_nothing(evidence) -> None:
    measure(evidence, DIGITS)


if __name__ == "__main__":
    search(DIGITS)
