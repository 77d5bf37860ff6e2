"""In which precision moments are stored. Arithmetic is float32 or wider in every case.

Rounding to nearest would freeze low-precision moments: at beta2 = 0.999 one step shrinks a second moment by a
thousandth, less than half a unit of bfloat16, so it could only ever grow. Formats below float32 round stochastically.

Shapes: B matrices, M rows, R rank.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightspan.optim.matrices.stacks import Layout, State
from lightspan.triton_kernels.quantised_moments import (
    SECOND_STREAM,
    decode_first,
    decode_second,
    encode_first,
    encode_second,
)
from lightspan.triton_kernels.rounding import stochastic_round


class MomentStorage(ABC):
    """A storage format. A moment is named `exp_avg` (any sign) or `exp_avg_sq` (>= 0)."""

    @abstractmethod
    def initial(self, layout: Layout, name: str, width: int) -> State:
        """A moment [B M width] of zeros."""

    @abstractmethod
    def load(self, state: State, name: str) -> Tensor:
        """The moment in working precision; the stored tensor itself if that is its format."""

    @abstractmethod
    def save(self, moment_BMR: Tensor, state: State, name: str, seed: Tensor) -> None:
        """Stores a moment in place; `seed`, int64 and 0-d, decides its roundings."""


@dataclass(frozen=True)
class Float32Moments(MomentStorage):
    """As computed: float32, or float64 for float64 weights."""

    def initial(self, layout: Layout, name: str, width: int) -> State:
        return {name: layout.zeros(layout.rows, width)}

    def load(self, state: State, name: str) -> Tensor:
        return state[name]

    def save(self, moment_BMR: Tensor, state: State, name: str, seed: Tensor) -> None:
        if moment_BMR is not state[name]:
            state[name].copy_(moment_BMR)


@dataclass(frozen=True)
class BFloat16Moments(MomentStorage):
    """Half the bytes; rounded stochastically."""

    def initial(self, layout: Layout, name: str, width: int) -> State:
        return {name: layout.zeros(layout.rows, width, dtype=torch.bfloat16)}

    def load(self, state: State, name: str) -> Tensor:
        return state[name].float()

    def save(self, moment_BMR: Tensor, state: State, name: str, seed: Tensor) -> None:
        stream = seed ^ SECOND_STREAM if name == "exp_avg_sq" else seed
        state[name].copy_(stochastic_round(moment_BMR.float(), stream))


@dataclass(frozen=True)
class Int8Moments(MomentStorage):
    """A quarter of the bytes: codes of 8 bits on a companded scale per row; see triton_kernels/quantised_moments.py."""

    def initial(self, layout: Layout, name: str, width: int) -> State:
        codes = torch.uint8 if name == "exp_avg_sq" else torch.int8
        scale_BM = layout.zeros(layout.rows, dtype=torch.float32)
        return {name: layout.zeros(layout.rows, width, dtype=codes), f"{name}_scale": scale_BM}

    def load(self, state: State, name: str) -> Tensor:
        decode = decode_second if name == "exp_avg_sq" else decode_first
        return decode(state[name], state[f"{name}_scale"])

    def save(self, moment_BMR: Tensor, state: State, name: str, seed: Tensor) -> None:
        encode = encode_second if name == "exp_avg_sq" else encode_first
        codes, scale_BM = encode(moment_BMR.float(), seed)
        state[name].copy_(codes)
        state[f"{name}_scale"].copy_(scale_BM)
