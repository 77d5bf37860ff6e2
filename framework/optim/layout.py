"""How the low-rank step sees parameters: stacks of matrices of one shape, kept side first, and their state by name."""

from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]
"""Stacked plain tensors, each with the matrix as its first axis: saved, moved and sharded like any optimiser state."""

SECOND_STREAM, WEIGHT_STREAM = 1 << 60, 1 << 61
"""Added to a step's seed: the noise that rounds second moments, weights and first moments has nothing in common."""


@dataclass(frozen=True)
class Layout:
    """B matrices of one shape: M rows (the kept, longer side), N columns (the projected side), rank R.

    Args:
        wide: whether the parameter itself is wide, so that the step sees its transpose.
        dtype: of the arithmetic and of unquantised state: float32, or float64 for float64 weights.
        seeds: one a matrix; all randomness of its frames comes from it.
    """

    rows: int
    size: int
    rank: int
    wide: bool
    dtype: torch.dtype
    device: torch.device
    seeds: tuple[int, ...]

    @property
    def batch(self) -> int:
        return len(self.seeds)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the parameter with its trailing axes flattened."""
        return (self.size, self.rows) if self.wide else (self.rows, self.size)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros [B, *shape] of the state's dtype, or of another."""
        return torch.zeros(self.batch, *shape, dtype=dtype or self.dtype, device=self.device)

    def part(self, positions: list[int]) -> "Layout":
        """The layout of some of the matrices."""
        seeds = tuple(self.seeds[i] for i in positions)
        return Layout(self.rows, self.size, self.rank, self.wide, self.dtype, self.device, seeds)


def part_of(state: State, index: Tensor) -> State:
    """A copy that holds the matrices `index` only."""
    return {key: value[index] for key, value in state.items()}


def write_part(state: State, index: Tensor, part: State) -> None:
    """Writes matrices back in place, so that views of the stack stay views."""
    for key, value in part.items():
        state[key][index] = value


def canonical(weight: Tensor) -> Tensor:
    """A view [M N] of a parameter, M >= N: trailing axes flattened in memory order, transposed when wide.

    A convolution is out x (in * height * width), in channels-last memory out x (height * width * in).
    """
    return _matrix(weight, weight)


def canonical_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient as `canonical` shows the weight, a view where its memory allows one."""
    matrix = _matrix(gradient, weight)
    if gradient.stride() == weight.stride():
        return matrix
    return torch.empty_like(canonical(weight), dtype=matrix.dtype).copy_(matrix)


def _matrix(tensor: Tensor, like: Tensor) -> Tensor:
    matrix = tensor.detach()
    if like.ndim > 2:
        strides = like.stride()
        trailing = sorted(range(1, like.ndim), key=lambda axis: -strides[axis])
        matrix = matrix.permute(0, *trailing).reshape(tensor.shape[0], -1)
    return matrix.mT if matrix.shape[0] < matrix.shape[1] else matrix
