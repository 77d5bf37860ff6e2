"""Volumes by their slices: a network of images embeds each slice, and a transformer relates them along the body.

Source: Nguyen et al., "Joint Self-Supervised Image-Volume Representation Learning with Intra-Inter Contrastive
Clustering", AAAI 2023, arXiv 2212.01893: slice embeddings of several levels, deformable attention between slices. The
authors' code takes the slices for channels and attends along the numbers of an embedding; here, as in the paper, it is
along the slices.
Shapes: B volumes, S slices of each, R slices, C channels, H W pixels of a slice, w width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.backbones.frames import PostNormBlock
from lightspan.backbones.timm_networks import timm_network
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.core.unit_length import unit_length
from lightspan.nn.sequences.deformable_attention import DeformableAttention
from lightspan.nn.widths import given_features, require_width

# A recipe may name the classes listed here.
__all__ = ["SliceEmbedding", "SliceTransformer", "SlicedVolumes", "StagedNetwork"]


class StagedNetwork(nn.Module):
    """A network of timm whose last stages tell their maps: [B C H W] -> [B num_features].

    Args:
        name: as in `timm.list_models()`, of a convolutional network.
        in_chans: C.
        stages: how many of the last ones `maps` gives, at least 1.
        pretrained: load published weights from timm's usual source; needs a network connection.
    Raises: UserError for a name that timm does not have, or a network that tells fewer stages.
    """

    def __init__(self, name: str, in_chans: int = 3, stages: int = 4, pretrained: bool = False) -> None:
        super().__init__()
        self.network = timm_network(name, pretrained, in_chans=in_chans, num_classes=0)
        told = getattr(self.network, "feature_info", [])
        if not callable(getattr(self.network, "forward_intermediates", None)) or not 1 <= stages <= len(told):
            raise UserError(
                f"stages={stages} of {name}: timm lists {len(told)} stages of it; take fewer, or a network such as "
                "resnet50"
            )
        self.stages, self.widths = stages, [info["num_chs"] for info in told[-stages:]]
        self.num_features = given_features(self.network)

    @property
    def feature_info(self) -> Any:
        """timm's, see `lightspan.nn.tokens`."""
        return [info | {"module": f"network.{info['module']}"} for info in self.network.feature_info]

    def maps(self, x_BCHW: Tensor) -> list[Tensor]:
        """Of the last stages, from the finest on."""
        return self.network.forward_intermediates(x_BCHW, indices=self.stages, intermediates_only=True)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.network(x_BCHW)


class SliceEmbedding(nn.Module):
    """Slices [R C H W] -> [R w]: the means over the maps of each stage, each scaled to unit length, the last twice, one
    after the other, and a linear map.

    The last stage counts twice as in the authors' code, where it is also the network's own output: of ResNet-50, 256 +
    512 + 1024 + 2 x 2048 = 5888 numbers.

    Args:
        encoder: whose `maps` are those of its stages, from the finest on, with their `widths`; a `UNetEncoder`
            (`lightspan.backbones.dense`) with axes=2, or a `StagedNetwork`.
        width: w.
    Raises: UserError for an encoder without them.
    """

    def __init__(self, encoder: nn.Module, width: int = 640) -> None:
        super().__init__()
        require_in("[1, inf)", width=width)
        widths = getattr(encoder, "widths", ())
        if not callable(getattr(encoder, "maps", None)) or not widths:
            raise UserError(
                f"SliceEmbedding: {type(encoder).__name__} does not tell the maps of its stages as `maps` and their "
                "widths as `widths`; take a UNetEncoder with axes=2, or a StagedNetwork"
            )
        self.encoder: Any = encoder
        self.linear = nn.Linear(sum(widths) + widths[-1], width)
        self.num_features = width

    def forward(self, slices_RCHW: Tensor) -> Tensor:
        pooled = [unit_length(each.flatten(2).mean(dim=2)) for each in self.encoder.maps(slices_RCHW)]
        return self.linear(torch.cat([*pooled, pooled[-1]], dim=1))


class SliceBlock(PostNormBlock):
    """With deformable attention, which sees all slices."""

    def attend(self, x_BTw: Tensor, seen_B11T: Tensor | None) -> Tensor:
        return self.attention(x_BTw)


class SliceTransformer(nn.Module):
    """Slice embeddings [B S w] -> [B S w], of any number of slices.

    Args:
        width: w, a multiple of `heads`.
        depth: blocks, at least 1.
        heads: of each block's `DeformableAttention`.
        mlp_width: of the hidden layer of each block.
        dropout: of both branches of each block, in [0, 1).
        stride, kernel, reach: as in `DeformableAttention`, in slices.
    """

    def __init__(
        self,
        width: int = 640,
        depth: int = 4,
        heads: int = 8,
        mlp_width: int = 720,
        dropout: float = 0.1,
        stride: int = 4,
        kernel: int = 6,
        reach: float = 2.0,
    ) -> None:
        super().__init__()
        require_in("[1, inf)", depth=depth, mlp_width=mlp_width)
        require_in("[0, 1)", dropout=dropout)
        self.in_features = self.num_features = width
        self.blocks = nn.Sequential(
            *(
                SliceBlock(width, DeformableAttention(width, heads, stride, kernel, reach), mlp_width, dropout)
                for _ in range(depth)
            )
        )

    def forward(self, slices_BSw: Tensor) -> Tensor:
        return self.blocks(slices_BSw)


class SlicedVolumes(nn.Module):
    """Volumes [B C S H W] -> [B w], the mean over the transformer's slices.

    Args:
        embedding: of slices.
        transformer: between them.
    Raises: UserError for widths that do not fit.
    """

    def __init__(self, embedding: SliceEmbedding, transformer: SliceTransformer) -> None:
        super().__init__()
        require_width(embedding, "transformer.width", transformer.in_features)
        self.embedding, self.transformer = embedding, transformer
        self.num_features = transformer.num_features

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The transformer's blocks, see `lightspan.nn.tokens`."""
        return [*self.transformer.blocks]

    def slices(self, volume_BCSHW: Tensor) -> Tensor:
        """Embeddings of the slices, before the transformer: [B S w]. Raises: UserError for anything but volumes."""
        if volume_BCSHW.ndim != 5:
            raise UserError(f"SlicedVolumes reads volumes [B C D H W], and this batch gives {[*volume_BCSHW.shape]}")
        rows_Rw = self.embedding(volume_BCSHW.transpose(1, 2).flatten(0, 1))
        return rows_Rw.unflatten(0, (volume_BCSHW.shape[0], volume_BCSHW.shape[2]))

    def forward(self, volume_BCSHW: Tensor) -> Tensor:
        return self.transformer(self.slices(volume_BCSHW)).mean(dim=1)
