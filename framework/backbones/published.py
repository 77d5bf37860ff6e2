"""Networks of timm and torchvision with the weights that were published for them, where these lie on this disk.

Nothing is fetched and nothing is unpickled: a file, or what an earlier download left in the cache of the library, is
read, and what is not there is named. `lightspan.backbones.pretrained` has networks whose weights come with installable
packages.
"""

import math
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers.utils import cached_file

from lightspan.backbones.timm_networks import require_known, timm_network, under_timm_names
from lightspan.backbones.vit import TokenViT
from lightspan.backbones.weights import fill, no_larger_than, require_fit, tensors_behind
from lightspan.core.absent import MissingFile, unless_missing
from lightspan.core.errors import UserError, one_line
from lightspan.core.files.atomic import expanded
from lightspan.core.files.foreign import settings_object
from lightspan.core.files.places import ReadPath
from lightspan.nn.stochastic_depth import Rates, drop_paths

_SETTINGS = (
    *("in_chans", "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "qk_norm"),
    *("init_values", "class_token", "reg_tokens", "no_embed_class", "pos_embed", "pre_norm", "final_norm", "fc_norm"),
    *("global_pool", "dynamic_img_size"),
)
"""Arguments of timm's that a folder may set: those that are numbers or words, and that shape a network."""

# A recipe may name the functions listed here.
__all__ = ["timm_folder", "timm_published", "timm_tokens", "timm_vit", "torchvision_published"]


def timm_published(name: str, outputs: int | None = None) -> nn.Module:
    """A timm network with the default weights of its name, such as resnet18 or resnet18.a1_in1k.

    Args:
        outputs: None keeps the published head, 0 leaves it out, and another number gives a new, random one.
    Raises: UserError for an unknown name, or where the cache of Hugging Face does not hold its model.safetensors.
    """
    require_known(name, [*timm.list_models(), *timm.list_pretrained()], "timm")
    known = timm.get_pretrained_cfg(name)
    repository = known.hf_hub_id if known is not None else None
    if not repository:
        raise UserError(f"timm names no weights on the Hugging Face hub for {name}; take one that it has them for")
    try:
        file = cached_file(repository, "model.safetensors", local_files_only=True)
    except OSError as error:
        raise MissingFile(
            f"the weights of {name} are not on this disk: the cache of Hugging Face has no {repository}/"
            f"model.safetensors; where there is a network, `hf download {repository} model.safetensors` fetches them"
        ) from error
    head = {} if outputs is None else {"num_classes": outputs}
    return timm_network(name, pretrained=True, pretrained_cfg_overlay={"file": file}, **head)


def timm_folder(folder: ReadPath, weights: bool = True) -> nn.Module:
    """The network, without its classifier, of a folder that timm or `lightspan export --to timm` wrote: `config.json`
    and `model.safetensors`. Its `pretrained_cfg` says how images are standardised.

    Args:
        weights: False leaves random ones, of the same network.
    Raises: MissingFile where a file is not there; UserError for settings that name no network of timm's, describe one
        far larger than the file, or do not fit its tensors.
    """
    place = expanded(folder, "the folder of a network")
    with unless_missing():
        tensors = tensors_behind(str(place / "model.safetensors"), "")
        if not (place / "config.json").is_file():
            raise MissingFile(f"{place} has no config.json; a folder for timm has one beside model.safetensors")
        try:
            config = settings_object(place / "config.json")
        except ValueError as error:
            raise UserError(f"{place / 'config.json'} cannot be read: {error}") from error
    name, settings, told = (config.get(key) for key in ("architecture", "model_args", "pretrained_cfg"))
    settings, told = ({} if given is None else given for given in (settings, told))
    if not isinstance(name, str) or not isinstance(settings, dict) or not isinstance(told, dict):
        raise UserError(f"{place / 'config.json'} names no network of timm; its `architecture` is {name!r:.80}")
    settings = {key: value for key, value in settings.items() if key in _SETTINGS and _is_plain(value)}
    classifier = told.get("classifier")
    heads = tuple(
        f"{head}." for head in ([classifier] if isinstance(classifier, str) else ["head", "fc", "classifier"])
    )
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(heads)}
    try:
        with torch.device("meta"), no_larger_than(len(tensors)):
            require_fit(timm_network(name, num_classes=0, **settings), kept, str(place))
    except UserError:
        raise
    except Exception as error:  # whatever timm and torch raise
        raise UserError(f"timm cannot make {name} of {place / 'config.json'}: {one_line(error)[:400]}") from error
    network = timm_network(name, num_classes=0, **settings)
    network.pretrained_cfg = {**network.pretrained_cfg, **_statistics(told, place)}
    if weights:
        fill(network, kept, str(place), "")
    return network


def _statistics(told: dict[str, Any], place: Path) -> dict[str, list[float]]:
    """Mean and deviation of the images that the network was trained on, where they are given."""
    found = {key: told[key] for key in ("mean", "std") if told.get(key) is not None}
    for key, given in found.items():
        numbers = given if isinstance(given, list) else [None]
        if not all(
            isinstance(one, int | float) and (key == "mean" or one > 0) and math.isfinite(one) for one in numbers
        ):
            raise UserError(f"{place / 'config.json'} has pretrained_cfg.{key}={given!r:.80}; give a number a channel")
    return found


