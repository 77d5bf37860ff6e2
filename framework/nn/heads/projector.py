"""The MLP head that self-supervised losses look through; probes read the features before it."""

from itertools import pairwise

from torch import Tensor, nn

from lightspan.core.errors import UserError


class Projector(nn.Module):
    """Linear - BatchNorm - ReLU for each hidden width, then a Linear: [B in_features] -> [B out_features].

    A predictor, from embeddings to embeddings, is one too.

    Args:
        in_features: the backbone's `num_features`.
        hidden: widths of the hidden layers, at least one.
        out_features: embedding width.
        bias: whether the linear layers have one. The following BatchNorm cancels a hidden one; published heads differ.
        layer_norm: end in a LayerNorm.
        hidden_norm: whether hidden layers have a BatchNorm; MoCo v2's head has none.
        batch_norm: end in a BatchNorm without weights, as SimCLR's and MoCo v3's heads do.
    """

    def __init__(
        self,
        in_features: int,
        hidden: list[int],
        out_features: int,
        bias: bool = True,
        layer_norm: bool = False,
        hidden_norm: bool = True,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        widths = [in_features, *hidden, out_features]
        if not hidden or min(widths) < 1:
            raise UserError(
                f"Projector widths in_features={in_features}, hidden={hidden}, out_features={out_features}: each must "
                "be at least 1 and hidden needs at least one entry; for a plain linear map use torch.nn.Linear"
            )
        self.in_features, self.out_features = in_features, out_features
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths[:-1]):
            norm = [nn.BatchNorm1d(width_out)] if hidden_norm else []
            layers += [nn.Linear(width_in, width_out, bias=bias), *norm, nn.ReLU(inplace=True)]
        layers.append(nn.Linear(widths[-2], out_features, bias=bias))
        layers += [nn.BatchNorm1d(out_features, affine=False)] if batch_norm else []
        layers += [nn.LayerNorm(out_features)] if layer_norm else []
        self.layers = nn.Sequential(*layers)

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.layers(x_BF)
