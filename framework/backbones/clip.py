"""CLIP's two encoders with the weights that were published for them, from the files that they were published in.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, arXiv 2103.00020.
Nothing is fetched. Shapes: B images or texts, C H W image, T tokens, F width of an encoder.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPModel

from lightspan.backbones.dual_encoder import DualEncoder
from lightspan.backbones.huggingface import stored_network
from lightspan.backbones.text import TextTransformer, last_states
from lightspan.backbones.timm_networks import under_timm_names
from lightspan.backbones.vision import timm_backbone
from lightspan.backbones.weights import fill, require_fit, tensors_behind, with_weights
from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath

# A recipe may name the functions listed here.
__all__ = ["openai_clip", "stored_clip"]

HEAD_WIDTH = 64
"""Of every attention of CLIP; no file of its weights says how many heads share a matrix."""
TEXT_NAMES = {
    "token_embedding": "tokens",
    "positional_embedding": "pos_embed",
    "ln_final": "norm",
    r"transformer\.resblocks": "blocks",
    r"attn\.": "self_attn.",
    r"ln_(\d)": r"norm\1",
    r"mlp\.c_fc": "linear1",
    r"mlp\.c_proj": "linear2",
}
"""OpenAI's names of the text encoder -> those of `TextTransformer`."""
OF_BOTH = {"text_projection": 2, "token_embedding.weight": 2, "positional_embedding": 2, "logit_scale": 0}
"""What a file of both encoders has beside those of images, and with how many axes."""


def openai_clip(name: str, path: ReadPath) -> DualEncoder:
    """OpenAI's CLIP, any of its ResNets and vision transformers, from one file of both encoders.

    Args:
        name: timm's, of the image encoder with OpenAI's settings, such as resnet50_clip or
            vit_base_patch16_clip_quickgelu_224.
        path: safetensors file under OpenAI's names, such as open_clip_model.safetensors of timm/resnet50_clip.openai or
            timm/vit_base_patch16_clip_224.openai on the Hugging Face hub.
    Raises: UserError for an unknown name, or a file that is missing, of another network or of one encoder alone.
    """
    tensors = tensors_behind(path, "")
    if lacking := [each for each, ndim in OF_BOTH.items() if each not in tensors or tensors[each].ndim != ndim]:
        raise UserError(
            f"{path} has no {lacking[0]} with {OF_BOTH[lacking[0]]} axes, so it is not the file of both encoders of "
            "CLIP under OpenAI's names; take open_clip_model.safetensors of a repository such as "
            "timm/resnet50_clip.openai"
        )
    image = timm_backbone(name)
    state = {f"image.{key}": tensor for key, tensor in under_timm_names(tensors, image, path).items()}
    # The map into the common space, which timm takes for a classifier.
    is_resnet = "image.head.proj.weight" in state
    head = "image.head.proj." if is_resnet else "image.head."
    for part in ("weight", "bias"):
        tensor = state.pop(f"{head}{part}", None)
        if tensor is not None and (is_resnet or part == "weight"):  # to a ViT timm adds a bias of zero
            state[f"image_map.{part}"] = tensor
    text_state = _text_state(tensors)
    state |= {f"text.{key}": tensor for key, tensor in text_state.items()}
    state["text_map.weight"], state["log_scale"] = tensors["text_projection"].T, tensors["logit_scale"].view(1)
    vocabulary, width = tensors["token_embedding.weight"].shape
    depth = len({key.split(".")[1] for key in text_state if key.startswith("blocks.")})
    context = len(tensors["positional_embedding"])

    def made() -> DualEncoder:
        text = TextTransformer(vocabulary, width, depth, max(1, width // HEAD_WIDTH), context)
        return DualEncoder(image, text, tensors["text_projection"].shape[1], image_bias=is_resnet)

    with torch.device("meta"):  # a narrow table may say any width: no text encoder is made before all tensors fit
        outline = made()
    require_fit(outline, state, path)
    encoders = made()
    fill(encoders, state, path, "")
    return encoders


def stored_clip(folder: ReadPath, weights: ReadPath | None = None, prefix: str = "encoders.") -> DualEncoder:
    """CLIP with a vision transformer from a folder as transformers writes it, such as openai/clip-vit-base-patch16.

    Its layers are those of transformers, whose queries, keys and values are linear layers of their own, as adapters
    need them: `*.q_proj`, `*.k_proj`, `*.v_proj`, `*.out_proj`, `*.fc1`, `*.fc2`.

    Args:
        folder: with config.json and safetensors files of both encoders.
        weights, prefix: of an earlier run of these encoders, exported, as `lightspan.backbones.weights.with_weights`
            takes them; None leaves the folder's.
    Raises: UserError as `lightspan.backbones.huggingface.stored_network` and `with_weights`.
    """
    network = stored_network(CLIPModel, folder, "CLIP")
    image, text = _Images(network.vision_model), _Texts(network.text_model)
    encoders = DualEncoder(image, text, network.visual_projection.out_features)
    encoders.image_map, encoders.text_map = network.visual_projection, network.text_projection
    with torch.no_grad():
        encoders.log_scale.copy_(network.logit_scale.view(1))
    if weights is not None:
        with_weights(encoders, weights, prefix)
    return encoders


class _Images(nn.Module):
    """[B C H W] -> [B F], the state of the class token after the last norm."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network, self.num_features = network, network.config.hidden_size

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.network(pixel_values=image_BCHW).pooler_output


class _Texts(nn.Module):
    """Tokens and mask [B T] -> [B F], the state of each text's last token after the last norm."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network, self.num_features = network, network.config.hidden_size
        self.context = network.config.max_position_embeddings

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        # Without the mask: attention is causal, and what follows a text's last token does not change its state.
        return last_states(self.network(input_ids=tokens_BT).last_hidden_state, mask_BT)


def _text_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of `TextTransformer`."""
    state = {}
    for key, tensor in tensors.items():
        if key.startswith(("token_embedding.", "positional_embedding", "ln_final.", "transformer.")):
            for pattern, name in TEXT_NAMES.items():
                key = re.sub(pattern, name, key)
            state[key] = tensor
    return state