def _is_plain(value: Any) -> bool:
    """Whether a setting is a number, text, or a list of numbers."""
    return all(isinstance(one, bool | int | float | str) for one in (value if isinstance(value, list) else [value]))


def timm_vit(
    name: str, path: ReadPath | None = None, prefix: str = "", outputs: int = 0, image_size: int | None = None
) -> VisionTransformer:
    """A vision transformer of timm with all that its name stands for: activation, epsilon of the norms and the like.

    No file of weights tells these. Those of OpenAI's CLIP fill any ViT-B/32 that has a norm before its blocks, and with
    GELU, or timm's default epsilon, it then computes something other than CLIP.

    Args:
        name: such as vit_base_patch32_clip_quickgelu_224, which is OpenAI's CLIP, or vit_small_patch14_dinov2.
        path: safetensors file of its weights under timm's names, or those that DINOv2 and OpenAI's CLIP were published
            under; None leaves random ones.
        prefix: of these names in the file; other names are ignored.
        outputs: of the head; 0 leaves it out, also that of the file. CLIP's is the map into the space that images share
            with texts, of 512 or 768 dimensions.
        image_size: H = W in pixels, a multiple of the patch's side; None is that of the name. Positions of a file of
            another size are resampled.
    Raises: UserError for an unknown name, a size that does not fit, or as `lightspan.backbones.weights.with_weights`.
    """
    known = [name for tags in (False, True) for name in timm.list_models(module="vision_transformer", pretrained=tags)]
    require_known(name, known, "timm's vision_transformer")
    sized: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    network = timm_network(name, num_classes=outputs, **sized)
    sides = *network.patch_embed.patch_size, *(network.patch_embed.img_size)
    if any(size % side or size < side for side, size in zip(sides[:2], sides[2:], strict=True)):
        raise UserError(f"image_size={image_size} of {name} must be a multiple of its patches' side, {sides[0]} pixels")
    if path is not None:
        _fill(network, path, prefix, outputs)
    return network


def _fill(network: nn.Module, path: str, prefix: str, outputs: int) -> None:
    """Weights of a file, under timm's names or those that timm renames."""
    with unless_missing():
        tensors = under_timm_names(tensors_behind(path, prefix), network, path)
        kept = {key: tensor for key, tensor in tensors.items() if outputs or not key.startswith("head.")}
        fill(network, kept, path, prefix)


def timm_tokens(
    name: str, path: ReadPath | None = None, prefix: str = "", mask_token: bool = True, drop_path: Rates = 0.0
) -> TokenViT:
    """A transformer of timm, with all that its name stands for, as a backbone of tokens for images of any sides that
    are multiples of its patch's: DINOv2's and DINOv3's, with and without registers, and others with a class token.

    Learned positions keep the grid of the name and are resampled to each image, as in DINOv2's own training at 224 and
    at 518 pixels; rotary positions need no such thing. `forward` gives the class token after the last norm.

    Args:
        name: such as vit_small_patch14_dinov2, vit_base_patch14_reg4_dinov2 or vit_large_patch16_dinov3.
        path: safetensors file of its weights under timm's names, or those that DINOv2 and DINOv3 were published under;
            None leaves random ones. A file of another grid of positions is resampled to that of the name.
        prefix: of these names in the file, such as `teacher.module.backbone.network.` of an earlier run; other names
            are ignored.
        mask_token, drop_path: as in `lightspan.backbones.vit.TokenViT` and `vit`. Files of weights have no mask token
            that timm reads: it starts at random.
    Raises: UserError for an unknown name, a network without a class token, or as
        `lightspan.backbones.weights.with_weights`.
    """
    modules = ("vision_transformer", "eva")
    known = [
        name
        for module in modules
        for tags in (False, True)
        for name in timm.list_models(module=module, pretrained=tags)
    ]
    require_known(name, known, "timm's vision_transformer and eva")
    try:
        network = timm_network(name, num_classes=0, global_pool="token", dynamic_img_size=True)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(
            f"{name} cannot give a class token of images of any size ({one_line(error)[:200]}); take a network such as "
            "vit_small_patch14_dinov2 or vit_small_patch16_dinov3"
        ) from error
    for block, drop in zip(network.blocks, drop_paths(drop_path, len(network.blocks), "timm_tokens"), strict=True):
        block.drop_path1 = block.drop_path2 = drop
    if path is not None:
        _fill(network, path, prefix, 0)
    return TokenViT(network, mask_token)


def torchvision_published(name: str) -> nn.Module:
    """A torchvision network with its head and the default weights of its name, such as resnet18.

    Raises: UserError for an unknown name, or where the cache of torch.hub does not hold its file.
    """
    require_known(name, torchvision.models.list_models(), "torchvision")
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    file = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    if not file.is_file():
        raise MissingFile(
            f"the weights of {name} are not on this disk: there is no {file}; where there is a network, "
            f"torchvision.models.get_model({name!r}, weights='DEFAULT') fetches it"
        )
    network = torchvision.models.get_model(name, weights=None)
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return network
