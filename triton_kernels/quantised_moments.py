"""Adam's moments in one byte per number: companded levels, one scale per row, stochastic rounding between levels.

A block is the R coordinates of one row; its scale s, float32, is the largest magnitude in it, which is therefore exact.
    first moment, int8 k:    s sign(k) (|k| / 127)^3
    second moment, uint8 k:  s (k / 255)^4
Companding by powers (FlashOptim, arXiv 2602.23349, compands by other functions): neighbouring levels of sqrt(v) are
0.8 % apart at its largest value, 8 % two decades below and 27 % three below. The third power instead of the second
helps columns far below their row's largest: the relative error of Adam's direction falls from 0.83 to 0.48 a
thousandth below and from 4.8 to 2.2 a ten-thousandth below, and rises from 0.044 to 0.048 in the largest columns.

x is rounded to the upper of its two neighbours with probability (x - low) / (high - low), so that a decoded moment is x
on average. A root of x gives the code of one of the two, even if it is off by almost half a code, and comparing x with
the level of that code shows which: neighbours are exact with any fast cube root. Rounded to nearest, a second moment
could only grow: at b2 = 0.999 a step lowers it by a thousandth, and the gap between levels is at least 15 times that.

One exception to the average: a positive second moment never falls to level 0, but stays at level 1, where sqrt(v) is
1.5e-5 of its largest value. A zero under a first moment that was rounded up would make the quotient m / sqrt(v) huge,
the zero-point problem of Li et al. 2023, arXiv 2309.01507.

The columns of a row share only the scale: reordering codes reorders moments.

Shapes: B matrices, M rows, R coordinates, K rows that are encoded at once.
"""

from functools import cache, partial

import torch
from torch import Tensor

from lightspan.triton_kernels.launch import tl, triton
from lightspan.triton_kernels.rounding import noise_pool, window_start

MAX_RANK = 8192  # one program holds whole rows; longer ones use the reference path, which waits for a GPU
# Both moments of a step are rounded with one seed; this, added bit by bit, makes a second random stream.
SECOND_STREAM = 0x5851F42D4C957F2D
PIECE = 2**17  # numbers that the reference encodes at once: its temporaries stay in the processor's caches


def decode_first(codes_BMR: Tensor, scale_BM: Tensor) -> Tensor:
    """First moments, float32, of int8 codes."""
    return (codes_BMR * (1 / 127)).pow_(3).mul_(scale_BM[..., None])


def decode_second(codes_BMR: Tensor, scale_BM: Tensor) -> Tensor:
    """Second moments, float32, of uint8 codes."""
    return (codes_BMR * (1 / 255)).square_().square_().mul_(scale_BM[..., None])


