"""Stochastic rounding of float32 to bfloat16: up with a probability equal to the fraction that would be cut off.

bfloat16 is the upper half of float32's bits, so: add a uniform 16-bit integer to the bits, drop the lower half. The
result is one of the two neighbours, right on average, and exact if x already is a bfloat16. A carry into the
exponent is rounding up to the next power of two; beyond the largest number it gives infinity. Rounding to
nearest loses every step shorter than 2^-9 of the weight; this keeps it on average (Gupta et al. 2015, section 3.1).

The reference takes its integers from a pool, the kernels from Philox: their bits differ, their distribution does not.
The kernels read the seed on the device; the reference reads it on the host, which would have to wait for a GPU.
"""

import math
from functools import cache

import torch
from torch import Tensor

from lightspan.triton_kernels.launch import tl, triton

WINDOW = 2**19  # elements that the reference rounds at once: 2 MiB, which fit into a processor's caches


@cache
def noise_pool(device: torch.device) -> Tensor:
    """Two windows of 16-bit integers (int32), every value equally often, always the same ones.

    Drawn once: `torch.randint` of every element takes 70 times as long as adding a slice of the pool.
    """
    order = torch.randperm(2 * WINDOW, generator=torch.Generator().manual_seed(0), dtype=torch.int32, device="cpu")
    return (order & 0xFFFF).to(device)


def window_start(seed: int, tile: int) -> int:
    """Where tile number `tile` starts to read the pool: the mixing function of splitmix64, modulo one window."""
    mixed = (seed * 0x9E3779B97F4A7C15 + tile * 0xD1B54A32D192ED03 + 0x2545F4914F6CDD1D) % 2**64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
    return (mixed ^ mixed >> 31) % WINDOW


def stochastic_round_(x: Tensor, seed: int, tile: int = 0) -> Tensor:
    """Rounds contiguous float32 `x` in place to values that bfloat16 can represent: a cast to it is exact afterwards.

    Args:
        tile: number of the first window of 2^19 elements; pieces of one matrix need different ones.
    """
    assert x.dtype == torch.float32
    pool, flat, total = noise_pool(x.device), x.view(-1), x.numel()
    for number, first in enumerate(range(0, total, WINDOW), start=tile):
        piece = flat[first : first + WINDOW]
        # Noise would carry a NaN with all bits set, as GPUs make it, over the sign to zero. A new NaN has an empty
        # lower half and stays one. The sum finds it in a fifteenth of the time of isnan().any().
        if math.isnan(piece.sum().item()):
            piece.masked_fill_(piece.isnan(), torch.nan)
        start = window_start(seed, number)
        piece.view(torch.int32).add_(pool[start : start + piece.numel()]).bitwise_and_(-(2**16))
    return x


def stochastic_round_reference(x_fp32: Tensor, seed: Tensor) -> Tensor:
    """The definition, and the CPU path."""
    x_fp32, number = x_fp32.contiguous(), int(seed)
    rounded = torch.empty(x_fp32.shape, dtype=torch.bfloat16, device=x_fp32.device)
    # One window of scratch: a float32 copy of everything costs three times the rounding itself in page faults.
    scratch = torch.empty(min(x_fp32.numel(), WINDOW), dtype=torch.float32, device=x_fp32.device)
    pieces = zip(x_fp32.view(-1).split(WINDOW), rounded.view(-1).split(WINDOW), strict=True)
    for tile, (piece, out) in enumerate(pieces):
        out.copy_(stochastic_round_(scratch[: len(piece)].copy_(piece), number, tile))
    return rounded


if triton is not None:

    @triton.jit
    def round_stochastically(x, seed, offset):
        """bfloat16 of a float32 block; `offset` (int64) numbers every element that shares this seed.

        Seven rounds are the fewest with which Philox4x32 passes BigCrush (Salmon et al. 2011); the default is ten.
        """
        noise = tl.randint(seed, offset, n_rounds=7).to(tl.int32, bitcast=True) & 0xFFFF
        bits = tl.where(x == x, x.to(tl.int32, bitcast=True) + noise, 0x7FC00000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)

    @triton.jit
    def stochastic_round_kernel(x_ptr, out_ptr, seed_ptr, total, BLOCK: tl.constexpr):
        offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # int64: total may pass 2**31
        x = tl.load(x_ptr + offset, mask=offset < total, other=0.0).to(tl.float32)
        tl.store(out_ptr + offset, round_stochastically(x, tl.load(seed_ptr), offset), mask=offset < total)


BLOCK = {"BLOCK": 2048, "num_warps": 4}  # 16 numbers per thread


def stochastic_round_triton(x_fp32: Tensor, seed: Tensor) -> Tensor:
    """Launches the kernel over the memory of a contiguous tensor, whatever its shape."""
    rounded = torch.empty(x_fp32.shape, dtype=torch.bfloat16, device=x_fp32.device)
    total = x_fp32.numel()
    stochastic_round_kernel[(triton.cdiv(total, BLOCK["BLOCK"]),)](x_fp32.contiguous(), rounded, seed, total, **BLOCK)
    return rounded


@torch.library.custom_op("lightspan::stochastic_round", mutates_args=())
def stochastic_round(x_fp32: Tensor, seed: Tensor) -> Tensor:
    """bfloat16 of the shape of `x_fp32`, contiguous; equal seeds (0-d, int64, on its device) give equal bits."""
    return stochastic_round_reference(x_fp32, seed)


@stochastic_round.register_fake
def _(x_fp32: Tensor, seed: Tensor) -> Tensor:
    return torch.empty(x_fp32.shape, dtype=torch.bfloat16, device=x_fp32.device)


if triton is not None:
    stochastic_round.register_kernel("cuda")(stochastic_round_triton)
