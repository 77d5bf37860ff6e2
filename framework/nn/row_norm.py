"""A BatchNorm of rows of which a rank may have any number."""

from torch import Tensor, nn


class RowNorm(nn.BatchNorm1d):
    """[N C] -> the same. Fewer than two rows have no variance: in training too they are normed by the running
    statistics, and leave these as they are.
    """

    def forward(self, x_NC: Tensor) -> Tensor:
        if self.training and len(x_NC) < 2:
            return nn.functional.batch_norm(
                x_NC, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        return super().forward(x_NC)
