"""Tensors of a checkpoint read as matrices, and what is plainly wrong with one.

A kernel [O I ...] is the matrix of its outputs x everything else; a table of positions [1 N D] is [N D]. Which axis is
that of the outputs is not known from a tensor alone (transformers' Conv1D has [I O]), so sides are called rows and
columns.
"""

import re

import torch
from torch import Tensor

EMBEDDING = re.compile(r"(^|[._])(\w*embed\w*|wte|wpe)([._]|$)")


def kind_of(name: str, shape: tuple[int, ...]) -> str:
    """vector, embedding, matrix or kernel. What has one row or one column is a vector."""
    sides = matrix_shape(shape)
    if min(sides) < 2:
        return "vector"
    if EMBEDDING.search(name):
        return "embedding"
    return "matrix" if len(shape) == 2 or (len(shape) == 3 and shape[0] == 1) else "kernel"


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) that `as_matrix` gives; a vector is a row, a number one row of one."""
    if len(shape) < 2:
        return 1, shape[0] if shape else 1
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    return shape[0], torch.Size(shape[1:]).numel()


def as_matrix(tensor: Tensor) -> Tensor:
    """[O I]; the same numbers, not copied."""
    return tensor.reshape(matrix_shape(tuple(tensor.shape)))


def faults_of(tensor: Tensor) -> list[str]:
    """What a look at the numbers finds: not finite, zero, constant, rows or columns of zeros; [] for a sound tensor."""
    if not tensor.numel():
        return ["empty"]
    if wrong := tensor.numel() - int(tensor.isfinite().sum()):
        return [f"{wrong} of {tensor.numel()} numbers NaN or infinite"]
    if not tensor.any():
        return ["zero"]
    matrix_OI = as_matrix(tensor)
    if tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
        return ["constant"]
    if min(matrix_OI.shape) < 2:
        return []
    zero = {"row": int((~matrix_OI.any(dim=1)).sum()), "column": int((~matrix_OI.any(dim=0)).sum())}
    return [f"{count} {side}{'s' * (count > 1)} of zeros" for side, count in zero.items() if count]
