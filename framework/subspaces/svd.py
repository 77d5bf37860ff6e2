"""The singular value decomposition, as used everywhere here: thin, and in float32 or wider.

Shapes: M rows, N columns, K = min(M, N).
"""

import torch
from torch import Tensor

from lightspan.core.devices import wide


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [... M K], descending s [... K] and V^T [... K N] with matrix = U diag(s) V^T; half precision has no SVD.

    Signs of singular vectors are arbitrary, and so are vectors of equal singular values.
    """
    left_MK, values_K, right_KN = torch.linalg.svd(wide(matrix), full_matrices=False)
    return left_MK, values_K, right_KN
