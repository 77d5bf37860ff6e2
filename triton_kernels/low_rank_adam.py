"""Adam in coordinates with an age per column: moments updated in place, direction returned.

For coordinates g of age a (1 in the first step that a column sees):
    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    u = (m / (1 - b1^a)) / (sqrt(v / (1 - b2^a)) + eps)
With one age for all columns this is Adam (Kingma & Ba 2015, algorithm 1). A column that enters later starts its own
bias correction; with the global step its first update would be (1 - b1) / sqrt(1 - b2) = 3.2 times too long at
(0.9, 0.999).

Moments are stored in float32 or float64; in bfloat16, rounded stochastically, because rounded to nearest, b2 v would be
v again; or in bytes with a scale per row (quantised_moments.py). The arithmetic is at least float32, and u is computed
from moments before rounding.

If columns are chosen again from one fixed basis, moments move with their columns: `source` says from where.

Shapes: B matrices, M rows, R rank. No backward: optimiser steps only.
"""

import torch
from torch import Tensor
from torch.optim.adam import adam

from lightspan.core.errors import UserError
from lightspan.triton_kernels.bias_correction import bias_correction
from lightspan.triton_kernels.launch import tl, triton
from lightspan.triton_kernels.quantised_moments import (
    SECOND_STREAM,
    decode_first,
    decode_second,
    encode_first,
    encode_second,
)
from lightspan.triton_kernels.rounding import stochastic_round

MAX_RANK = 4096  # one program holds whole rows; longer ones use the reference path
FORMATS = {  # dtype of m: dtype of v
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.bfloat16,
    torch.int8: torch.uint8,
}


