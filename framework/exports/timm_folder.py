"""Networks as timm reads them: folders of `config.json` and `model.safetensors`, for `local-dir:FOLDER` or the hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import nn

from lightspan.backbones.elastic import ElasticViT
from lightspan.errors import UserError
from lightspan.nn.subnets import Size

ROWS, SEED = 2, 0
KEPT = (
    "architecture",
    "classifier",
    "crop_pct",
    "first_conv",
    "input_size",
    "interpolation",
    "mean",
    "std",
    "num_classes",
)


def elastic_backbone(model: nn.Module) -> ElasticViT:
    """The backbone whose networks are exported. Raises: UserError for a method that has no such backbone."""
    backbone: Any = getattr(model, "backbone", None)
    if not isinstance(backbone, ElasticViT):
        raise UserError(
            f"--to timm cuts networks out of an ElasticViT, and {type(model).__name__} has "
            f"{'none' if backbone is None else 'a ' + type(backbone).__name__} as its backbone; use --to safetensors"
        )
    return backbone


def sizes_of(backbone: ElasticViT, asked: Sequence[str] | None) -> list[Size]:
    """The sizes that were asked for as WIDTHxDEPTH, "all", or None for the whole network.

    Raises: UserError for one that is not in the backbone.
    """
    if not asked:
        return [backbone.largest]
    if list(asked) == ["all"]:
        return backbone.sizes
    known = {str(size): size for size in backbone.sizes}
    for name in asked:
        if name not in known:
            raise UserError(
                f"--sizes {name} is no network in here; widths are {', '.join(map(str, backbone.widths))} and depths "
                f"{', '.join(map(str, backbone.depths))}, written {backbone.sizes[0]}, or all"
            )
    return [known[name] for name in dict.fromkeys(asked)]


def write_networks(backbone: ElasticViT, sizes: Sequence[Size], folder: Path) -> float:
    """Writes a folder WIDTHxDEPTH for each size and reads it back with timm.

    Returns: the largest difference between its class token and that of the same size inside `backbone`, in float32.
    """
    backbone = backbone.float().eval()
    generator = torch.Generator().manual_seed(SEED)
    side, channels = backbone.common["img_size"], backbone.common["in_chans"]
    image_BChw, largest = torch.randn(ROWS, channels, side, side, generator=generator), 0.0
    for size in sizes:
        path, network = folder / str(size), backbone.extract(size)
        # Of what timm knows of this architecture's published weights only what builds and feeds the network.
        network.pretrained_cfg = {key: network.pretrained_cfg[key] for key in KEPT if key in network.pretrained_cfg}
        save_for_hf(
            network,
            str(path),
            model_args=backbone.settings(size),
            safe_serialization=True,
            data_config={"input_size": (channels, side, side), "mean": (0.5,) * channels, "std": (0.5,) * channels},
        )
        loaded = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
        with torch.no_grad():
            inside_Bw, alone_Bw = backbone.tokens(image_BChw, size)[:, 0], loaded(image_BChw)
        largest = max(largest, float((inside_Bw - alone_Bw).abs().amax()))
    return largest
