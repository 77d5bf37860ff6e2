"""Textures and colours of what is drawn."""

import numpy as np

TEXTURES = ("plain", "stripes", "checks", "dots")
PALETTE = {
    "red": (0.92, 0.14, 0.14),
    "orange": (0.98, 0.55, 0.1),
    "yellow": (0.95, 0.9, 0.15),
    "green": (0.15, 0.72, 0.2),
    "cyan": (0.15, 0.85, 0.85),
    "blue": (0.18, 0.28, 1.0),
    "purple": (0.62, 0.18, 0.82),
    "white": (0.96, 0.96, 0.96),
}


def woven(kind: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How bright a surface is by its texture alone, of a's shape and dtype, in [0, 1].

    Args:
        kind: which of `TEXTURES`, int64, for each place along a's first axis.
        a, b: waves in [-1, 1] along two axes of the surface.
    """
    light = np.ones_like(a)
    for number, wave in enumerate((None, lambda a, b: a, lambda a, b: a * b, lambda a, b: a + b - 0.6)):
        of = kind == number
        if wave is not None and of.any():
            light[of] = np.clip(0.5 + 2 * wave(a[of], b[of]), 0, 1)
    return light


def hue_turned(colours: np.ndarray, turns: float | np.ndarray) -> np.ndarray:
    """Colours [..., 3] in [0, 1], turned about the axis of greys by shares of the circle, which leaves greys alone.

    Args:
        turns: one for all colours, or as many as spread over [...].
    """
    cos, sin = np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)
    same, ahead, behind = (1 + 2 * cos) / 3, (1 - cos) / 3 - sin / 3**0.5, (1 - cos) / 3 + sin / 3**0.5
    red, green, blue = colours[..., 0], colours[..., 1], colours[..., 2]
    turned = [
        same * red + ahead * green + behind * blue,
        behind * red + same * green + ahead * blue,
        ahead * red + behind * green + same * blue,
    ]
    return np.clip(np.stack(turned, axis=-1), 0, 1).astype(colours.dtype)
