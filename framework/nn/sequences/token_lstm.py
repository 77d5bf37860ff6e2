"""A small sequence network over learned tokens."""

from torch import Tensor, nn

from lightspan.core.errors import UserError


class TokenLSTM(nn.Module):
    """One bidirectional LSTM over tokens in their order: [M width] -> [M width], half of it from each direction.

    Args:
        width: even.
    """

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        if width < 2 or width % 2:
            raise UserError(f"TokenLSTM width={width} must be even: half of it comes from each direction")
        self.num_features = width
        self.lstm = nn.LSTM(width, width // 2, bidirectional=True)

    def forward(self, x_MF: Tensor) -> Tensor:
        return self.lstm(x_MF)[0]
