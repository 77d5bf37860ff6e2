"""Hidden layers of linear maps and GELU before a linear layer: of pixels, of classes, or of actions."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from lightspan.core.ranges import require_in
from lightspan.nn.widths import LazyHead


class MLPHead(LazyHead):
    """Linear - GELU, with a BatchNorm before and dropout behind it, for each hidden width, then a Linear:
    [... in_features] -> [... out_features].

    Args:
        in_features: what it takes.
        out_features: None leaves it to the method, such as the numbers of a patch or the number of classes.
        hidden: widths of the hidden layers; none gives one linear layer.
        dropout: share of the entries behind each of these that training sets to zero, in [0, 1).
        batch_norm: whether each hidden layer has a BatchNorm, for which rows are [B in_features].
    Raises: UserError for a width below 1, or dropout out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        widths = [in_features, *hidden]
        require_in("[1, inf)", in_features=in_features, hidden=hidden)
        require_in("[0, 1)", dropout=dropout)
        self.in_features = in_features
        drop = [nn.Dropout(dropout)] if dropout else []
        self.layers, self.width = nn.Sequential(), widths[-1]
        for pair in pairwise(widths):
            norm = [nn.BatchNorm1d(pair[1])] if batch_norm else []
            self.layers.extend([nn.Linear(*pair), *norm, nn.GELU(), *drop])
        if out_features is not None:
            self.build(out_features)

    def make_outputs(self, count: int) -> None:
        self.layers.append(nn.Linear(self.width, count))

    def forward(self, x: Tensor) -> Tensor:
        self.require_outputs()
        return self.layers(x)
