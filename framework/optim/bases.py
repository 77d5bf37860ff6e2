"""The frame each matrix is projected on: how it is chosen from a gradient, and how moments move when it changes.

Shapes: B matrices of one shape, M rows (kept), N columns (projected, N <= M), R rank.
State of a basis is a mapping of stacked plain tensors, so that it can be saved, moved and sharded like any optimiser
state.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightspan.subspaces import frames
from lightspan.triton_kernels.low_rank_adam import bias_correction

BasisState = dict[str, Tensor]


@dataclass
class Moments:
    """Adam's moments in coordinates, and how many steps each column has seen.

    first_BMR, second_BMR: raw (not bias-corrected) running means of g and g^2. age_BR: float, >= 0.
    """

    first_BMR: Tensor
    second_BMR: Tensor
    age_BR: Tensor


class Basis(ABC):
    """A family of orthonormal frames. All functions are pure; the optimiser owns the state."""

    @abstractmethod
    def initial(
        self, batch: int, size: int, rank: int, seed: int, *, dtype: torch.dtype, device: torch.device
    ) -> BasisState:
        """State before any gradient was seen, from a seed alone."""

    @abstractmethod
    def state_numbers(self, size: int, rank: int) -> int:
        """Numbers stored per matrix, for the report before training."""

    @abstractmethod
    def refresh(self, gradient_BMN: Tensor, state: BasisState, *, first: bool) -> BasisState:
        """State chosen anew from the gradients; `first` marks a state no gradient has shaped yet."""

    @abstractmethod
    def frame(self, state: BasisState, size: int, dtype: torch.dtype) -> Tensor:
        """The frames [B N R] that a state stands for."""

    @abstractmethod
    def carry(
        self, moments: Moments, gradient_BMR: Tensor, old: BasisState, new: BasisState, betas: tuple[float, float]
    ) -> Moments:
        """Moments of the old frame in the coordinates of the new one. `gradient` is the present one, in new
        coordinates.
        """


class PowerBasis(Basis):
    """Top singular directions, tracked by one warm step of block power iteration with CholeskyQR2 at each refresh.

    On gradients of small language models one such step captures what a fresh SVD captures, within half a percent of the
    energy, at a fortieth of its time.

    Args:
        first_iterations: power steps from the random start, taken at a matrix's first refresh.
    """

    def __init__(self, first_iterations: int = 3) -> None:
        self.first_iterations = first_iterations

    def initial(
        self, batch: int, size: int, rank: int, seed: int, *, dtype: torch.dtype, device: torch.device
    ) -> BasisState:
        return {"frame": frames.random_frame(batch, size, rank, seed, dtype=dtype, device=device)}

    def state_numbers(self, size: int, rank: int) -> int:
        return size * rank

    def refresh(self, gradient_BMN: Tensor, state: BasisState, *, first: bool) -> BasisState:
        frame_BNR = state["frame"]
        for _ in range(self.first_iterations if first else 1):
            frame_BNR = frames.block_power_step(gradient_BMN, frame_BNR)
        return {"frame": frame_BNR}

    def frame(self, state: BasisState, size: int, dtype: torch.dtype) -> Tensor:
        return state["frame"]

    def carry(
        self, moments: Moments, gradient_BMR: Tensor, old: BasisState, new: BasisState, betas: tuple[float, float]
    ) -> Moments:
        """Rotation by the overlap O = Q_old^T Q_new, in the manner of LDAdam (Robert et al. 2024, arXiv 2410.16103).

        On bias-corrected moments: the mean moves linearly, m O. The second moment splits into squared mean and
        variance, and variances of uncorrelated old coordinates add up with weights O^2. A new direction owns a share
        c_j = sum_i O_ij^2 <= 1 of the old ones; about the rest, 1 - c_j, nothing is known but the present gradient,
        whose square stands in. Without that floor a direction from outside the old span would meet a denominator near
        zero. Squares below the squared mean, which running means of unequal length allow, come out raised to it.
        """
        correction1_B1R, correction2_B1R = (bias_correction(moments.age_BR, beta)[:, None] for beta in betas)
        overlap_BRR = old["frame"].mT @ new["frame"]
        share_BRR = overlap_BRR.square()
        unknown_B1R = (1 - share_BRR.sum(dim=1, keepdim=True)).clamp_min(0)
        mean_BMR, square_BMR = moments.first_BMR / correction1_B1R, moments.second_BMR / correction2_B1R
        variance_BMR = (square_BMR - mean_BMR.square()).clamp_min_(0)
        mean_BMR = mean_BMR @ overlap_BRR
        square_BMR = (variance_BMR @ share_BRR).add_(mean_BMR.square()).addcmul_(gradient_BMR.square(), unknown_B1R)
        return Moments(mean_BMR * correction1_B1R, square_BMR * correction2_B1R, moments.age_BR)


class ColumnSelection(Basis):
    """The R columns of one fixed orthonormal matrix that carry the most gradient energy (DCT-AdamW, arXiv 2505.17967,
    section 3).

    For an orthonormal D the choice by squared column norms of G D is optimal: |G - G D_I D_I^T|^2 = |G|^2 - sum_{j in
    I} s_j^2. A matrix stores R integers; D is made once per size and shared.
    """

    def __init__(self) -> None:
        self._matrices: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    @abstractmethod
    def build_matrix(self, size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The fixed orthonormal matrix [N N]."""

    def matrix(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The fixed matrix, made once per size, dtype and device. It is a constant, so it is no part of the saved
        state.
        """
        key = (size, dtype, device)
        if key not in self._matrices:
            self._matrices[key] = self.build_matrix(size, dtype=dtype, device=device)
        return self._matrices[key]

    def initial(
        self, batch: int, size: int, rank: int, seed: int, *, dtype: torch.dtype, device: torch.device
    ) -> BasisState:
        return {"columns": torch.arange(rank, device=device).repeat(batch, 1)}

    def state_numbers(self, size: int, rank: int) -> int:
        return rank

    def refresh(self, gradient_BMN: Tensor, state: BasisState, *, first: bool) -> BasisState:
        rank = state["columns"].shape[1]
        matrix_NN = self.matrix(gradient_BMN.shape[-1], gradient_BMN.dtype, gradient_BMN.device)
        energy_BN = (gradient_BMN @ matrix_NN).square().sum(dim=1)
        return {"columns": frames.top_columns(energy_BN, rank)}

    def frame(self, state: BasisState, size: int, dtype: torch.dtype) -> Tensor:
        columns_BR = state["columns"]
        return self.matrix(size, dtype, columns_BR.device)[:, columns_BR].permute(1, 0, 2)

    def carry(
        self, moments: Moments, gradient_BMR: Tensor, old: BasisState, new: BasisState, betas: tuple[float, float]
    ) -> Moments:
        """A gather: the overlap of two column sets of one orthonormal matrix is a partial permutation.

        Columns that stay keep their moments and age exactly; new ones start at zero with age 0.
        """
        same_BRR = old["columns"][:, :, None] == new["columns"][:, None, :]
        stays_BR, source_BR = same_BRR.any(dim=1), same_BRR.to(torch.int8).argmax(dim=1)
        source_BMR = source_BR[:, None, :].expand_as(moments.first_BMR)
        first_BMR = moments.first_BMR.gather(2, source_BMR) * stays_BR[:, None, :]
        second_BMR = moments.second_BMR.gather(2, source_BMR) * stays_BR[:, None, :]
        return Moments(first_BMR, second_BMR, moments.age_BR.gather(1, source_BR) * stays_BR)


class DCTBasis(ColumnSelection):
    """Selection from the DCT-II basis: cosines sorted by frequency, the constant column included."""

    def build_matrix(self, size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return frames.dct_matrix(size, dtype=dtype, device=device)
