"""The frame each matrix is projected on, how it is chosen from a gradient, and when. Its transpose is the literature's
projector, and choosing it again (`refresh`) is what GaLore's code does every update_proj_gap steps.

| basis           | frame                                                            | state per matrix |
|-----------------|------------------------------------------------------------------|------------------|
| PowerBasis      | top singular directions, tracked by block power iteration        | N R numbers      |
| SVDBasis        | top singular directions, recomputed                              | N R numbers      |
| GaussianBasis   | independent normal entries of variance 1 / R, drawn anew         | N R numbers      |
| DCTBasis        | the R best columns of one fixed orthonormal matrix               | R integers       |

Shapes: B matrices of one shape, M rows (kept), N columns (projected, N <= M), R rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.optim.low_rank.carries import Carry, Gather, Keep, Rotate
from lightspan.optim.matrices.stacks import Layout, State
from lightspan.subspaces import frames
from lightspan.subspaces.svd import thin_svd
from lightspan.triton_kernels.backproject_update import backproject_update
from lightspan.triton_kernels.dct_energies import dct_energies
from lightspan.triton_kernels.project import project


class Basis(ABC):
    """A family of frames. It has no state; the optimiser passes it in.

    `project` is the pull of `lightspan.subspaces.frames.Frames`, and `update` takes a step along its push, each in one
    pass over memory.

    Args:
        carry: what becomes of moments when a frame changes; see `lightspan.optim.low_rank.carries`.
    """

    orthonormal = True
    momentum = 0.0
    """Share of the lifted first moment in what `refresh` follows, in [0, 1); the rest is the gradient. The state that
    it gets then has, as `mean`, Adam's bias-corrected first moment [B M R] in the old frame.
    """

    def __init__(self, carry: Carry) -> None:
        self.carry = carry

    @abstractmethod
    def initial(self, layout: Layout) -> State:
        """State before the first gradient, in its final shape."""

    @abstractmethod
    def refresh(self, gradients: Sequence[Tensor], state: State, layout: Layout, *, first: bool) -> State:
        """State chosen again from gradients [M N]; `first` marks a state that no gradient has shaped yet."""

    @abstractmethod
    def frame(self, state: State, layout: Layout) -> Tensor:
        """The frames [B N R] that a state stands for."""

    def prepare(self, state: State, layout: Layout) -> State:
        """The state with whatever several parts of a step would otherwise each compute from it."""
        return state

    def project(
        self, gradients: Sequence[Tensor], state: State, layout: Layout, *, energy: bool
    ) -> tuple[Tensor, Tensor]:
        """Coordinates [B M R] of the gradients, and their squared row norms [B M] if `energy`, else [0 M]."""
        return project(gradients, self.frame(state, layout), energy)

    def update(
        self,
        weights: Sequence[Tensor],
        coefficients_BMR: Tensor,
        state: State,
        layout: Layout,
        gradients: Sequence[Tensor],
        scale_BM: Tensor,
        lr: Tensor,
        keep: Tensor,
        seed: Tensor | None,
        /,
    ) -> None:
        """W <- keep W - lr (coefficients Q^T + scale o G), in place; see triton_kernels/backproject_update.py."""
        frame_BNR = self.frame(state, layout)[..., : coefficients_BMR.shape[-1]]
        backproject_update(weights, coefficients_BMR, frame_BNR, gradients, scale_BM, lr, keep, seed)


class _DenseBasis(Basis):
    """A frame that is stored as it is."""

    _dtype: torch.dtype | None = None

    def initial(self, layout: Layout) -> State:
        return {"frame": layout.zeros(layout.size, layout.rank, dtype=self._dtype)}

    def frame(self, state: State, layout: Layout) -> Tensor:
        return state["frame"]


class PowerBasis(_DenseBasis):
    """Top singular directions, tracked by one warm step of block power iteration with CholeskyQR2 at each refresh.

    On gradients of small language models one such step captures as much as a new SVD, within half a percent of the
    energy, in a fortieth of the time.

    Args:
        first_iterations: power steps from the random start, taken at a matrix's first refresh.
        precision: in which frames are stored. bfloat16 halves them, and costs a relative 2^-9 of orthonormality.
        momentum: share in [0, 1) of Adam's bias-corrected first moment, lifted, in what the frame follows: LDAdam's rho
            (arXiv 2410.16103). The rest is the gradient of the refresh alone.
        carry: Rotate, or Keep to leave moments in the old frame's coordinates.
    """

    def __init__(
        self,
        first_iterations: int = 3,
        precision: Literal["float32", "bfloat16"] = "float32",
        momentum: float = 0.0,
        carry: Rotate | Keep = Rotate(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(carry)
        if first_iterations < 1:
            raise UserError(f"PowerBasis first_iterations={first_iterations} must be at least 1")
        if not 0 <= momentum < 1:
            raise UserError(f"PowerBasis momentum={momentum} must be in [0, 1)")
        self.momentum, self.first_iterations, self.precision = momentum, first_iterations, precision
        self._dtype = torch.bfloat16 if precision == "bfloat16" else None

    def refresh(self, gradients: Sequence[Tensor], state: State, layout: Layout, *, first: bool) -> State:
        if first:
            seeds, dtype, device = layout.seeds, layout.dtype, layout.device
            frame_BNR = frames.random_frame(seeds, layout.size, layout.rank, dtype=dtype, device=device)
        else:
            frame_BNR = state["frame"].to(layout.dtype)
        total, mean_BMR = None if layout.shards is None else layout.total, state.get("mean")
        for _ in range(self.first_iterations if first else 1):
            frame_BNR = frames.block_power_step(gradients, frame_BNR, total, layout.first_row, mean_BMR, self.momentum)
        return {"frame": frame_BNR.to(state["frame"].dtype)}


class SVDBasis(_DenseBasis):
    """Top singular directions, by a full SVD at each refresh: GaLore's choice, and the reference for the others.

    Args:
        carry: Keep, as GaLore does, or Rotate.
    """

    def __init__(self, carry: Rotate | Keep = Keep()) -> None:  # noqa: B008 - frozen
        super().__init__(carry)

    def refresh(self, gradients: Sequence[Tensor], state: State, layout: Layout, *, first: bool) -> State:
        # One at a time, of which nothing else holds a wide copy.
        vectors = [thin_svd(_whole_or_zeros(gradient, layout))[2][: layout.rank].mT for gradient in gradients]
        return {"frame": torch.stack(vectors)}


def _whole_or_zeros(gradient: Tensor, layout: Layout) -> Tensor:
    """The matrix, or zeros if a number is not finite: an SVD would raise, before the step says whose gradient it is."""
    matrix = layout.gathered(gradient.to(layout.dtype))
    return torch.where(torch.linalg.vector_norm(matrix, torch.inf).isfinite(), matrix, 0.0)


class DrawnBasis(_DenseBasis):
    """A random frame, drawn anew at each refresh from the layout's seeds, which are others after each draw. The state
    counts draws.
    """

    def initial(self, layout: Layout) -> State:
        return {**super().initial(layout), "draws": layout.zeros(dtype=torch.int64)}

    @abstractmethod
    def draw(self, layout: Layout) -> Tensor:
        """Frames [B N R] from the seeds."""

    def refresh(self, gradients: Sequence[Tensor], state: State, layout: Layout, *, first: bool) -> State:
        return {"frame": self.draw(layout), "draws": state["draws"] + 1}


class GaussianBasis(DrawnBasis):
    """Independent normal entries of variance 1 / R: norms are kept in the mean, angles are not (APOLLO, arXiv
    2412.05270, section 4.1.2). Goes with the Apollo residual only.
    """

    orthonormal = False

    def __init__(self) -> None:
        super().__init__(Keep())

    def draw(self, layout: Layout) -> Tensor:
        normal_BNR = frames.gaussian(layout.seeds, layout.size, layout.rank) / layout.rank**0.5
        return normal_BNR.to(dtype=layout.dtype, device=layout.device)


class ColumnSelection(Basis):
    """The R columns of one fixed orthonormal matrix D that contain the most gradient (DCT-AdamW, arXiv 2505.17967,
    section 3).

    For an orthonormal D the choice by squared column norms of G D is optimal: |G - G D_I D_I^T|^2 = |G|^2 - sum_{j in
    I} s_j^2. A matrix stores R integers; D is made once per size and shared.

    Args:
        norm: by which columns are compared: 2, or 1 as in the published code.
        carry: Gather, which is exact here, or Keep.
    """

    def __init__(self, norm: Literal[1, 2] = 2, carry: Gather | Rotate | Keep = Gather()) -> None:  # noqa: B008 - frozen
        super().__init__(carry)
        if norm not in (1, 2):
            raise UserError(f"norm={norm} must be 1 or 2")
        self.norm = norm
        self._matrices: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    @abstractmethod
    def build_matrix(self, size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The fixed orthonormal matrix D [N N]."""

    def matrix(self, layout: Layout) -> Tensor:
        """D, made once per size, dtype and device. It is a constant, so it is not part of the saved state."""
        key = (layout.size, layout.dtype, layout.device)
        if key not in self._matrices:
            self._matrices[key] = self.build_matrix(layout.size, dtype=layout.dtype, device=layout.device)
        return self._matrices[key]

    def constants(self) -> list[Tensor]:
        """The existing matrices, shared by all parameters of the same size."""
        return list(self._matrices.values())

    def initial(self, layout: Layout) -> State:
        first = torch.arange(layout.rank, device=layout.device)
        return {"columns": first.repeat(layout.batch, 1)}

    def energies(self, gradients: Sequence[Tensor], layout: Layout) -> Tensor:
        """Squared column norms [B N] of G D."""
        matrix_NN = self.matrix(layout)
        return torch.stack([project([g], matrix_NN[None], False)[0][0].square().sum(dim=0) for g in gradients])

    def refresh(self, gradients: Sequence[Tensor], state: State, layout: Layout, *, first: bool) -> State:
        if not layout.rows:  # a rank may have no rows of a small matrix, and transforms refuse empty input
            score_BN = layout.zeros(layout.size)
        elif self.norm == 2:
            score_BN = self.energies(gradients, layout)
        else:
            matrix_1NN = self.matrix(layout)[None]
            score_BN = torch.stack([project([g], matrix_1NN, False)[0][0].abs().sum(dim=0) for g in gradients])
        return {"columns": frames.top_columns(layout.total(score_BN), layout.rank)}

    def prepare(self, state: State, layout: Layout) -> State:
        return {**state, "frame": self.frame(state, layout)}

    def frame(self, state: State, layout: Layout) -> Tensor:
        # Rows of the transpose are contiguous, which makes the copy cheap and suits the product that follows.
        return state["frame"] if "frame" in state else self.matrix(layout).mT[state["columns"]].mT


