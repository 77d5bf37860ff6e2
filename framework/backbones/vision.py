"""Image backbones: any timm network by name, and one small enough for 8x8 and 28x28 images that no library has.

Every backbone maps [B C H W] to pooled features [B F] and says F in its attribute `num_features`.
"""

import difflib

import timm
from torch import Tensor, nn

from lightspan.errors import UserError


def timm_backbone(name: str, in_chans: int = 3, small_stem: bool = False, pretrained: bool = False) -> nn.Module:
    """A timm network without its classifier: [B in_chans H W] -> [B num_features].

    Args:
        name: as in `timm.list_models()`, e.g. resnet18.
        in_chans: image channels.
        small_stem: for images of about 64 pixels or less: the first convolution becomes 3x3 with stride 1 and the
            max-pool goes (the usual CIFAR form of a ResNet). Only for networks with timm's ResNet stem.
        pretrained: load published weights from timm's usual source; needs a network connection.
    Raises: UserError on an unknown name, or on small_stem for a network without a ResNet stem.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists all names"
        raise UserError(f"timm has no network named {name!r}; {hint}")
    if small_stem and pretrained:
        raise UserError(f"{name}: small_stem=true replaces the first convolution, whose weights pretrained=true loads")
    network = timm.create_model(name, pretrained=pretrained, in_chans=in_chans, num_classes=0)
    if small_stem:
        stem = getattr(network, "conv1", None)
        if not isinstance(stem, nn.Conv2d) or not hasattr(network, "maxpool"):
            raise UserError(
                f"{name} has no ResNet stem (one convolution `conv1`, then `maxpool`), so small_stem=true does not "
                "fit it; set small_stem to false or take a network such as resnet18"
            )
        network.conv1 = nn.Conv2d(in_chans, stem.out_channels, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm does for its own
        network.maxpool = nn.Identity()
    return network


class SmallConvNet(nn.Module):
    """Stages of 3x3 convolution - BatchNorm - ReLU, then the mean over positions: [B in_chans H W] -> [B num_features].

    The first stage keeps the resolution; each later one halves it and doubles the width, so
    num_features = width * 2^(stages - 1).

    Args:
        in_chans: image channels.
        width: channels of the first stage.
        stages: at least 1.
    """

    def __init__(self, in_chans: int = 1, width: int = 32, stages: int = 3) -> None:
        super().__init__()
        if min(in_chans, width, stages) < 1:
            raise UserError(
                f"SmallConvNet: in_chans={in_chans}, width={width} and stages={stages} must each be at least 1"
            )
        layers: list[nn.Module] = []
        for stage in range(stages):
            out_chans = width * 2**stage
            layers += [
                nn.Conv2d(in_chans, out_chans, kernel_size=3, stride=1 if stage == 0 else 2, padding=1, bias=False),
                nn.BatchNorm2d(out_chans),
                nn.ReLU(inplace=True),
            ]
            in_chans = out_chans
        self.layers = nn.Sequential(*layers)
        self.num_features = in_chans

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.layers(x_BCHW).mean(dim=(2, 3))
