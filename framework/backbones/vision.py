"""Image backbones: any timm network by name, and small ones for 8x8 and 28x28 images, which no library has.

Every backbone maps [B C H W] to pooled features [B F] and says F in its attribute `num_features`.
"""

import math
from itertools import pairwise

from timm.models.resnet import ResNet
from torch import Tensor, nn

from lightspan.backbones.timm_networks import timm_network
from lightspan.core.absent import weights_may_be_missing
from lightspan.core.errors import UserError
from lightspan.nn.init import he_normal_
from lightspan.nn.widths import given_features

# A recipe may name the functions listed here.
__all__ = ["MLP", "LeNet", "SmallConvNet", "timm_backbone"]


def timm_backbone(
    name: str, in_chans: int = 3, small_stem: bool = False, pretrained: bool = False, stages: int | None = None
) -> nn.Module:
    """A timm network without its classifier: [B in_chans H W] -> [B num_features].

    Args:
        name: as in `timm.list_models()`, e.g. resnet18.
        in_chans: image channels.
        small_stem: for images of about 64 pixels or less: the first convolution becomes 3x3 with stride 1 and the
            max-pool is removed (the usual CIFAR form of a ResNet). Only for networks with timm's ResNet stem.
        pretrained: load published weights from timm's usual source; needs a network connection.
        stages: of a ResNet, keep the stem and this many of its four stages, under the names that they have in the whole
            network: a part that is trained first and then starts the whole of it. None keeps all.
    Raises: UserError on an unknown name, or on small_stem or stages for a network that is no ResNet.
    """
    if small_stem and pretrained:
        raise UserError(f"{name}: small_stem=true replaces the first convolution, whose weights pretrained=true loads")
    fetched = pretrained and not weights_may_be_missing()  # `lightspan check` downloads nothing
    network = timm_network(name, fetched, in_chans=in_chans, num_classes=0)
    # MobileNets and others have a layer between pooling and classifier, which stays; timm's num_features is before it.
    network.num_features = given_features(network)
    if small_stem:
        stem = getattr(network, "conv1", None)
        if not isinstance(stem, nn.Conv2d) or not hasattr(network, "maxpool"):
            raise UserError(
                f"{name} has no ResNet stem (one convolution `conv1`, then `maxpool`), so small_stem=true does not "
                "fit it; set small_stem to false or use a network such as resnet18"
            )
        network.conv1 = nn.Conv2d(in_chans, stem.out_channels, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm does for its own
        network.maxpool = nn.Identity()
    if stages is not None:
        if not isinstance(network, ResNet) or not 1 <= stages <= 4:
            raise UserError(
                f"stages={stages} keeps 1 to 4 stages of a ResNet, and {name} is timm's {type(network).__name__}; "
                "leave stages out, or use a network such as resnet50"
            )
        for later in range(stages + 1, 5):
            setattr(network, f"layer{later}", nn.Identity())
        network.feature_info = network.feature_info[: stages + 1]
        network.num_features = network.head_hidden_size = network.feature_info[-1]["num_chs"]
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

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The stages' ReLUs: one layer of features per stage, see `lightspan.nn.tokens`."""
        return [*self.layers][2::3]

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """The last stage's map, [B num_features h w]."""
        return self.layers(x_BCHW)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.forward_features(x_BCHW).mean(dim=(2, 3))


class MLP(nn.Module):
    """Linear layers with ReLU, on flattened images of one size: [B C H W] -> [B num_features], the last hidden layer.
    Rows of a table, [B F], are images of 1 x 1 x F.

    Weights start He-normal and biases at zero, as in Li et al. 2018 (arXiv 1804.08838). With a classifier of 10 classes
    after it, hidden [200, 200] on 28 x 28 grey images is their network of 199,210 weights.

    Args:
        in_shape: C, H, W of the images.
        hidden: widths of the layers, at least one.
    """

    def __init__(self, in_shape: tuple[int, int, int] = (1, 28, 28), hidden: tuple[int, ...] = (200, 200)) -> None:
        super().__init__()
        widths = [math.prod(in_shape), *hidden]
        if not hidden or min(widths) < 1:
            raise UserError(f"MLP: in_shape={tuple(in_shape)} and hidden={tuple(hidden)} must contain numbers above 0")
        layers = [part for pair in pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU(inplace=True))]
        self.layers = nn.Sequential(nn.Flatten(), *layers)
        self.in_shape, self.num_features = tuple(in_shape), widths[-1]
        he_normal_(self)

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The ReLUs, see `lightspan.nn.tokens`."""
        return [*self.layers][2::2]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Raises: UserError for samples of another number of values."""
        if math.prod(x_BCHW.shape[1:]) != math.prod(self.in_shape):
            shape = [*[1] * (4 - x_BCHW.ndim), *x_BCHW.shape[1:]]
            raise UserError(
                f"MLP: in_shape={list(self.in_shape)}, but a sample of this batch is {shape}; set in_shape to that"
            )
        return self.layers(x_BCHW)


class LeNet(nn.Module):
    """Two 5x5 convolutions with 2x2 max-pooling, of 6 and 16 channels, then layers of 120 and 84: [B C H W] -> [B 84].

    After LeCun et al. 1998, with ReLU and the start of `MLP`, as in Li et al. 2018 (arXiv 1804.08838). With a
    classifier of 10 classes after it, it has 44,426 weights on 28 x 28 grey images and 62,006 on 32 x 32 colour ones.

    Args:
        in_shape: C, H, W of the images; H and W at least 16.
    """

    num_features = 84

    def __init__(self, in_shape: tuple[int, int, int] = (1, 28, 28)) -> None:
        super().__init__()
        channels, height, width = in_shape
        if min(height, width) < 16 or channels < 1:
            raise UserError(f"LeNet: in_shape={tuple(in_shape)} must have at least one channel and 16 x 16 pixels")
        left = [((side - 4) // 2 - 4) // 2 for side in (height, width)]
        self.layers = nn.Sequential(
            *(nn.Conv2d(channels, 6, kernel_size=5), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, kernel_size=5), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(16 * math.prod(left), 120), nn.ReLU(inplace=True)),
            *(nn.Linear(120, self.num_features), nn.ReLU(inplace=True)),
        )
        he_normal_(self)

    @property
    def feature_modules(self) -> list[nn.Module]:
        """Both max-poolings and the ReLUs of both layers after them, see `lightspan.nn.tokens`."""
        return [self.layers[i] for i in (2, 5, 8, 10)]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.layers(x_BCHW)
