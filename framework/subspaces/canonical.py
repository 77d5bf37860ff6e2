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


def whitened(x_ND: Tensor, ridge: float = 0.0) -> Whitened:
    """Directions in which rows do not differ are left out: R is 0 for equal rows.

    Args:
        x_ND: finite, at least one row; any dtype.
        ridge: added to the variance of each direction, as a share of the mean variance of the D features, >= 0.
    """
    x_ND = x_ND.double()
    # From the first row, since the mean of equal numbers has rounding errors.
    from_first_ND = x_ND - x_ND[:1]
    mean_D = from_first_ND.mean(dim=0)
    left_NK, values_K, right_KD = thin_svd(from_first_ND - mean_D)
    kept_K = values_K > RANK * values_K[:1]
    left_NR, values_R, right_DR = left_NK[:, kept_K], values_K[kept_K], right_KD[kept_K].T
    largest = values_R[:1]
    share_R = values_R / largest
    length_R = (share_R.square() + ridge * share_R.square().sum() / max(1, x_ND.shape[1])).sqrt()
    of_variance_1 = max(1, len(x_ND) - 1) ** 0.5
    return Whitened(
        left_NR * (of_variance_1 * share_R / length_R),
        right_DR * (of_variance_1 / length_R / largest),
        x_ND[0] + mean_D,
    )


@dataclass(frozen=True)
class CanonicalPair:
    """Two views and the maps to what they share, the strongest pair of directions first.

    Attributes:
        correlation_K: in [0, 1], descending.
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
    y_NE = y_NE.double()
    return x.map_DR @ (x.rows_NR.T @ (y_NE - y_NE.mean(dim=0))) / max(1, len(y_NE) - 1)


def orthogonal_map(x_ND: Tensor, y_NE: Tensor) -> Tensor:
    """A [D E] of the least |(x - mean) A - (y - mean)|^2 among those whose columns, or rows if D < E, are orthonormal:
    the Procrustes problem (Schönemann, 1966).
    """
    x_ND, y_NE = (z.double() - z.double().mean(dim=0) for z in (x_ND, y_NE))
    left_DK, _, right_KE = thin_svd(x_ND.T @ y_NE)
    return left_DK @ right_KE
