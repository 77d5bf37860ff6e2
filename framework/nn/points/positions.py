"""Positions of tokens that lie on no grid."""

from torch import Tensor, nn


class CentrePositions(nn.Sequential):
    """Coordinates [... 3] -> [... width], by a perceptron.

    Args:
        hidden: its units.

    Source: Pang et al., "Point-MAE", 2022, arXiv 2203.06604, section 3.1.
    """

    def __init__(self, width: int, hidden: int = 128) -> None:
        super().__init__(nn.Linear(3, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, centre: Tensor) -> Tensor:
        return super().forward(centre.to(next(self.parameters()).dtype))
