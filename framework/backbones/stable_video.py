"""Stable Video Diffusion, from a folder as diffusers writes it, as a network to whose first features hints are added.

Source: Blattmann et al., "Stable Video Diffusion: Scaling Latent Video Diffusion Models to Large Datasets", 2023, arXiv
2311.15127. The U-Net is that of diffusers, an optional package, which gets no folder: it sees settings and tensors.
Latents and the embedding of a picture are left to the autoencoder and to CLIP, which are not read.
Shapes: B clips, C channels, T frames, H W latent, D first features, L embedding.
"""

from typing import Any

from torch import Tensor, nn

from lightspan.backbones.stable_diffusion import filled, unet_and_tensors
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import expanded
from lightspan.core.files.places import ReadPath
from lightspan.core.ranges import require_in
from lightspan.nn.frames import as_frames

# A recipe may name the function listed here.
__all__ = ["stable_video"]


class StableVideo(nn.Module):
    """What a denoiser is made of (`lightspan.objectives.edm`), [B C T H W], of scaled noisy latents with a picture's
    latent beside them in each frame, [B 2C T H W], and levels float [B].

    Args:
        unet: of diffusers, UNetSpatioTemporalConditionModel.
        fps, motion, noise: told to it with every clip: frames a second less one, how much moves, and the noise in the
            picture.
    Attributes:
        hint_chans: D.
        context: L.
    """

    def __init__(self, unet: nn.Module, fps: float = 6, motion: float = 127, noise: float = 0.02) -> None:
        super().__init__()
        require_in("[0, inf)", fps=fps, motion=motion, noise=noise)
        config: Any = unet.config
        self.unet, self.told = unet, (float(fps), float(motion), float(noise))
        self.hint_chans: int = config.block_out_channels[0]
        self.context: int = config.cross_attention_dim

    def forward(
        self, x_BCTHW: Tensor, level_B: Tensor, hint_BDTHW: Tensor | None = None, context_BL: Tensor | None = None
    ) -> Tensor:
        """Args:
        hint_BDTHW: added to the first features; None adds nothing.
        context_BL: embedding of the picture; None is zeros.
        """
        if context_BL is None:
            context_BL = x_BCTHW.new_zeros(len(x_BCTHW), self.context)
        told_B3 = x_BCTHW.new_tensor(self.told).expand(len(x_BCTHW), 3)
        first: Any = self.unet.conv_in
        hook = first.register_forward_hook(lambda _, __, x: x if hint_BDTHW is None else x + as_frames(hint_BDTHW))
        try:
            output = self.unet(
                x_BCTHW.transpose(1, 2), level_B, context_BL[:, None], added_time_ids=told_B3, return_dict=False
            )[0]
        finally:
            hook.remove()
        return output.transpose(1, 2)


def stable_video(folder: ReadPath, fps: float = 6, motion: float = 127, noise: float = 0.02) -> StableVideo:
    """Stable Video Diffusion as a backbone of `lightspan.methods.generative.lcvd.LCVD`.

    Args:
        folder: with the folder unet, weights as safetensors.
        fps, motion, noise: see `StableVideo`.
    Raises: UserError without diffusers, and for a folder that has no such network.
    """
    place = expanded(folder, "the folder of Stable Video Diffusion") / "unet"
    unet, tensors = unet_and_tensors(place, "UNetSpatioTemporalConditionModel")
    config: Any = unet.config
    widths = config.cross_attention_dim, config.in_channels, config.out_channels
    if not isinstance(widths[0], int) or widths[1] != 2 * widths[2]:
        raise UserError(
            f"the U-Net in {place} reads {widths[1]} channels, draws {widths[2]} and has embeddings of {widths[0]}; it "
            "must read twice as many as it draws, and have one width of embeddings, as Stable Video Diffusion does"
        )
    return StableVideo(filled(unet, tensors, place), fps, motion, noise)
