"""Features as the matrix of a linear model. Shapes: N rows, D columns."""

import torch
from torch import Tensor

from lightspan.evaluation.features.features import Features
from lightspan.evaluation.geometry.spectra import centred
from lightspan.evaluation.scale import scaled
from lightspan.subspaces.svd import thin_svd


def design_matrix(features: Features, components: int | None, constant: bool) -> Tensor:
    """Rows near 1 in float64, [N D]; what is not finite stays as it is.

    Args:
        components: strongest principal components to which rows are reduced; None, and more than there are, keeps all.
        constant: whether a column of ones is added, for models with an intercept.
    """
    x_ND = scaled(features.rows())[1][0]
    if components is not None and components < x_ND.shape[1] and len(x_ND) and bool(x_ND.isfinite().all()):
        x_ND = centred(x_ND)
        x_ND = x_ND @ thin_svd(x_ND)[2][:components].T
    return (
        torch.cat([x_ND, torch.ones(len(x_ND), 1, dtype=torch.float64)], dim=1) if constant and x_ND.numel() else x_ND
    )