def low_rank_adam_reference(
    g_BMR: Tensor, m_BMR: Tensor, v_BMR: Tensor, age_BR: Tensor, beta1: float, beta2: float, eps: float,
    m_scale_BM: Tensor | None = None, v_scale_BM: Tensor | None = None, source_BR: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The definition, and the CPU path."""
    _check_format(m_BMR, v_BMR)
    if source_BR is not None:
        _move_columns(m_BMR, source_BR)
        _move_columns(v_BMR, source_BR)
    if m_BMR.dtype in (torch.float32, torch.float64):
        return _update(g_BMR, m_BMR, v_BMR, age_BR, beta1, beta2, eps)
    assert seed is not None
    if m_BMR.dtype == torch.bfloat16:
        wide_m_BMR, wide_v_BMR = m_BMR.float(), v_BMR.float()
        u_BMR = _update(g_BMR, wide_m_BMR, wide_v_BMR, age_BR, beta1, beta2, eps)
        m_BMR.copy_(stochastic_round(wide_m_BMR, seed))
        v_BMR.copy_(stochastic_round(wide_v_BMR, seed ^ SECOND_STREAM))
        return u_BMR
    assert m_scale_BM is not None
    assert v_scale_BM is not None
    wide_m_BMR, wide_v_BMR = decode_first(m_BMR, m_scale_BM), decode_second(v_BMR, v_scale_BM)
    u_BMR = _update(g_BMR, wide_m_BMR, wide_v_BMR, age_BR, beta1, beta2, eps)
    encoded = (*encode_first(wide_m_BMR, seed), *encode_second(wide_v_BMR, seed))
    for stored, new in zip((m_BMR, m_scale_BM, v_BMR, v_scale_BM), encoded, strict=True):
        stored.copy_(new)
    return u_BMR


def _check_format(m_BMR: Tensor, v_BMR: Tensor) -> None:
    if FORMATS.get(m_BMR.dtype) != v_BMR.dtype:
        pairs = ", ".join(f"{m} with {v}" for m, v in FORMATS.items())
        raise UserError(f"moments of {m_BMR.dtype} with {v_BMR.dtype} are not supported; use one of {pairs}")


def _move_columns(moments_BMR: Tensor, source_BR: Tensor) -> None:
    """Column j becomes column source[j], in place; zeros for -1."""
    source_B1R = source_BR[:, None]
    moved_BMR = moments_BMR.gather(-1, source_B1R.clamp_min(0).expand_as(moments_BMR))
    moments_BMR.copy_(moved_BMR.masked_fill_(source_B1R < 0, 0))


def _update(
    g_BMR: Tensor, m_BMR: Tensor, v_BMR: Tensor, age_BR: Tensor, beta1: float, beta2: float, eps: float
) -> Tensor:
    """Moves float moments in place and returns the direction, in their dtype."""
    g_BMR = g_BMR.to(m_BMR.dtype)
    dense = m_BMR.is_contiguous() and v_BMR.is_contiguous()
    if m_BMR.is_cpu and dense and m_BMR.numel() and bool((age_BR == age_BR[0, 0]).all()):
        # One age for all: torch's fused Adam, from zero at rate -1, needs one pass where the lines below need seven.
        u_BMR = torch.zeros_like(m_BMR)
        adam(
            [u_BMR], [g_BMR.contiguous()], [m_BMR], [v_BMR], [], [age_BR[0, 0] - 1], fused=True, amsgrad=False,
            beta1=beta1, beta2=beta2, lr=-1.0, weight_decay=0.0, eps=eps, maximize=False,
        )  # fmt: skip
        return u_BMR
    m_BMR.lerp_(g_BMR, 1 - beta1)
    v_BMR.mul_(beta2).addcmul_(g_BMR, g_BMR, value=1 - beta2)
    correction1_B1R, correction2_B1R = (bias_correction(age_BR, beta)[:, None] for beta in (beta1, beta2))
    # The corrections are multiplied into the denominator: they have one row each, so this costs no extra pass.
    denominator_BMR = v_BMR.sqrt().mul_(correction1_B1R / correction2_B1R.sqrt()).add_(correction1_B1R * eps)
    return torch.div(m_BMR, denominator_BMR, out=denominator_BMR)


if triton is not None:
    from lightspan.triton_kernels.quantised_moments import decode_block, encode_block
    from lightspan.triton_kernels.rounding import round_stochastically

    @triton.jit
    def low_rank_adam_kernel(
        g_ptr, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, source_ptr, seed_ptr, correction1_ptr, correction2_ptr, u_ptr,
        weight1, weight2, eps, rows, rank, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    ):  # fmt: skip
        matrix = tl.program_id(1).to(tl.int64)  # int64: B * M * R may pass 2**31
        row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        column = tl.arange(0, BLOCK_R)
        flat_row = matrix * rows + row
        flat_column = matrix * rank + column
        offset = flat_row[:, None] * rank + column[None, :]
        inside = (row < rows)[:, None] & (column < rank)[None, :]

        g = tl.load(g_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if source_ptr is None:
            m = tl.load(m_ptr + offset, mask=inside, other=0)
            v = tl.load(v_ptr + offset, mask=inside, other=0)
        else:
            source = tl.load(source_ptr + flat_column, mask=column < rank, other=-1)
            held = inside & (source >= 0)[None, :]
            source_offset = flat_row[:, None] * rank + source[None, :]
            m = tl.load(m_ptr + source_offset, mask=held, other=0)
            v = tl.load(v_ptr + source_offset, mask=held, other=0)
            # The stores below go to the rows that these loads read: no warp may store before all have loaded.
            tl.debug_barrier()
        if m_ptr.dtype.element_ty == tl.int8:
            m = decode_block(m, tl.load(m_scale_ptr + flat_row, mask=row < rows, other=0.0)[:, None], FIRST=True)
            v = decode_block(v, tl.load(v_scale_ptr + flat_row, mask=row < rows, other=0.0)[:, None], FIRST=False)
        m, v = m.to(tl.float32), v.to(tl.float32)

        m += weight1 * (g - m)
        v += weight2 * (g * g - v)
        correction1 = tl.load(correction1_ptr + flat_column, mask=column < rank, other=1.0)[None, :]
        correction2 = tl.load(correction2_ptr + flat_column, mask=column < rank, other=1.0)[None, :]
        u = (m / correction1) / (tl.sqrt(v / correction2) + eps)
        tl.store(u_ptr + offset, u, mask=inside)

        if m_ptr.dtype.element_ty == tl.int8:
            uniform_m, uniform_v, _, _ = tl.rand4x(tl.load(seed_ptr), offset, n_rounds=7)
            m, m_scale = encode_block(m, uniform_m, FIRST=True)
            v, v_scale = encode_block(v, uniform_v, FIRST=False)
            tl.store(m_scale_ptr + flat_row, m_scale, mask=row < rows)
            tl.store(v_scale_ptr + flat_row, v_scale, mask=row < rows)
        if m_ptr.dtype.element_ty == tl.bfloat16:
            seed = tl.load(seed_ptr)
            m = round_stochastically(m, seed, offset)
            v = round_stochastically(v, seed, offset + tl.num_programs(1).to(tl.int64) * rows * rank)
        tl.store(m_ptr + offset, m, mask=inside)
        tl.store(v_ptr + offset, v, mask=inside)


def blocks(rank: int) -> dict[str, int]:
    """Tile of whole rows, 16 numbers per thread."""
    block_rank = triton.next_power_of_2(rank)
    numbers = max(2048, block_rank)
    return {"BLOCK_M": numbers // block_rank, "BLOCK_R": block_rank, "num_warps": numbers // 512}


def low_rank_adam_triton(
    g_BMR: Tensor, m_BMR: Tensor, v_BMR: Tensor, age_BR: Tensor, beta1: float, beta2: float, eps: float,
    m_scale_BM: Tensor | None = None, v_scale_BM: Tensor | None = None, source_BR: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Launches the kernel; state is contiguous. Never autotuned: a tuning run would apply the step."""
    _check_format(m_BMR, v_BMR)
    batch, rows, rank = m_BMR.shape
    if m_BMR.dtype == torch.float64 or rank > MAX_RANK:
        return low_rank_adam_reference(
            g_BMR, m_BMR, v_BMR, age_BR, beta1, beta2, eps, m_scale_BM, v_scale_BM, source_BR, seed
        )
    assert all(t is None or t.is_contiguous() for t in (m_BMR, v_BMR, m_scale_BM, v_scale_BM))
    u_BMR = torch.empty(m_BMR.shape, dtype=torch.float32, device=m_BMR.device)
    corrections_BR = [bias_correction(age_BR.float(), beta).contiguous() for beta in (beta1, beta2)]
    source_BR = None if source_BR is None else source_BR.contiguous()
    tile = blocks(rank)
    low_rank_adam_kernel[(triton.cdiv(rows, tile["BLOCK_M"]), batch)](
        g_BMR.contiguous(), m_BMR, v_BMR, m_scale_BM, v_scale_BM, source_BR, seed, *corrections_BR, u_BMR,
        1 - beta1, 1 - beta2, eps, rows, rank, **tile,
    )  # fmt: skip
    return u_BMR


@torch.library.custom_op("lightspan::low_rank_adam", mutates_args=("m_BMR", "v_BMR", "m_scale_BM", "v_scale_BM"))
def low_rank_adam(
    g_BMR: Tensor, m_BMR: Tensor, v_BMR: Tensor, age_BR: Tensor, beta1: float, beta2: float, eps: float,
    m_scale_BM: Tensor | None, v_scale_BM: Tensor | None, source_BR: Tensor | None = None, seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Direction u [B M R], float64 with float64 moments and float32 with all others; the moments are updated in place.

    Args:
        g_BMR: coordinates of the gradient, any float dtype.
        m_BMR, v_BMR: both float32, float64 or bfloat16, or m int8 and v uint8.
        age_BR: float, steps each column has seen, this one included; >= 1.
        beta1, beta2: decay rates in [0, 1). eps: added to the root of the corrected second moment.
        m_scale_BM, v_scale_BM: float32 for moments in bytes, None for others. They have no default, since torch below
            2.13 cannot call an operator that leaves out an argument which it may change.
        source_BR: int64; before the update, column j of the moments becomes what column source[j] was, or zeros for -1.
        seed: 0-d, int64, for the rounding of bfloat16 and bytes; a new one for every step.
    """
    return low_rank_adam_reference(
        g_BMR, m_BMR, v_BMR, age_BR, beta1, beta2, eps, m_scale_BM, v_scale_BM, source_BR, seed
    )


@low_rank_adam.register_fake
def _(g_BMR: Tensor, m_BMR: Tensor, *_: object, **__: object) -> Tensor:
    dtype = torch.float64 if m_BMR.dtype == torch.float64 else torch.float32
    return torch.empty(m_BMR.shape, dtype=dtype, device=m_BMR.device)


if triton is not None:
    low_rank_adam.register_kernel("cuda")(low_rank_adam_triton)
