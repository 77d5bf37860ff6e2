"""Whether a row of one encoder and one of another belong together: how alike the encoders are once both rows join.

Source: Maniparambil et al., "Do Vision and Language Encoders Represent the World Similarly?", CVPR 2024, arXiv
2401.05224, section 3, as used across 3D and text by Hadgi et al., CVPR 2025, arXiv 2503.05283. CKA itself is
`lightspan.evaluation.geometry.similarity.linear_cka`.
Shapes: N anchors, Q rows of the first encoder and G of the second, D and E features.
"""

from torch import Tensor

from lightspan.subspaces.canonical import mean_of


def local_cka(anchor_ND: Tensor, anchor_NE: Tensor, x_QD: Tensor, y_GE: Tensor) -> Tensor:
    """The biased linear CKA of the anchors with each pair (x, y) added, in [0, 1], float64 [Q G].

    A row that is added changes a centred product by a matrix of rank one: X^T H Y becomes X^T H Y + a x y^T with
    a = N / (N + 1), x and y from the anchors' means. So |X^T H Y + a x y^T|^2 = |X^T H Y|^2 + 2 a x^T (X^T H Y) y +
    a^2 |x|^2 |y|^2, and no pair needs a pass over the anchors. 0 where nothing differs.

    Args:
        anchor_ND, anchor_NE: of the same samples, at least one, finite and near 1 in size.
    """
    share = len(anchor_ND) / (len(anchor_ND) + 1)
    (anchor_ND, x_QD), (anchor_NE, y_GE) = (
        (anchors.double() - mean_of(anchors), rows.double() - mean_of(anchors))
        for anchors, rows in ((anchor_ND, x_QD), (anchor_NE, y_GE))
    )
    first_DD, cross_DE, second_EE = anchor_ND.T @ anchor_ND, anchor_ND.T @ anchor_NE, anchor_NE.T @ anchor_NE
    square_Q, square_G = x_QD.square().sum(dim=1), y_GE.square().sum(dim=1)
    both_QG = cross_DE.square().sum() + 2 * share * (x_QD @ cross_DE @ y_GE.T) + share**2 * square_Q[:, None] * square_G
    own_Q = first_DD.square().sum() + 2 * share * (x_QD @ first_DD * x_QD).sum(dim=1) + (share * square_Q).square()
    own_G = second_EE.square().sum() + 2 * share * (y_GE @ second_EE * y_GE).sum(dim=1) + (share * square_G).square()
    length_QG = own_Q.sqrt()[:, None] * own_G.sqrt()
    return (both_QG / length_QG.where(length_QG > 0, 1)).where(length_QG > 0, 0).clamp_max(1)
