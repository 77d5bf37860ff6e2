"""Slices through bodies as computed tomography shows them: organs, vessels, noise, and lesions of several kinds.

A patient is a set of ellipsoids; its slices are cuts through them, so neighbouring slices look alike.
Shapes: B slices, E ellipsoids, S pixels a side.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from lightspan.core.errors import UserError
from lightspan.datamodules.rendered.batch import SliceBatch
from lightspan.datamodules.rendered.data import ChannelMoments, RenderedSamples, RenderedSets, require_pictures
from lightspan.datamodules.rendered.draws import Draws

# Of each ellipsoid: grey in [0, 1], then x, y, z of its middle and its three radii, in halves of the picture; later
# ones lie over earlier ones. What is outside of the patient is black, and z runs from -1 to 1.
ANATOMY = {
    "fat": (0.32, 0.0, 0.0, 0.0, 0.86, 0.68, 3.0),
    "muscle": (0.50, 0.0, 0.0, 0.0, 0.79, 0.61, 3.0),
    "right lung": (0.08, -0.40, -0.10, -0.75, 0.29, 0.40, 0.75),
    "left lung": (0.08, 0.40, -0.10, -0.75, 0.28, 0.40, 0.75),
    "heart": (0.58, 0.10, -0.20, -0.60, 0.20, 0.20, 0.45),
    "liver": (0.62, -0.34, -0.08, 0.45, 0.36, 0.34, 0.65),
    "spleen": (0.60, 0.52, 0.05, 0.40, 0.15, 0.23, 0.45),
    "right kidney": (0.66, -0.36, 0.28, 0.75, 0.12, 0.15, 0.42),
    "left kidney": (0.66, 0.36, 0.28, 0.70, 0.12, 0.15, 0.42),
    "aorta": (0.78, 0.08, 0.18, 0.0, 0.055, 0.055, 3.0),
    "vena cava": (0.70, -0.10, 0.14, 0.0, 0.06, 0.045, 3.0),
    "spine": (0.92, 0.0, 0.38, 0.0, 0.13, 0.13, 3.0),
}
HOSTS = ("right lung", "left lung", "liver", "spleen")  # organs in which a lesion may lie
KINDS = ("none", "solid", "cyst", "ring")
SMALL_VESSELS = 10  # in lungs and liver
AT_ONCE = 32


class CutSlices(NamedTuple):
    """What B slices show.

    images: uint8 [B, 1, S, S].
    organs: int64 [B, S, S], 0 outside of the patient, else 1 + a place in `ANATOMY`; under a lesion too.
    lesion: bool [B, S, S].
    label: int64 [B], a place in `KINDS`: of the lesion that this slice cuts, 0 if no pixel shows one.
    radius: float32 [B], of the lesion in this slice, in pixels; 0 without one.
    """

    images: np.ndarray
    organs: np.ndarray
    lesion: np.ndarray
    label: np.ndarray
    radius: np.ndarray


class Ward(NamedTuple):
    """All slices that may be cut.

    side: of a slice in pixels.
    cuts: slices of a patient.
    diseased: share of the patients with a lesion, in [0, 1].
    noise: standard deviation of the grain, where white is 1; it is streaky, as it is correlated along rows.
    """

    side: int
    cuts: int
    diseased: float
    noise: float

    def slices(self, seed: int, numbers: np.ndarray) -> CutSlices:
        """The slices with these numbers, int64 [B]; those of a patient follow one another."""
        parts = [numbers[at : at + AT_ONCE] for at in range(0, max(len(numbers), 1), AT_ONCE)]
        cut = [self._cut(seed, part) for part in parts]
        return CutSlices(*(np.concatenate(field) for field in zip(*cut, strict=True)))

    def _cut(self, seed: int, numbers: np.ndarray) -> CutSlices:
        patient, cut = np.divmod(numbers, self.cuts)
        B, E, S = len(numbers), len(ANATOMY), self.side
        body, own = Draws(seed, patient, 12), Draws(seed, numbers, 13)
        table = np.array([*ANATOMY.values()], np.float32)
        grey = table[:, 0] + body.between(-0.03, 0.03, E)
        middle = table[:, 1:4] + body.between(-0.05, 0.05, E, 3)
        radii = table[:, 4:] * body.between(0.85, 1.1, E, 3)
        turn = body.between(-0.25, 0.25, E)
        height = ((2 * cut + 1) / np.float32(self.cuts) - 1).astype(np.float32)  # z of the slice, in (-1, 1)
        y, x = (2 * axis.astype(np.float32) + 1 - S for axis in np.mgrid[:S, :S])  # in half pixels from the middle
        x, y = x / np.float32(S), y / np.float32(S)

        def disc(at: np.ndarray, reach: np.ndarray, angle: np.ndarray | None = None) -> np.ndarray:
            """How much of each pixel [B, S, S] lies in an ellipsoid [B, 3] cut at this height."""
            level = (height - at[:, 2]) / reach[:, 2]
            share = np.sqrt(np.maximum(1 - level**2, 0))
            wide, high = (np.maximum(reach[:, i] * share, np.float32(1e-6))[:, None, None] for i in (0, 1))
            dx, dy = x - at[:, 0, None, None], y - at[:, 1, None, None]
            if angle is not None:
                cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
                dx, dy = cos * dx + sin * dy, cos * dy - sin * dx
            far = np.sqrt((dx / wide) ** 2 + (dy / high) ** 2)
            return np.clip(np.float32(0.5) + (1 - far) * np.minimum(wide, high) * np.float32(S / 2), 0, 1)

        image, organs = np.zeros((B, S, S), dtype=np.float32), np.zeros((B, S, S), dtype=np.int64)
        for e in range(E):
            inside = disc(middle[:, e], radii[:, e], turn[:, e])
            image += inside * (grey[:, e, None, None] - image)
            organs[inside >= 0.5] = e + 1
        names = [*ANATOMY]
        vascular = np.isin(organs, [1 + names.index(name) for name in ("right lung", "left lung", "liver")])
        for _ in range(SMALL_VESSELS):  # thin tubes that wander with the height
            at = body.between(-0.6, 0.6, 3)
            at[:, :2] += height[:, None] * body.between(-0.3, 0.3, 2)
            wide = body.between(0.015, 0.035)
            tube = disc(at, np.stack([wide, wide, np.full_like(wide, 4)], axis=1)) * vascular
            image += tube * (np.float32(0.7) - image)

        # A lesion lies about the middle of its organ, and is cut in some of the slices.
        kind = np.where(body.uniform() < np.float32(self.diseased), 1 + body.integers(len(KINDS) - 1), 0)
        host = np.array([names.index(name) for name in HOSTS])[body.integers(len(HOSTS))]
        rows = np.arange(B)
        at = middle[rows, host] + 0.35 * radii[rows, host] * body.between(-1, 1, 3)
        size = body.between(0.07, 0.14)
        reach = np.stack([size, size * body.between(0.8, 1.2), 3 * size], axis=1)
        inside = disc(at, reach) * (kind > 0)[:, None, None] * (organs == host[:, None, None] + 1)
        core = disc(at, reach * np.float32(0.55))
        dark, bright = np.float32(0.3), np.float32(0.85)
        filling = np.where((kind == 1)[:, None, None], bright, dark)
        filling = np.where((kind == 3)[:, None, None], bright + core * (dark - bright), filling)
        image += inside * (filling - image)
        lesion = inside >= 0.5
        label = np.where(lesion.any(axis=(1, 2)), kind, 0)
        level = (height - at[:, 2]) / reach[:, 2]
        radius = np.where(label > 0, size * np.sqrt(np.maximum(1 - level**2, 0)) * np.float32(S / 2), 0)

        grain = own.normal(S, S + 2)
        grain = (grain[..., :-2] + grain[..., 1:-1] + grain[..., 2:]) / np.float32(3**0.5)
        image += np.float32(self.noise) * grain
        images = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)[:, None]
        return CutSlices(images, organs, lesion, label.astype(np.int64), radius.astype(np.float32))


class SliceSamples(RenderedSamples):
    """Samples of `SliceBatch`."""

    batch_type = SliceBatch

    def __init__(self, first: int, count: int, ward: Ward, draw_seed: int, moments: ChannelMoments) -> None:
        super().__init__(first, count)
        self.ward, self.draw_seed, self.moments = ward, draw_seed, moments

    def draw(self, numbers: np.ndarray, seeds: np.ndarray) -> dict[str, Any]:
        cut = self.ward.slices(self.draw_seed, numbers)
        fields = {
            "organs": cut.organs,
            "lesion": cut.lesion.astype(np.int64),
            "label": cut.label,
            "radius": cut.radius,
            "patient": numbers // self.ward.cuts,
        }
        return {"image": self.moments.standardised(cut.images), **{n: torch.from_numpy(f) for n, f in fields.items()}}


class BodySlices(RenderedSets):
    """Grey slices through bodies: batches of `SliceBatch`. No patient of one set is in another.

    Args:
        side: of a slice in pixels, at least 1.
        cuts: slices of a patient, a power of two up to 1024.
        diseased: share of the patients with a lesion, in [0, 1]; it is cut in a part of their slices.
        noise: standard deviation of the grain, where white is 1.
        settings: those of `RenderedSets`; sizes count slices, of which a patient has `cuts` that follow one another.
    """

    num_classes = len(KINDS)

    def __init__(
        self, side: int = 64, cuts: int = 16, diseased: float = 0.75, noise: float = 0.04, **settings: Any
    ) -> None:
        super().__init__(**settings)
        if side < 1 or cuts not in [2**i for i in range(11)] or not 0 <= diseased <= 1 or noise < 0:
            raise UserError(
                f"slices of side={side}, cuts={cuts}, diseased={diseased} and noise={noise}: side must be at least 1, "
                "cuts a power of two up to 1024, so that patients do not cross from one set to another, diseased in "
                "[0, 1], and noise at least 0"
            )
        require_pictures(side**2, side=side)
        self.ward = Ward(side, cuts, diseased, noise)

    def pictures(self, numbers: np.ndarray) -> np.ndarray:
        return self.ward.slices(self.draw_seed, numbers).images

    def samples(self, first: int, count: int, moments: ChannelMoments) -> SliceSamples:
        return SliceSamples(first, count, self.ward, self.draw_seed, moments)
