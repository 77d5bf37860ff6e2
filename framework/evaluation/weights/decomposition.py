"""Singular values and directions of one large matrix, and what two matrices have in common.

Exact up to a given size: from the Gram matrix of the shorter side in float64, so that values below a millionth of the
largest are rounding (`noise_spectra.ZERO`). Beyond that size the strongest directions alone, by subspace iteration from
a random start (Halko, Martinsson, Tropp, SIAM Rev. 53, 2011, algorithm 4.4), with a bound on their error.

Shapes: O rows, I columns, S values, M = min(O, I), K directions.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lightspan.evaluation.geometry.spectra import gram_singular_values
from lightspan.evaluation.weights.noise_spectra import ZERO

LARGEST = 4096
"""Shorter side up to which all values are computed; the work grows with its cube."""
SKETCHED = 64
"""Directions that are computed beyond it."""
_CHUNK = 2**24  # numbers in float64 at a time


class Decomposition:
    """A finite matrix of any float dtype, which is read in pieces and stays as it is.

    Attributes:
        exact: whether `values_S` are all of the M singular values, and not only the strongest.
        values_S: float64, descending; those below a millionth of the largest are set to 0.
        error: bound on the error of each value, as a share of the largest; of all but exact ones.
        energy: the sum of the squares of all values, exact in either case.
    """

    def __init__(self, matrix_OI: Tensor, largest: int = LARGEST, directions: bool = True) -> None:
        self.matrix_OI = matrix_OI
        peak = float(matrix_OI.abs().max()) if matrix_OI.numel() else 0.0
        # A power of two: nothing is rounded, and no square overflows or vanishes.
        self._scale = 2.0 ** max(-1000, min(1000, math.frexp(peak)[1]))
        self.exact = min(matrix_OI.shape) <= largest
        self._vectors_MK: Tensor | None = None
        self._wide = matrix_OI.shape[0] <= matrix_OI.shape[1]  # the shorter side is that of the rows
        self.error = 0.0
        values_S = self._all(directions) if self.exact else self._strongest()
        first = float(values_S[0]) if len(values_S) else 0.0
        self.values_S = torch.where(values_S > ZERO * first, values_S, 0.0) * self._scale
        self._energy = sum(float(piece.square().sum()) for piece in self._rows())

    @property
    def energy(self) -> float:
        return self._energy * self._scale**2

    @property
    def norm(self) -> float:
        """Of Frobenius; finite where the energy would overflow."""
        return self._energy**0.5 * self._scale

    @property
    def rank(self) -> int:
        """Number of values that are not 0."""
        return int((self.values_S > 0).sum())

    def frames(self, count: int) -> tuple[Tensor, Tensor]:
        """The strongest directions of the rows [O K] and of the columns [I K], orthonormal; no more than `rank`."""
        assert self._vectors_MK is not None
        short_MK = self._vectors_MK[:, : min(count, self.rank)]
        long_K = self._times(short_MK) / (self.values_S[: short_MK.shape[1]] / self._scale)
        # Directions of the weakest values are not quite orthogonal after the division.
        long_K = torch.linalg.qr(long_K).Q if long_K.shape[1] else long_K
        return (short_MK, long_K) if self._wide else (long_K, short_MK)

    def cosines(self, frame_OK: Tensor) -> Tensor:
        """The largest |cosine| of each column with any left singular vector of this matrix, [K]."""
        assert self.exact
        assert self._vectors_MK is not None
        if not self.rank:
            return torch.zeros(frame_OK.shape[1], dtype=torch.float64)
        vectors_MS = self._vectors_MK[:, : self.rank]
        if self._wide:
            return (vectors_MS.T @ frame_OK).abs().amax(dim=0)
        # u_s = W v_s / sigma_s, of which no more than the products are needed.
        products_SK = vectors_MS.T @ self._transposed_times(frame_OK)
        return (products_SK * (self._scale / self.values_S[: self.rank, None])).abs().amax(dim=0)

    def _rows(self) -> Iterator[Tensor]:
        return _pieces(self.matrix_OI, self._scale)

    def _all(self, directions: bool) -> Tensor:
        side = min(self.matrix_OI.shape)
        # Along the longer side, so that the Gram of the shorter one is a sum.
        pieces = _pieces(self.matrix_OI.T if self._wide else self.matrix_OI, self._scale)
        gram_MM = torch.zeros(side, side, dtype=torch.float64)
        for piece in pieces:
            gram_MM.addmm_(piece.T, piece)
        if not directions:
            return gram_singular_values(gram_MM)
        energy_M, vectors_MM = torch.linalg.eigh(gram_MM)
        self._vectors_MK = vectors_MM.flip(1)
        return energy_M.flip(0).clamp_min(0).sqrt()

    def _strongest(self) -> Tensor:
        """Rayleigh-Ritz in the span that some multiplications by W W^T or W^T W leave of a random one.

        A Ritz value is within its residual |W^T u - sigma v| of a singular value.
        """
        side = min(self.matrix_OI.shape)
        count = min(side, SKETCHED + 16)
        start = torch.Generator().manual_seed(0)
        frame_MK = torch.randn(side, count, generator=start, dtype=torch.float64)
        for _ in range(6):
            frame_MK = torch.linalg.qr(self._back(self._times(torch.linalg.qr(frame_MK).Q))).Q
        long_XK = self._times(frame_MK)
        left_XK, values_K, right_KK = torch.linalg.svd(long_XK, full_matrices=False)
        self._vectors_MK = (frame_MK @ right_KK.mT)[:, :SKETCHED]
        values_S = values_K[:SKETCHED]
        residual_MK = self._back(left_XK[:, :SKETCHED]) - self._vectors_MK * values_S
        self.error = float(residual_MK.norm(dim=0).max() / values_S[0]) if values_S[0] else 0.0
        return values_S

    def _times(self, short_MK: Tensor) -> Tensor:
        """From the shorter side to the longer one."""
        return self._transposed_times(short_MK) if self._wide else self._matrix_times(short_MK)

    def _back(self, long_K: Tensor) -> Tensor:
        return self._matrix_times(long_K) if self._wide else self._transposed_times(long_K)

    def _matrix_times(self, x_IK: Tensor) -> Tensor:
        return torch.cat([piece @ x_IK for piece in self._rows()])

    def _transposed_times(self, x_OK: Tensor) -> Tensor:
        out_IK = torch.zeros(self.matrix_OI.shape[1], x_OK.shape[1], dtype=torch.float64)
        row = 0
        for piece in self._rows():
            out_IK.addmm_(piece.T, x_OK[row : row + len(piece)])
            row += len(piece)
        return out_IK


def _pieces(matrix_OI: Tensor, scale: float) -> Iterator[Tensor]:
    """Rows in float64, over the scale, a few at a time."""
    for part in matrix_OI.split(max(1, _CHUNK // max(1, matrix_OI.shape[1]))):
        yield part.double() / scale
