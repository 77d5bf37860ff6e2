"""Canonical correlation analysis: directions of two views of the same samples in which these agree.

Of centred rows X with covariance C_x, and Y likewise, (C_x + r_x I)^-1/2 C_xy (C_y + r_y I)^-1/2 = U S V^T gives the
maps (C_x + r_x I)^-1/2 U and (C_y + r_y I)^-1/2 V, whose k-th columns are a pair of directions with correlation S_k
(Hotelling, 1936; with a ridge Vinod, 1976). From the thin SVD X = Q s W^T, of whitened rows and their map,
(C_x + r_x I)^-1/2 = W diag((s^2 / (N - 1) + r_x)^-1/2) W^T, and the last W^T is a rotation that U takes in. Without a
ridge S are the cosines of the principal angles between the spans of X and Y (Björck, Golub, 1973), see
`lightspan.subspaces.grassmann.principal_angles`.
Everything is computed in float64, without squares of the rows: any scale is the same.
Shapes: N samples, D and E widths of the views, R directions in which rows differ, K pairs of directions.
"""

from dataclasses import dataclass

from torch import Tensor

from lightspan.subspaces.svd import thin_svd

RANK = 1e-6
"""Directions whose singular value is below this share of the largest are rounding of float32, and count as none."""


@dataclass(frozen=True)
class Whitened:
    """Rows without correlation.

    Attributes:
        rows_NR: (x - mean) @ map, uncorrelated; of variance 1 without a ridge, and with one below.
        map_DR: from centred rows to these. Its columns are orthogonal.
        mean_D: what is taken off the rows first.
    """

    rows_NR: Tensor
    map_DR: Tensor
    mean_D: Tensor


@dataclass(frozen=True)
class Principal:
    """Rows as their thin SVD about the mean: x - mean = left diag(values) right^T, values descending and above 0."""

    left_NR: Tensor
    values_R: Tensor
    right_DR: Tensor
    mean_D: Tensor

    def whitened(self, ridge: float = 0.0) -> Whitened:
        """Args: ridge: added to the variance of each direction, as a share of the mean variance of a feature, >= 0."""
        count, largest = len(self.left_NR), self.values_R[:1]
        share_R = self.values_R / largest
        length_R = (share_R.square() + ridge * share_R.square().sum() / max(1, len(self.right_DR))).sqrt()
        of_variance_1 = max(1, count - 1) ** 0.5
        rows_NR = self.left_NR * (of_variance_1 * share_R / length_R)
        return Whitened(rows_NR, self.right_DR * (of_variance_1 / length_R / largest), self.mean_D)


def principal(x_ND: Tensor) -> Principal:
    """Directions in which rows do not differ are left out: R is 0 for equal rows.

    Args:
        x_ND: finite, at least one row; any dtype.
    """
    mean_D = mean_of(x_ND)
    left_NK, values_K, right_KD = thin_svd(x_ND.double() - mean_D)
    kept_K = values_K > RANK * values_K[:1]
    return Principal(left_NK[:, kept_K], values_K[kept_K], right_KD[kept_K].T, mean_D)


def mean_of(x_ND: Tensor) -> Tensor:
    """The mean of at least one row, [D] in float64: of equal rows these, where a sum has rounding errors."""
    first_D = x_ND[0].double()
    return first_D + (x_ND.double() - first_D).mean(dim=0)


def whitened(x_ND: Tensor, ridge: float = 0.0) -> Whitened:
    """Rows without correlation, see `principal` and `Principal.whitened`."""
    return principal(x_ND).whitened(ridge)


@dataclass(frozen=True)
class CanonicalPair:
    """Two views and the maps to what they share, the strongest pair of directions first.

    Attributes:
        correlation_K: S in [0, 1], descending; a ridge shrinks it below the correlation of the projected samples.
        first, second: maps of the views, [D K] and [E K] for rows less their means, [D] and [E].
    """

    correlation_K: Tensor
    first_DK: Tensor
    second_EK: Tensor
    first_mean_D: Tensor
    second_mean_E: Tensor

    def first(self, x_ND: Tensor) -> Tensor:
        """Rows of the first view [N K], in float64."""
        return (x_ND.double() - self.first_mean_D) @ self.first_DK

    def second(self, y_NE: Tensor) -> Tensor:
        """Rows of the second view [N K], in float64."""
        return (y_NE.double() - self.second_mean_E) @ self.second_EK

    def leading(self, count: int) -> "CanonicalPair":
        """The strongest pairs, at most so many."""
        return CanonicalPair(
            self.correlation_K[:count],
            self.first_DK[:, :count],
            self.second_EK[:, :count],
            self.first_mean_D,
            self.second_mean_E,
        )


def canonical_pair(x: Whitened, y: Whitened) -> CanonicalPair:
    """Of two whitened views of the same samples; K is the smaller of their numbers of directions.

    Over samples, and without a ridge, both projected views have the covariance I and the cross-covariance diag(S).
    """
    left_RK, correlation_K, right_KR = thin_svd(x.rows_NR.T @ y.rows_NR / max(1, len(x.rows_NR) - 1))
    return CanonicalPair(correlation_K.clamp_max(1), x.map_DR @ left_RK, y.map_DR @ right_KR.T, x.mean_D, y.mean_D)


def linear_map(x: Whitened, y_NE: Tensor) -> Tensor:
    """A [D E] of the least |(x - mean) A - (y - mean)|^2 + (N - 1) r |A|^2, r being x's ridge; the shortest of equals.

    As (C_x + r I)^-1 C_xy, of which `x.map_DR @ x.rows_NR.T` is the first and half of the second factor.
    """
    return x.map_DR @ (x.rows_NR.T @ (y_NE.double() - mean_of(y_NE))) / max(1, len(y_NE) - 1)


def orthogonal_map(x_ND: Tensor, y_NE: Tensor) -> Tensor:
    """A [D E] of the least |(x - mean) A - (y - mean)|^2 among those whose columns, or rows if D < E, are orthonormal:
    the Procrustes problem (Schönemann, 1966).
    """
    x_ND, y_NE = (z_NF.double() - mean_of(z_NF) for z_NF in (x_ND, y_NE))
    left_DK, _, right_KE = thin_svd(x_ND.T @ y_NE)
    return left_DK @ right_KE