class DCTBasis(ColumnSelection):
    """Columns of the DCT-II basis: cosines by frequency, the constant one included.

    Args:
        fast: whether column norms come from a fast transform instead of a product with D. The basis is the same, and D
            is then only needed for the columns that were chosen.
        norm, carry: see ColumnSelection.
    """

    def __init__(
        self,
        fast: bool = True,
        norm: Literal[1, 2] = 2,
        carry: Gather | Rotate | Keep = Gather(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(norm, carry)
        self.fast = fast

    def build_matrix(self, size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return frames.dct_matrix(size, dtype=dtype, device=device)

    def energies(self, gradients: Sequence[Tensor], layout: Layout) -> Tensor:
        return dct_energies(gradients) if self.fast else super().energies(gradients, layout)


class Trigger(ABC):
    """Decides on the host which matrices' frames are chosen again."""

    @abstractmethod
    def due(self, asked: Sequence[int], steps: Sequence[int], phases: Sequence[float]) -> list[int]:
        """Those of the matrices `asked`, positions in a stack, whose frame is to be chosen again now; a matrix' first
        step is not asked about.

        Args:
            steps: optimiser steps that each matrix of the stack has taken.
            phases: in [0, 1), spread over all matrices of the optimiser, so that they need not all be due at once.
        """


@dataclass(frozen=True)
class Every(Trigger):
    """A fixed number of steps after the last refresh.

    Args:
        steps: >= 1.
        staggered: whether matrices take turns, so that no single step does all of them: the k-th of n changes its
            frame first after k / n of `steps`. Published code changes all frames in the same step.
    """

    steps: int = 50
    staggered: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"refresh={self.steps} must be at least 1 step")

    def due(self, asked: Sequence[int], steps: Sequence[int], phases: Sequence[float]) -> list[int]:
        shift = self.steps if self.staggered else 0
        return [i for i in asked if (steps[i] - int(phases[i] * shift)) % self.steps == 0]
