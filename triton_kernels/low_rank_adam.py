"""Adam in coordinates with an age per column: moments updated in place, direction returned.

For coordinates g of age a (1 in the first step that a column sees):
    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    u = (m / (1 - b1^a)) / (sqrt(v / (1 - b2^a)) + eps)
With one age for all columns this is Adam (Kingma & Ba 2015, algorithm 1). A column that enters later starts a bias
correction of its own; under the global step its first update would be (1 - b1) / sqrt(1 - b2) = 3.2 times too long at
(0.9, 0.999).

Shapes: B matrices, M rows, R rank. No backward: optimiser steps only.
"""

import math

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU-only installs come without Triton; the reference is their path
    triton = None

BLOCK = 1024


def bias_correction(age_BR: Tensor, beta: float) -> Tensor:
    """1 - beta^age, by expm1: the plain difference loses three digits in float32 at beta = 0.999 and age 1."""
    return -torch.expm1(age_BR * (math.log(beta) if beta else -math.inf))


def low_rank_adam_reference(
    g_BMR: Tensor, m_BMR: Tensor, v_BMR: Tensor, age_BR: Tensor, beta1: float, beta2: float, eps: float
) -> Tensor:
    """The definition, and the CPU path. Works in the dtype of the moments; `g` is cast to it."""
    g_BMR = g_BMR.to(m_BMR.dtype)
    m_BMR.lerp_(g_BMR, 1 - beta1)
    v_BMR.mul_(beta2).addcmul_(g_BMR, g_BMR, value=1 - beta2)
    correction1_B1R, correction2_B1R = (bias_correction(age_BR, beta)[:, None] for beta in (beta1, beta2))
    return (v_BMR / correction2_B1R).sqrt_().add_(eps).mul_(correction1_B1R).reciprocal_().mul_(m_BMR)


if triton is not None:

    @triton.jit
    def low_rank_adam_kernel(
        g_ptr, m_ptr, v_ptr, correction1_ptr, correction2_ptr, u_ptr,
        weight1, weight2, eps, matrix_size, rank, total, BLOCK: tl.constexpr,
    ):  # fmt: skip
        offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # int64: B * M * R may pass 2**31
        inside = offset < total
        g = tl.load(g_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + offset, mask=inside, other=0.0)
        v = tl.load(v_ptr + offset, mask=inside, other=0.0)
        column = (offset // matrix_size) * rank + offset % rank
        correction1 = tl.load(correction1_ptr + column, mask=inside, other=1.0)
        correction2 = tl.load(correction2_ptr + column, mask=inside, other=1.0)
        m += weight1 * (g - m)
        v += weight2 * (g * g - v)
        u = (m / correction1) / (tl.sqrt(v / correction2) + eps)
        tl.store(m_ptr + offset, m, mask=inside)
        tl.store(v_ptr + offset, v, mask=inside)
        tl.store(u_ptr + offset, u, mask=inside)


def low_rank_adam_triton(
    g_BMR: Tensor, m_BMR: Tensor, v_BMR: Tensor, age_BR: Tensor, beta1: float, beta2: float, eps: float
) -> Tensor:
    """Launches the kernel; moments are float32 and contiguous. Never autotuned: a tuning run would apply the step."""
    g_BMR, u_BMR = g_BMR.contiguous(), torch.empty_like(m_BMR)
    _, rows, rank = m_BMR.shape
    corrections_BR = [bias_correction(age_BR, beta).contiguous() for beta in (beta1, beta2)]
    total = m_BMR.numel()
    low_rank_adam_kernel[(triton.cdiv(total, BLOCK),)](
        g_BMR, m_BMR, v_BMR, *corrections_BR, u_BMR, 1 - beta1, 1 - beta2, eps, rows * rank, rank, total, BLOCK
    )
    return u_BMR


def low_rank_adam(
    g_BMR: Tensor, m_BMR: Tensor, v_BMR: Tensor, age_BR: Tensor, beta1: float, beta2: float, eps: float
) -> Tensor:
    """Direction u [B M R] in the dtype of the moments; `m` and `v` are updated in place.

    Args:
        g_BMR: coordinates of the gradient, any float dtype.
        age_BR: float, steps each column has seen, this one included; >= 1.
        beta1, beta2: decay rates in [0, 1). eps: added to the root of the corrected second moment.
    """
    fast = triton is not None and m_BMR.is_cuda and m_BMR.dtype == torch.float32
    return (low_rank_adam_triton if fast else low_rank_adam_reference)(g_BMR, m_BMR, v_BMR, age_BR, beta1, beta2, eps)
