"""Pictures and clips of two to four textured objects on a textured ground, with the object of each pixel.

Shapes: S pixels a side, F frames, T patches of a side-S picture in a G x G grid, D width.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightspan.evaluation.dense.label_propagation import propagated_labels
from lightspan.evaluation.dense.prompt_masks import iou

SIDE = 48


class Scene:
    """Objects with places, velocities, outlines and textures of their own; later ones lie in front."""

    def __init__(self, generator: np.random.Generator) -> None:
        self.count = int(generator.integers(2, 5))
        n = self.count
        self.centre, self.velocity = generator.uniform(10, SIDE - 10, (n, 2)), generator.uniform(-0.7, 0.7, (n, 2))
        self.radius, self.stretch = generator.uniform(6, 11, n), generator.uniform(0.7, 1.4, n)
        self.angle, self.turn = generator.uniform(0, np.pi, n), generator.uniform(-0.04, 0.04, n)
        self.edge = generator.choice([2.0, 4.0, 8.0], n)  # of a superellipse: 2 is round, 8 nearly a rectangle
        # The ground has the last texture: waves of two directions in two colours.
        self.paint = generator.uniform(0, 1, (n + 1, 2, 3))
        self.waves = generator.uniform(-1.2, 1.2, (n + 1, 2, 2))
        self.phase = generator.uniform(0, 2 * np.pi, (n + 1, 2))

    def at(self, time: float, noise: float, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The picture, uint8 [3 S S], and the object of each pixel from 1, 0 for the ground: int64 [S S]."""
        y, x = np.mgrid[:SIDE, :SIDE].astype(np.float64)
        image, owner = self._texture(self.count, x, y), np.zeros((SIDE, SIDE), dtype=np.int64)
        for i in range(self.count):
            # Objects turn back at the borders.
            place = self.centre[i] + time * self.velocity[i]
            place = 8 + np.abs((place - 8) % (2 * (SIDE - 16)) - (SIDE - 16))
            angle = self.angle[i] + time * self.turn[i]
            dx, dy = x - place[0], y - place[1]
            u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
            edge = self.edge[i]
            inside = np.abs(u * self.stretch[i]) ** edge + np.abs(v / self.stretch[i]) ** edge < self.radius[i] ** edge
            image, owner = np.where(inside, self._texture(i, u, v), image), np.where(inside, i + 1, owner)
        image = image + noise * generator.standard_normal(image.shape)
        return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8), owner

    def _texture(self, of: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        a, b = (np.sin(w[0] * u + w[1] * v + p) for w, p in zip(self.waves[of], self.phase[of], strict=True))
        share = 0.5 + 0.25 * (a + b)
        first, second = self.paint[of][:, :, None, None]
        return share * first + (1 - share) * second


def stills(count: int, seed: int, noise: float = 0.03) -> np.ndarray:
    """uint8 [N 3 S S], of as many scenes."""
    generator = np.random.default_rng((seed, 0))
    return np.stack([Scene(generator).at(0.0, noise, generator)[0] for _ in range(count)])


def clips(count: int, seed: int, frames: int = 20, noise: float = 0.03) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pictures [F 3 S S] and objects [F S S] of as many moving scenes, from another stream than `stills`."""
    generator, found = np.random.default_rng((seed, 1)), []
    for _ in range(count):
        scene = Scene(generator)
        images, owners = zip(*(scene.at(float(t), noise, generator) for t in range(frames)), strict=True)
        found.append((np.stack(images), np.stack(owners)))
    return found


def mean_jaccard(found_FSS: Tensor, true_FSS: Tensor) -> float:
    """Mean over objects and frames after the first of intersection over union, in per cent; frames that do not show an
    object do not count for it.
    """
    masks = [(found_FSS[1:] == one, true_FSS[1:] == one) for one in range(1, int(true_FSS[0].max()) + 1)]
    scores = [iou(found, true)[true.flatten(1).any(dim=1)] for found, true in masks]
    return 100 * float(torch.cat(scores).mean())


def jaccard_of_clips(features: Sequence[Tensor], of: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Mean over clips of labels that are carried on by patches [F T D], with the same settings for all features."""
    scores = []
    for x_FTD, (_, objects) in zip(features, of, strict=True):
        side, true_FSS = round(x_FTD.shape[1] ** 0.5), torch.from_numpy(objects)
        found_FSS = propagated_labels(
            x_FTD, true_FSS[0], (side, side), context=4, neighbours=5, radius=2.5, temperature=0.1, whole_first=False
        )
        scores.append(mean_jaccard(found_FSS, true_FSS))
    return float(np.mean(scores))
