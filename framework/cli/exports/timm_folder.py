"""Networks as timm reads them: folders of `config.json` and `model.safetensors`, for `local-dir:FOLDER` or the hub.

Transformers reads the same folders (`AutoModel`, `TimmWrapperModel`). Shapes: B pictures, C H W, D features.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lightspan.backbones import timm_networks
from lightspan.backbones.elastic import ARCHITECTURE, ElasticViT
from lightspan.backbones.vit import TokenViT
from lightspan.core.errors import UserError
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
"""Of what timm knows of an architecture's published weights: what builds and feeds the network."""


def timm_network(backbone: object) -> nn.Module | None:
    """The network of timm that a backbone is, or stands around; None if it is another one."""
    if isinstance(backbone, ElasticViT):
        return backbone.extract(backbone.largest)
    network = backbone.network if isinstance(backbone, TokenViT) else backbone
    return network if isinstance(network, nn.Module) and type(network).__module__.startswith("timm.") else None


def twin(network: nn.Module, channels: int, size: tuple[int, int]) -> tuple[Any, dict[str, Any]] | None:
    """What `timm.create_model` builds that takes the weights of `network`, with them, and the arguments that build it.

    None where no arguments do: its first layer, say, was replaced, or a block has other heads than the first. A
    transformer need not be one of timm's own sizes.
    """
    name = (getattr(network, "pretrained_cfg", None) or {}).get("architecture")
    arguments: dict[str, Any] = {"in_chans": channels}
    if type(network) is VisionTransformer:
        blocks: Any = network.blocks
        if len({block.attn.num_heads for block in blocks}) > 1:
            return None  # the weights would fit: no shape tells how many heads they are divided among
        name, arguments = name or ARCHITECTURE, arguments | _sides(network)
    elif hasattr(network, "patch_embed"):
        arguments["img_size"] = size if size[0] != size[1] else size[0]
    if not name:
        return None
    try:
        built = timm_networks.timm_network(name, num_classes=0, **arguments)
        built.load_state_dict(network.state_dict())
    except (RuntimeError, TypeError, UserError):  # the last of an architecture of its own
        return None
    return built.train(network.training), arguments


def _sides(network: Any) -> dict[str, Any]:
    """The arguments of a VisionTransformer, read off its parts."""
    block, embed = network.blocks[0], network.patch_embed
    return {
        "img_size": tuple(embed.img_size),
        "patch_size": tuple(embed.patch_size),
        "embed_dim": network.embed_dim,
        "depth": len(network.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / network.embed_dim,
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "init_values": None if isinstance(block.ls1, nn.Identity) else 1e-5,
        "class_token": network.cls_token is not None,
        "reg_tokens": network.num_reg_tokens,
        "no_embed_class": network.no_embed_class,
        "pos_embed": "none" if network.pos_embed is None else "learn",
        "pre_norm": not isinstance(network.norm_pre, nn.Identity),
        "final_norm": not isinstance(network.norm, nn.Identity),
        "fc_norm": not isinstance(network.fc_norm, nn.Identity),
        "global_pool": network.global_pool,
        "dynamic_img_size": network.dynamic_img_size,
    }


def write_timm(
    network: nn.Module, size: tuple[int, int], mean: Sequence[float], std: Sequence[float], folder: Path
) -> bool:
    """Writes a folder from which timm builds the same network; False, and nothing, if no arguments of timm's do.

    Args:
        size: height and width of its pictures.
        mean, std: of their channels in [0, 1], as they are standardised.
    """
    found = twin(network, len(mean), size)
    if found is None:
        return False
    built, arguments = found
    built.pretrained_cfg = {key: built.pretrained_cfg[key] for key in KEPT if key in built.pretrained_cfg}
    save_for_hf(
        built,
        str(folder),
        model_args=arguments,
        safe_serialization=True,
        data_config={"input_size": (len(mean), *size), "crop_pct": 1.0, "mean": tuple(mean), "std": tuple(std)},
    )
    config = json.loads((folder / "config.json").read_text())
    config["model_args"].pop("num_classes", None)  # transformers gives it too, and Python refuses it twice
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return True


def read_timm(folder: Path) -> Any:
    """The network that timm builds from a folder, in evaluation mode."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def elastic_backbone(model: nn.Module) -> ElasticViT:
    """The backbone whose networks are cut out. Raises: UserError for a method that has no such backbone."""
    backbone: Any = getattr(model, "backbone", None)
    if not isinstance(backbone, ElasticViT):
        raise UserError(
            f"--sizes cuts networks out of an ElasticViT, and {type(model).__name__} has "
            f"{'none' if backbone is None else 'a ' + type(backbone).__name__} as its backbone; leave --sizes out"
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
