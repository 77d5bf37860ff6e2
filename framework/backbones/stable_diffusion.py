"""Stable Diffusion, from a folder as diffusers writes it, as a network that gets a caption by its number.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2021, arXiv 2112.10752, section
3.3. The U-Net is that of diffusers, an optional package, which gets no folder: it sees settings and tensors. The text
encoder is CLIP's, of transformers. Pictures and latents are left to the autoencoder, which is not read.
Shapes: B batch, C H W latent, K captions, T tokens of a caption, D width of the text encoder.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel

from lightspan.backbones.huggingface import CONFIG, stored_network, stored_tokenizer_of
from lightspan.backbones.weights import no_larger_than, require_fit
from lightspan.core.errors import UserError, install_extra, one_line
from lightspan.core.files.atomic import expanded
from lightspan.core.files.foreign import NUMBERS, settings_object, whole_text
from lightspan.core.files.places import ReadPath
from lightspan.core.files.tensors import stored_tensors
from lightspan.core.tokenizing import cut

# A recipe may name the function listed here.
__all__ = ["stable_diffusion"]

UNET = "diffusion_pytorch_model.safetensors"
CAPTIONS_AT_ONCE = 32


class CaptionedUNet(nn.Module):
    """Predicted noise [B C H W] of noisy latents [B C H W] at levels [B], of captions int64 [B] or of no caption.

    Args:
        unet: of diffusers, with attention to a text.
        captions_KTD: states of the text encoder of all captions, the empty one last.

    Attributes:
        num_classes: captions besides the empty one, which is the label of no class.
    """

    captions_KTD: Tensor

    def __init__(self, unet: nn.Module, captions_KTD: Tensor) -> None:
        super().__init__()
        self.unet, self.num_classes = unet, len(captions_KTD) - 1
        self.register_buffer("captions_KTD", captions_KTD, persistent=False)

    def forward(self, noisy_BCHW: Tensor, level_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        if label_B is None:
            label_B = torch.full_like(level_B, self.num_classes)
        said_BTD = self.captions_KTD[label_B].to(noisy_BCHW.dtype)
        return self.unet(noisy_BCHW, level_B, encoder_hidden_states=said_BTD, return_dict=False)[0]


def stable_diffusion(folder: ReadPath, captions: ReadPath) -> CaptionedUNet:
    """Stable Diffusion 1 or 2 as a backbone of `DenoisingDiffusion`, with the schedule scaled_linear; its caption k is
    line k of a file, counted from 0, and as many as there are lines is the empty one.

    Args:
        folder: with the folders unet, text_encoder and tokenizer, weights as safetensors.
        captions: text file, a caption a line; empty lines do not count, and what is too long is cut, as in diffusers.
    Raises: UserError without diffusers, for a folder that lacks a part or has one of another kind, such as SDXL or a
        network that fills holes, and for a file without a caption.
    """
    place, listed = expanded(folder, "the folder of Stable Diffusion"), expanded(captions, "the file of captions")
    try:
        texts = [line.strip() for line in whole_text(listed).splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"the captions in {listed} cannot be read: {error}") from error
    if not texts:
        raise UserError(f"{listed} has no caption; write one a line")
    captions_KTD = encoded(place, [*texts, ""])
    return CaptionedUNet(stored_unet(place / "unet", captions_KTD.shape[2]), captions_KTD)


@torch.no_grad()
def encoded(place: Path, texts: list[str]) -> Tensor:
    """States of CLIP's text encoder, float32 [K T D], each text padded or cut to the encoder's length."""
    encoder = stored_network(CLIPTextModel, str(place / "text_encoder"), "text encoder of CLIP").float().eval()
    tokenizer = stored_tokenizer_of(place / "tokenizer")
    length = encoder.config.max_position_embeddings
    try:
        NUMBERS.require(len(texts) * length * encoder.config.hidden_size)
    except ValueError as error:
        raise UserError(f"the states of {len(texts):,} captions cannot be kept: {error}") from error
    tokens_KT = cut(tokenizer, texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    chunks = tokens_KT.input_ids.split(CAPTIONS_AT_ONCE)
    return torch.cat([encoder(input_ids=some_BT).last_hidden_state for some_BT in chunks])


def stored_unet(place: Path, text_width: int) -> nn.Module:
    """The U-Net of a folder in float32. Raises: UserError as `stable_diffusion`."""
    unet, tensors = unet_and_tensors(place, "UNet2DConditionModel")
    config: Any = unet.config
    read, given = config.cross_attention_dim, (config.in_channels, config.addition_embed_type)
    if given != (config.out_channels, None) or read != text_width:
        raise UserError(
            f"the U-Net in {place} takes more than a noisy latent and a caption, or reads captions of width {read} "
            f"where the text encoder has {text_width}; take Stable Diffusion 1 or 2, not SDXL, and no network that "
            "fills holes"
        )
    return filled(unet, tensors, place)


def unet_and_tensors(place: Path, kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A U-Net of diffusers as the settings of a folder describe it, without numbers, and the tensors there.

    Args:
        kind: class of diffusers.
    Raises: UserError without diffusers, and for a folder that lacks a part or has another network.
    """
    try:
        import diffusers
    except ImportError as error:
        raise UserError(f"{kind} needs the package diffusers: {install_extra('diffusion')}") from error
    for name in (CONFIG, UNET):
        if not (place / name).is_file():
            raise UserError(
                f"{place} has no {name}; save the U-Net there with diffusers' save_pretrained, as safetensors"
            )
    tensors, _ = stored_tensors(place / UNET, "save the folder again")
    try:
        with (
            torch.device("meta"),
            no_larger_than(len(tensors)),
        ):  # settings may describe a network of any size: none is made before its tensors fit
            unet: nn.Module = getattr(diffusers, kind).from_config(settings_object(place / CONFIG))
    except Exception as error:  # whatever diffusers and torch raise for settings that they do not know
        raise UserError(f"{place} has no U-Net that diffusers can read: {one_line(error)[:400]}") from error
    return unet, tensors


def filled(unet: nn.Module, tensors: dict[str, Tensor], place: Path) -> nn.Module:
    """The U-Net with its tensors, in float32. Raises: UserError where they do not fit."""
    require_fit(unet, tensors, str(place / UNET))
    unet.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return unet