def encode_reference(x_BMR: Tensor, seed: Tensor, *, first: bool) -> tuple[Tensor, Tensor]:
    """The definition of both encoders, and the CPU path."""
    stream = int(seed) if first else int(seed) ^ SECOND_STREAM
    x_BMR = x_BMR.to(torch.float32).contiguous()
    codes_BMR = torch.empty(x_BMR.shape, dtype=_code_type(first), device=x_BMR.device)
    scale_BM = x_BMR.amax(dim=-1)
    if first:
        torch.maximum(scale_BM, x_BMR.amin(dim=-1).neg_(), out=scale_BM)
    # Piece by piece: with temporaries for a whole stack, page faults take several times as long as the arithmetic.
    rows = max(1, PIECE // x_BMR.shape[-1])
    pieces = (t.view(-1, t.shape[-1]).split(rows) for t in (x_BMR, scale_BM[..., None], codes_BMR))
    for number, (x_KR, scale_K1, codes_KR) in enumerate(zip(*pieces, strict=True)):
        start = window_start(stream, number)
        uniform_KR = _uniform_pool(x_KR.device)[start : start + x_KR.numel()].view(x_KR.shape)
        codes_KR.copy_(_nearby_codes(x_KR, scale_K1, uniform_KR, first))
    return codes_BMR, scale_BM


def _code_type(first: bool) -> torch.dtype:
    return torch.int8 if first else torch.uint8


@cache
def _uniform_pool(device: torch.device) -> Tensor:
    """`noise_pool` as numbers in (0, 1), exactly: to convert them in every step takes longer than to read them."""
    return (noise_pool(device) + 0.5) * 2**-16


def _nearby_codes(x_KR: Tensor, scale_K1: Tensor, uniform_KR: Tensor, first: bool) -> Tensor:
    """Codes, as float32, of rows: for each number one of its two neighbours."""
    decode, top = (decode_first, 127) if first else (decode_second, 255)
    unit_K1 = torch.where(scale_K1 == 0, 1, scale_K1)
    if first:
        code_KR = x_KR.abs().div_(unit_K1).log2_().mul_(1 / 3).exp2_().mul_(top).round_().copysign_(x_KR)
    else:
        code_KR = (x_KR / unit_K1).sqrt_().sqrt_().mul_(top).round_()
    level_KR = decode(code_KR, scale_K1[:, 0])
    beyond_KR = x_KR - level_KR  # zero on a level, which is then its own neighbour and stays
    other_KR = beyond_KR.sign().add_(code_KR)
    gap_KR = decode(other_KR, scale_K1[:, 0]).sub_(level_KR)
    # Signs replace comparisons, whose truth values take several times as long to convert to numbers: 1 or -1 towards
    # `other` if x goes there, the opposite if it stays.
    side_KR = beyond_KR.sub_(gap_KR.mul_(uniform_KR)).sign_()
    # The mean of both codes plus half a code to that side: `other` or `code`. A tie stays at the mean, and the cast to
    # bytes truncates it to one of them.
    code_KR.add_(other_KR).add_(side_KR).mul_(0.5)
    return code_KR if first else torch.maximum(code_KR, x_KR.sign(), out=code_KR)


if triton is not None:

    @triton.jit
    def decode_block(codes, scale, FIRST: tl.constexpr):
        """Moments [rows, columns] of codes (any number type) and scales [rows, 1]."""
        if FIRST:
            root = codes.to(tl.float32) * (1 / 127)
            moments = root * root * root
        else:
            root = codes.to(tl.float32) * (1 / 255)
            square = root * root
            moments = square * square
        return moments * scale

    @triton.jit
    def encode_block(x, uniform, FIRST: tl.constexpr):
        """Codes [rows, columns] and scales [rows] of whole rows; `uniform` in [0, 1) is drawn for every element."""
        # As integers, magnitudes keep their order and a NaN is the largest; tl.max of floats would lose it.
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        magnitude = bits.to(tl.float32, bitcast=True)
        scale = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
        scale_column = scale[:, None]
        # The smallest share keeps the logarithm finite, and has code 0 like zero. A NaN becomes it, too: its code must
        # be a number, and it decodes to NaN because of its scale.
        share = tl.maximum(magnitude / tl.where(scale_column == 0, 1.0, scale_column), 1e-30)
        root = tl.exp2(tl.log2(share) * (1 / 3)) if FIRST else tl.sqrt(tl.sqrt(share))
        code = tl.floor(root * (127 if FIRST else 255) + 0.5)
        level = decode_block(code, scale_column, FIRST)
        other = tl.where(magnitude < level, code - 1, code + 1)
        gap = tl.abs(decode_block(other, scale_column, FIRST) - level)
        code = tl.where(uniform * gap < tl.abs(magnitude - level), other, code)
        if FIRST:
            codes = tl.where(x < 0, -code, code).to(tl.int32).to(tl.int8)
        else:
            codes = tl.where((code == 0) & (x > 0), 1.0, code).to(tl.int32).to(tl.uint8)
        return codes, scale

    @triton.jit
    def encode_kernel(
        x_ptr, codes_ptr, scale_ptr, seed_ptr, rows, rank,
        FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # int64: rows * rank may pass 2**31
        column = tl.arange(0, BLOCK_R)
        offset = row[:, None] * rank + column[None, :]
        inside = (row < rows)[:, None] & (column < rank)[None, :]
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        # Both moments of one seed use the same integers of Philox but different words of them.
        uniform_first, uniform_second, _, _ = tl.rand4x(tl.load(seed_ptr), offset, n_rounds=7)
        codes, scale = encode_block(x, uniform_first if FIRST else uniform_second, FIRST)
        tl.store(codes_ptr + offset, codes, mask=inside)
        tl.store(scale_ptr + row, scale, mask=row < rows)


def blocks(rank: int) -> dict[str, int]:
    """Tile of whole rows, 16 numbers per thread; with 32 a thread spills registers on Hopper."""
    block_rank = triton.next_power_of_2(rank)
    numbers = max(2048, block_rank)
    return {"BLOCK_M": numbers // block_rank, "BLOCK_R": block_rank, "num_warps": numbers // 512}


def encode_triton(x_BMR: Tensor, seed: Tensor, *, first: bool) -> tuple[Tensor, Tensor]:
    """Launches the kernel."""
    rank = x_BMR.shape[-1]
    if rank > MAX_RANK:
        return encode_reference(x_BMR, seed, first=first)
    codes_BMR, scale_BM = _empty_codes(x_BMR, first)
    tile, rows = blocks(rank), scale_BM.numel()
    encode_kernel[(triton.cdiv(rows, tile["BLOCK_M"]),)](
        x_BMR.contiguous(), codes_BMR, scale_BM, seed, rows, rank, FIRST=first, **tile
    )
    return codes_BMR, scale_BM


def _empty_codes(x_BMR: Tensor, first: bool) -> tuple[Tensor, Tensor]:
    codes_BMR = torch.empty(x_BMR.shape, dtype=_code_type(first), device=x_BMR.device)
    return codes_BMR, torch.empty(x_BMR.shape[:-1], dtype=torch.float32, device=x_BMR.device)


@torch.library.custom_op("lightspan::encode_first", mutates_args=())
def encode_first(m_BMR: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [B M R] and scales [B M] of first moments, any float dtype; equal seeds (0-d, int64, on their device)
    give equal codes."""
    return encode_reference(m_BMR, seed, first=True)


@torch.library.custom_op("lightspan::encode_second", mutates_args=())
def encode_second(v_BMR: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [B M R] and scales [B M] of second moments; independent of `encode_first` under the same seed."""
    return encode_reference(v_BMR, seed, first=False)


@encode_first.register_fake
def _(m_BMR: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_codes(m_BMR, True)


@encode_second.register_fake
def _(v_BMR: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_codes(v_BMR, False)


if triton is not None:
    encode_first.register_kernel("cuda")(partial(encode_triton, first=True))
    encode_second.register_kernel("cuda")(partial(encode_triton, first=False))
