"""Newton-Schulz, which Muon and what came after it share: an orthogonal matrix beside a given one."""

import math

from torch import Tensor


def newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    """U V^T of the SVD U S V^T, approximately, by the quintic iteration of Muon (Jordan et al. 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def shape_factor(shape: tuple[int, int], convention: str, whole: tuple[int, int] | None = None) -> float:
    """Factor of an orthogonalised update of a weight (out, in), as given, not transposed to tall.

    Args:
        shape: of what is orthogonalised together.
        whole: of the weight; None if that is the same.
    """
    rows, columns = shape
    return {
        "adamw": 0.2 * math.sqrt(max(rows, columns)) * math.sqrt(max(1.0, min(whole or shape) / 3)),
        "kj": math.sqrt(max(1.0, rows / columns)),
        "kimi": 0.2 * math.sqrt(max(rows, columns)),
        "dion": math.sqrt(rows / columns),
        "none": 1.0,
    }[convention]
