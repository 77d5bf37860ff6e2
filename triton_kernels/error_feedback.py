"""Error feedback: what a step leaves out is stored, in full or in few bits, and added to the next gradient.

For an input A = clip G + E with coordinates R = A Q in an orthonormal frame, the new error is
    E <- A - (1 - kept) R Q^T.
kept = 0 is error feedback (Karimireddy et al. 2019, algorithm 2, with projection as the compressor): only what is
outside the frame comes back. kept = mu makes E the momentum of Dion (Ahn & Xu 2025, algorithm 1): a share mu of what
was applied stays as well.

Two ops, because one writes what the other reads. The dtype of the codes is the format:
    float64, float32, bfloat16   the error itself, rounded to nearest; no scales
    int8                         codes -127..127
    uint8                        two 4-bit codes -7..7 per byte in two's complement: the low nibble is the even column
Integer formats have one float32 scale per row and BLOCK columns: E = code * scale, scale = max|E| / largest code. A
block below SMALLEST is stored as zeros, scale included, so that nothing is ever divided by zero.

Shapes: B matrices, M rows, N columns, R rank, K stored columns (N, or ceil(N / 2) for uint8), S scales per row
(ceil(N / BLOCK), or 0 for float formats). No backward: optimiser steps only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightspan.core.devices import float32_precision
from lightspan.core.errors import UserError
from lightspan.triton_kernels.launch import INTERPRETED, address_table, element_type, tl, triton
from lightspan.triton_kernels.rounding import WINDOW

BLOCK = 128
SMALLEST = 2.0**-100  # 127 / SMALLEST is still finite in float32
LARGEST_CODE = {torch.float64: 0, torch.float32: 0, torch.bfloat16: 0, torch.int8: 127, torch.uint8: 7}
STORAGE = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "int4": torch.uint8,
}


def zero_error(batch: int, rows: int, columns: int, storage: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes [B M K] and scales [B M S] of an error of zero.

    Args:
        storage: one of STORAGE: "float64", "float32", "bfloat16", "int8", "int4".
    """
    if storage not in STORAGE:
        raise UserError(f"error storage {storage!r} is unknown; choose one of {', '.join(STORAGE)}")
    dtype = STORAGE[storage]
    stored, scales = -(-columns // 2) if dtype == torch.uint8 else columns, -(-columns // BLOCK)
    return (
        torch.zeros(batch, rows, stored, dtype=dtype, device=device),
        torch.zeros(batch, rows, scales if LARGEST_CODE[dtype] else 0, device=device),
    )


def working_dtype(codes_BMK: Tensor) -> torch.dtype:
    if codes_BMK.dtype not in LARGEST_CODE:
        known = ", ".join(str(dtype) for dtype in LARGEST_CODE)
        raise UserError(f"error codes of {codes_BMK.dtype} are not supported; store the error as one of {known}")
    return torch.float64 if codes_BMK.dtype == torch.float64 else torch.float32


def quantise_error_reference(
    a: Sequence[Tensor], coordinates_BMR: Tensor, frame_BNR: Tensor, kept: float, codes_BMK: Tensor, scales_BMS: Tensor
) -> None:
    """The definition, and the CPU path: by tiles of rows, so that intermediate results stay in the caches. Products of
    bfloat16 are rounded to bfloat16 once, by torch.mm.
    """
    wide, largest = working_dtype(codes_BMK), LARGEST_CODE[codes_BMK.dtype]
    narrow = coordinates_BMR.dtype == frame_BNR.dtype == torch.bfloat16
    operand = torch.bfloat16 if narrow else wide
    coordinates_BMR, frame_BNR = coordinates_BMR.to(operand), frame_BNR.to(operand)
    columns = a[0].shape[1]
    rows = max(1, WINDOW // columns)
    for b, matrix_MN in enumerate(a):
        frame_RN, parts = frame_BNR[b].mT, (matrix_MN, coordinates_BMR[b], codes_BMK[b], scales_BMS[b])
        for a_mN, coordinates_mR, codes_mK, scales_mS in zip(*(part.split(rows) for part in parts), strict=True):
            # In float formats of the working precision the error is computed where it is stored.
            error_mN = codes_mK if codes_mK.dtype == wide else codes_mK.new_empty(a_mN.shape, dtype=wide)
            error_mN.copy_(a_mN)
            if narrow:
                error_mN.add_(coordinates_mR @ frame_RN, alpha=-(1 - kept))
            else:
                error_mN.addmm_(coordinates_mR, frame_RN, alpha=-(1 - kept))
            if largest:
                _encode(error_mN, codes_mK, scales_mS, largest)
            elif error_mN is not codes_mK:
                codes_mK.copy_(error_mN)


def _encode(error_mN: Tensor, codes_mK: Tensor, scales_mS: Tensor, largest: int) -> None:
    """Codes and scales of an error, which is changed."""
    for error_mSC, scale_mS in zip(_blocks(error_mN), _scales_of_blocks(scales_mS, error_mN), strict=True):
        most_mS = torch.maximum(error_mSC.amax(dim=2), error_mSC.amin(dim=2).neg_())
        most_mS = torch.where(most_mS < SMALLEST, 0.0, most_mS)
        scale_mS.copy_(most_mS / largest)
        error_mSC.mul_(torch.where(most_mS == 0, 0.0, most_mS.reciprocal() * largest)[..., None])
    error_mN.add_(0.5).floor_()
    if largest == 127:
        codes_mK.copy_(error_mN)
        return
    # an odd last column is completed by zeros
    nibbles_mN = pad(error_mN.to(torch.int8), (0, error_mN.shape[1] % 2)).view(torch.uint8) & 15
    torch.bitwise_or(nibbles_mN[:, 0::2], nibbles_mN[:, 1::2] << 4, out=codes_mK)


def _blocks(matrix_mN: Tensor) -> list[Tensor]:
    """Views [m S C] of the blocks of BLOCK columns, and of the shorter last one if there is one."""
    whole = matrix_mN.shape[1] // BLOCK * BLOCK
    parts = [matrix_mN[:, :whole].unflatten(1, (-1, BLOCK))] if whole else []
    return parts if whole == matrix_mN.shape[1] else [*parts, matrix_mN[:, None, whole:]]


def _scales_of_blocks(scales_mS: Tensor, matrix_mN: Tensor) -> list[Tensor]:
    """Views [m S] of the scales that belong to `_blocks`."""
    whole = matrix_mN.shape[1] // BLOCK
    return [part for part in (scales_mS[:, :whole], scales_mS[:, whole:]) if part.shape[1]]


def add_error_reference(gradients: Sequence[Tensor], codes_BMK: Tensor, scales_BMS: Tensor, clip: Tensor) -> Tensor:
    """The definition, and the CPU path: by tiles of rows."""
    wide = working_dtype(codes_BMK)
    out_BMN = codes_BMK.new_empty((len(gradients), *gradients[0].shape), dtype=wide)
    rows = max(1, WINDOW // out_BMN.shape[2])
    for gradient_MN, *stored in zip(gradients, out_BMN, codes_BMK, scales_BMS, strict=True):
        parts = (gradient_MN, *stored)
        for g_mN, out_mN, codes_mK, scales_mS in zip(*(part.split(rows) for part in parts), strict=True):
            out_mN.copy_(g_mN).mul_(clip)
            if not LARGEST_CODE[codes_mK.dtype]:
                out_mN.add_(codes_mK)
                continue
            error_mN = _nibbles(codes_mK, out_mN.shape[1]) if codes_mK.dtype == torch.uint8 else codes_mK
            error_mN = error_mN.to(wide)
            for error_mSC, scale_mS in zip(_blocks(error_mN), _scales_of_blocks(scales_mS, out_mN), strict=True):
                error_mSC.mul_(scale_mS[..., None])
            out_mN.add_(error_mN)
    return out_BMN


def _nibbles(codes_mK: Tensor, columns: int) -> Tensor:
    """4-bit codes as int8 [m N]: the shift up and back down as signed numbers extends the sign bit of a nibble."""
    nibbles_mK2 = torch.stack((codes_mK << 4, codes_mK & 240), dim=2).view(torch.int8) >> 4
    return nibbles_mK2.flatten(1)[:, :columns]


if triton is not None:

    @triton.jit
    def matrix_pointer(table_ptr, matrix, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
        pointer = tl.load(table_ptr + matrix).to(tl.pointer_type(ELEMENT))
        return tl.multiple_of(pointer, 16) if ALIGNED else pointer

    @triton.jit
    def quantise_error_kernel(
        table_ptr, coordinates_ptr, frame_ptr, codes_ptr, scales_ptr,
        lost, rows, columns, rank, stored, scales, stride_m, stride_n,
        ELEMENT: tl.constexpr, ALIGNED: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
        UPCAST: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
    ):  # fmt: skip
        matrix = tl.program_id(2).to(tl.int64)
        row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        block = tl.program_id(1).to(tl.int64)
        column = block * BLOCK + tl.arange(0, BLOCK)
        part = tl.arange(0, BLOCK_R)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        coordinates_ptr += (matrix * rows + row)[:, None] * rank + part[None, :]
        frame_ptr += (matrix * columns + column)[None, :] * rank + part[:, None]
        captured = tl.zeros((BLOCK_M, BLOCK), tl.float32)
        for start in range(0, rank, BLOCK_R):
            left = rank - start
            coordinates = tl.load(coordinates_ptr + start, mask=(row < rows)[:, None] & (part < left)[None, :], other=0)
            frame = tl.load(frame_ptr + start, mask=(part < left)[:, None] & (column < columns)[None, :], other=0)
            if UPCAST:
                coordinates, frame = coordinates.to(tl.float32), frame.to(tl.float32)
            captured = tl.dot(coordinates, frame, captured, input_precision=PRECISION)
        a_ptr = matrix_pointer(table_ptr, matrix, ELEMENT, ALIGNED)
        a_ptr += row[:, None] * stride_m + column[None, :] * stride_n
        error = tl.load(a_ptr, mask=inside, other=0.0).to(tl.float32) - lost * captured
        if LARGEST == 0:
            codes_ptr += (matrix * rows + row)[:, None] * stored + column[None, :]
            tl.store(codes_ptr, error.to(codes_ptr.dtype.element_ty), mask=inside)
        else:
            most = tl.max(tl.abs(error), axis=1)
            empty = most < SMALLEST
            scale = tl.where(empty, 0.0, most / LARGEST)
            inverse = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, most) * LARGEST)
            code = tl.floor(error * inverse[:, None] + 0.5).to(tl.int32)
            tl.store(scales_ptr + (matrix * rows + row) * scales + block, scale, mask=row < rows)
            if LARGEST == 127:
                codes_ptr += (matrix * rows + row)[:, None] * stored + column[None, :]
                tl.store(codes_ptr, code.to(tl.int8), mask=inside)
            else:
                low, high = tl.split(tl.reshape(code, (BLOCK_M, BLOCK // 2, 2)))
                byte = block * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
                codes_ptr += (matrix * rows + row)[:, None] * stored + byte[None, :]
                packed = (low & 15) | ((high & 15) << 4)
                tl.store(codes_ptr, packed.to(tl.uint8), mask=(row < rows)[:, None] & (byte < stored)[None, :])

    @triton.jit
    def add_error_kernel(
        table_ptr, codes_ptr, scales_ptr, clip_ptr, out_ptr, rows, columns, stored, scales, stride_m, stride_n,
        ELEMENT: tl.constexpr, ALIGNED: tl.constexpr, LARGEST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        matrix = tl.program_id(2).to(tl.int64)
        row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        block = tl.program_id(1).to(tl.int64)
        column = block * BLOCK + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        gradient_ptr = matrix_pointer(table_ptr, matrix, ELEMENT, ALIGNED)
        gradient_ptr += row[:, None] * stride_m + column[None, :] * stride_n
        gradient = tl.load(gradient_ptr, mask=inside, other=0.0).to(tl.float32)
        if LARGEST == 7:
            byte = block * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
            codes_ptr += (matrix * rows + row)[:, None] * stored + byte[None, :]
            packed = tl.load(codes_ptr, mask=(row < rows)[:, None] & (byte < stored)[None, :], other=0).to(tl.int32)
            # flipping the sign bit and subtracting 8 extends the sign of a nibble
            error = tl.interleave(((packed & 15) ^ 8) - 8, ((packed >> 4) ^ 8) - 8).to(tl.float32)
        else:
            codes_ptr += (matrix * rows + row)[:, None] * stored + column[None, :]
            error = tl.load(codes_ptr, mask=inside, other=0).to(tl.float32)
        if LARGEST > 0:
            scale = tl.load(scales_ptr + (matrix * rows + row) * scales + block, mask=row < rows, other=0.0)
            error *= scale[:, None]
        out_ptr += (matrix * rows + row)[:, None] * columns + column[None, :]
        tl.store(out_ptr, tl.load(clip_ptr).to(tl.float32) * gradient + error, mask=inside)


def blocks(rank: int) -> dict[str, int]:
    """Block sizes of a rank. Frames are read in slices of 32 columns: whole ones would not fit into gfx942's 64 KiB."""
    return {"BLOCK_M": 64, "BLOCK": BLOCK, "BLOCK_R": 16 if rank <= 16 else 32}


def quantise_error_triton(
    a: Sequence[Tensor], coordinates_BMR: Tensor, frame_BNR: Tensor, kept: float, codes_BMK: Tensor, scales_BMS: Tensor
) -> None:
    """Launches the kernel. Float64 uses the reference: tensor cores would not help there."""
    if working_dtype(codes_BMK) == torch.float64:
        return quantise_error_reference(a, coordinates_BMR, frame_BNR, kept, codes_BMK, scales_BMS)
    assert codes_BMK.is_contiguous()
    assert scales_BMS.is_contiguous()
    coordinates_BMR, frame_BNR = coordinates_BMR.contiguous(), frame_BNR.contiguous()
    (rows, columns), rank = a[0].shape, coordinates_BMR.shape[2]
    sizes = blocks(rank)
    quantise_error_kernel[(triton.cdiv(rows, sizes["BLOCK_M"]), triton.cdiv(columns, BLOCK), len(a))](
        address_table(list(a)), coordinates_BMR, frame_BNR, codes_BMK, scales_BMS,
        1 - kept, rows, columns, rank, codes_BMK.shape[2], scales_BMS.shape[2], *a[0].stride(),
        ELEMENT=element_type(a[0].dtype), ALIGNED=all(matrix.data_ptr() % 16 == 0 for matrix in a),
        LARGEST=LARGEST_CODE[codes_BMK.dtype], SMALLEST=SMALLEST,
        UPCAST=INTERPRETED or coordinates_BMR.dtype != frame_BNR.dtype,
        PRECISION="ieee" if INTERPRETED or float32_precision() == "highest" else "tf32",
        **sizes, num_warps=8,
    )  # fmt: skip
    return None


def add_error_triton(gradients: Sequence[Tensor], codes_BMK: Tensor, scales_BMS: Tensor, clip: Tensor) -> Tensor:
    """Launches the kernel; float64 uses the reference."""
    if working_dtype(codes_BMK) == torch.float64:
        return add_error_reference(gradients, codes_BMK, scales_BMS, clip)
    assert codes_BMK.is_contiguous()
    assert scales_BMS.is_contiguous()
    (rows, columns), first = gradients[0].shape, gradients[0]
    out_BMN = torch.empty(len(gradients), rows, columns, device=first.device)
    sizes = blocks(1)
    add_error_kernel[(triton.cdiv(rows, sizes["BLOCK_M"]), triton.cdiv(columns, BLOCK), len(gradients))](
        address_table(list(gradients)), codes_BMK, scales_BMS, clip, out_BMN,
        rows, columns, codes_BMK.shape[2], scales_BMS.shape[2], *first.stride(),
        ELEMENT=element_type(first.dtype), ALIGNED=all(gradient.data_ptr() % 16 == 0 for gradient in gradients),
        LARGEST=LARGEST_CODE[codes_BMK.dtype], BLOCK_M=sizes["BLOCK_M"], BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return out_BMN


@torch.library.custom_op("lightspan::quantise_error", mutates_args=("codes_BMK", "scales_BMS"))
def quantise_error(
    a: Sequence[Tensor], coordinates_BMR: Tensor, frame_BNR: Tensor, kept: float, codes_BMK: Tensor, scales_BMS: Tensor
) -> None:
    """Stores E = A - (1 - kept) R Q^T in `codes` and `scales`, which `zero_error` makes.

    Args:
        a: B matrices [M N] in float32 (float64 for float64 codes), of one layout.
        kept: share of the captured part that stays in the error; 0 for error feedback, mu for Dion's momentum.
    """
    quantise_error_reference(a, coordinates_BMR, frame_BNR, kept, codes_BMK, scales_BMS)


@torch.library.custom_op("lightspan::add_error", mutates_args=())
def add_error(gradients: Sequence[Tensor], codes_BMK: Tensor, scales_BMS: Tensor, clip: Tensor) -> Tensor:
    """clip * G + E as a contiguous [B M N] tensor in float32, or in float64 if the codes are.

    Args:
        gradients: B matrices [M N] of one layout, any float dtype.
        clip: 0-d factor of the gradients only; the error was stored clipped.
    """
    return add_error_reference(gradients, codes_BMK, scales_BMS, clip)


@quantise_error.register_fake
def _(
    a: Sequence[Tensor], coordinates_BMR: Tensor, frame_BNR: Tensor, kept: float, codes_BMK: Tensor, scales_BMS: Tensor
) -> None:
    return None


@add_error.register_fake
def _(gradients: Sequence[Tensor], codes_BMK: Tensor, scales_BMS: Tensor, clip: Tensor) -> Tensor:
    return codes_BMK.new_empty((len(gradients), *gradients[0].shape), dtype=working_dtype(codes_BMK))


if triton is not None:
    quantise_error.register_kernel("cuda")(quantise_error_triton)
    add_error.register_kernel("cuda")(add_error_triton)
