"""Networks whose feature map is weighed by a map of attention before it is pooled, and feature maps of timm networks.

Source: ADSL, arXiv 2206.09068, section 3: ResNet-50 up to layer3, attention, mean over positions, dropout.
Shapes: B images, C H W image, h w feature map.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightspan.backbones.timm_networks import timm_network
from lightspan.core.errors import UserError
from lightspan.nn.heads.spatial_attention import SpatialAttention


class Attended(nn.Module):
    """A network whose feature map is weighed by its attention and then pooled: [B C H W] -> [B num_features].

    Args:
        network: has `num_features`, the channels of its map, and `forward_features`, image -> map [B num_features h w].
        dropout: of the pooled features, in [0, 1).
        frozen_norms: BatchNorms keep the statistics that they came with, as those of a pretrained network should; their
            scales and shifts train.
    Raises: UserError for a network that gives no map.
    """

    def __init__(self, network: nn.Module, dropout: float = 0.01, frozen_norms: bool = False) -> None:
        super().__init__()
        width = getattr(network, "num_features", None)
        if not isinstance(width, int) or not hasattr(network, "forward_features"):
            raise UserError(
                f"Attended needs a network with num_features and forward_features, and {type(network).__name__} lacks "
                "one; use FeatureMaps or lightspan.backbones.vision.SmallConvNet"
            )
        if not 0 <= dropout < 1:
            raise UserError(f"Attended dropout={dropout} must lie in [0, 1)")
        self.network, self.gate, self.dropout = network, SpatialAttention(width), nn.Dropout(dropout)
        self.num_features, self.frozen_norms = width, frozen_norms

    def train(self, mode: bool = True) -> "Attended":
        super().train(mode)
        if self.frozen_norms:
            for part in self.network.modules():
                if isinstance(part, _BatchNorm):
                    part.eval()
        return self

    def maps(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(feature map [B num_features h w], attention [B 1 h w]). Raises: UserError for what is no such map."""
        x_BChw = self.network.forward_features(image_BCHW)  # type: ignore[operator]
        if x_BChw.ndim != 4 or x_BChw.shape[1] != self.num_features:
            raise UserError(
                f"Attended weighs maps [B, {self.num_features}, h, w], and {type(self.network).__name__} gives "
                f"{[*x_BChw.shape]}; use a network of convolutions, such as FeatureMaps"
            )
        return x_BChw, self.gate(x_BChw)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x_BChw, attention_B1hw = self.maps(image_BCHW)
        return self.dropout((x_BChw * attention_B1hw).mean(dim=(2, 3)))


class FeatureMaps(nn.Module):
    """One stage's feature map of a timm network, without what comes after it: `forward_features` of `Attended`.

    Args:
        name: as in `timm.list_models()`.
        stage: of timm's `features_only`; 3 of a ResNet is layer3, of stride 16.
        in_chans: image channels.
        pretrained: load published weights from timm's usual source; needs a network connection.
    Raises: UserError for a network without such a stage.
    """

    def __init__(self, name: str = "resnet50", stage: int = 3, in_chans: int = 3, pretrained: bool = False) -> None:
        super().__init__()
        try:
            self.network: Any = timm_network(
                name, pretrained, in_chans=in_chans, features_only=True, out_indices=(stage,)
            )
        except (RuntimeError, AttributeError, AssertionError, IndexError) as error:
            raise UserError(f"timm gives no feature map of stage {stage} of {name!r}: {error}") from error
        self.num_features = int(self.network.feature_info.channels()[-1])

    def forward_features(self, image_BCHW: Tensor) -> Tensor:
        return self.network(image_BCHW)[0]

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """The mean over positions, [B num_features]."""
        return self.forward_features(image_BCHW).mean(dim=(2, 3))
