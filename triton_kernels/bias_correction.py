"""Adam's bias correction, which kernels and the step around them share.

Shapes: B matrices, R rank.
"""

import math

import torch
from torch import Tensor


def bias_correction(age_BR: Tensor, beta: float) -> Tensor:
    """1 - beta^age, by expm1: the plain difference loses three digits in float32 at beta = 0.999 and age 1."""
    return -torch.expm1(age_BR * (math.log(beta) if beta else -math.inf))
