"""Adam's moments in one byte a number: companded levels, one scale a row, stochastic rounding between levels.

A block is the R coordinates of one row; its scale s, float32, is the largest magnitude in it, which is thus exact.
    first moment, int8 k:    s sign(k) (|k| / 127)^3
    second moment, uint8 k:  s (k / 255)^4
Companding by powers (FlashOptim, arXiv 2602.23349, compands by other functions): neighbouring levels of sqrt(v) lie
0.8 % apart at its largest value, 8 % two decades below and 27 % three below. The third power instead of the second
serves columns far below their row's largest: the relative error of Adam's direction falls from 0.83 to 0.48 a
thousandth below and from 4.8 to 2.2 a ten-thousandth below, and rises from 0.044 to 0.048 in the largest columns.

x goes to the upper of its two neighbours with probability (x - low) / (high - low), so that a decoded moment is x on
average. A root of x gives the code of one of the two, even if it is off by almost half a code, and comparing x with the
level of that code tells which: neighbours are exact with any fast cube root. Rounded to nearest, a second moment could
only grow: at b2 = 0.999 a step lowers it by a thousandth, and the gap between levels is at least fifteen times that.

One exception to the average: a positive second moment never falls to level 0, but stays at level 1, where sqrt(v) is
1.5e-5 of its largest value. A zero under a first moment that was rounded up would make the quotient m / sqrt(v) huge,
the zero-point problem of Li et al. 2023, arXiv 2309.01507.

The columns of a row share nothing but the scale: to reorder codes is to reorder moments.

Shapes: B matrices, M rows, R coordinates.
"""

import torch
from torch import Tensor

from lightspan.triton_kernels.launch import tl, triton
from lightspan.triton_kernels.rounding import noise_pool, window_start

# Both moments of a step are rounded with one seed; this, added bit by bit, makes a second stream of it.
SECOND_STREAM = 0x5851F42D4C957F2D
PIECE = 2**17  # numbers that the reference encodes at once: its temporaries stay in the processor's caches


def decode_first(codes_BMR: Tensor, scale_BM: Tensor) -> Tensor:
    """First moments, float32, of int8 codes."""
    return (codes_BMR * (1 / 127)).pow_(3).mul_(scale_BM[..., None])


def decode_second(codes_BMR: Tensor, scale_BM: Tensor) -> Tensor:
    """Second moments, float32, of uint8 codes."""
    return (codes_BMR * (1 / 255)).square_().square_().mul_(scale_BM[..., None])


def encode_first(m_BMR: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [B M R] and scales [B M] of first moments; equal seeds (0-d, int64) give equal codes."""
    return _encode(m_BMR, int(seed), first=True)


def encode_second(v_BMR: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [B M R] and scales [B M] of second moments; independent of `encode_first` under the same seed."""
    return _encode(v_BMR, int(seed) ^ SECOND_STREAM, first=False)


def _encode(x_BMR: Tensor, seed: int, *, first: bool) -> tuple[Tensor, Tensor]:
    x_BMR = x_BMR.to(torch.float32).contiguous()
    codes_BMR = torch.empty(x_BMR.shape, dtype=torch.int8 if first else torch.uint8, device=x_BMR.device)
    scale_BM = x_BMR.amax(dim=-1)
    if first:
        torch.maximum(scale_BM, x_BMR.amin(dim=-1).neg_(), out=scale_BM)
    # Piece by piece: with the temporaries of a whole stack, page faults take several times as long as the arithmetic.
    rows = max(1, PIECE // x_BMR.shape[-1])
    pieces = (t.view(-1, t.shape[-1]).split(rows) for t in (x_BMR, scale_BM[..., None], codes_BMR))
    for number, (x_KR, scale_K1, codes_KR) in enumerate(zip(*pieces, strict=True)):
        start = window_start(seed, number)
        noise_KR = noise_pool(x_KR.device)[start : start + x_KR.numel()].view(x_KR.shape)
        codes_KR.copy_(_nearby_codes(x_KR, scale_K1, noise_KR, first))
    return codes_BMR, scale_BM


def _nearby_codes(x_KR: Tensor, scale_K1: Tensor, noise_KR: Tensor, first: bool) -> Tensor:
    """Codes, as float32, of rows: for each number one of its two neighbours."""
    decode, top = (decode_first, 127) if first else (decode_second, 255)
    unit_K1 = torch.where(scale_K1 == 0, 1, scale_K1)
    if first:
        code_KR = x_KR.abs().div_(unit_K1).log2_().mul_(1 / 3).exp2_().mul_(top).round_().copysign_(x_KR)
    else:
        code_KR = (x_KR / unit_K1).sqrt_().sqrt_().mul_(top).round_()
    level_KR = decode(code_KR, scale_K1[:, 0])
    beyond_KR = x_KR - level_KR  # zero on a level, which then is its own neighbour and stays
    other_KR = beyond_KR.sign().add_(code_KR)
    gap_KR = decode(other_KR, scale_K1[:, 0]).sub_(level_KR)
    uniform_KR = torch.add(noise_KR, 0.5, out=level_KR).mul_(2**-16)
    # Signs stand for comparisons, whose truth values take several times as long to turn into numbers: 1 or -1 towards
    # `other` if x goes there, the opposite if it stays.
    side_KR = beyond_KR.sub_(gap_KR.mul_(uniform_KR)).sign_()
    # The mean of both codes and half a code to that side: `other` or `code`. A tie stays at the mean, and the cast to
    # bytes cuts it to one of them.
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
        magnitude = tl.abs(x)
        scale = tl.max(magnitude, axis=1)
        scale_column = scale[:, None]
        share = magnitude / tl.where(scale_column == 0, 1.0, scale_column)
        # The smallest share keeps the logarithm finite, and has code 0 as zero has.
        root = tl.exp2(tl.log2(tl.maximum(share, 1e-30)) * (1 / 3)) if FIRST else tl.sqrt(tl.sqrt(share))
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
