"""A 2+1-D U-Net for the diffusion of clips: layers within a frame, each followed by one along time that starts as if it
were not there.

Source: Blattmann et al., "Align your Latents", CVPR 2023, arXiv 2304.08818, and "Stable Video Diffusion", 2023, arXiv
2311.15127, whose U-Nets are those of latent diffusion (Rombach et al., 2021, arXiv 2112.10752) with layers along time
between those of a frame. Here these start at zero, in place of a learned mixture: at the start each frame is what the
network makes of it as a picture. A single token of context, of which attention is a linear layer, is added where the
level of noise is.
Shapes: B clips, T frames, N = B*T frames, C channels, H W sides, D width, E width of what says the level.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.diffusion import FREQUENCIES, level_waves
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.nn.frames import as_clip, as_frames
from lightspan.nn.sequences.self_attention import SelfAttention

# A recipe may name the class listed here.
__all__ = ["VideoUNet"]

L = TypeVar("L", nn.Conv2d, nn.Conv3d, nn.Linear)
HEAD = 32  # channels of a head of attention, or fewer where they do not divide the width


class FrameBlock(nn.Module):
    """Two convolutions of a picture, with the level between them, beside a shortcut: [N in_chans H W] and [N E] ->
    [N out_chans H W].
    """

    def __init__(self, in_chans: int, out_chans: int, level: int) -> None:
        super().__init__()
        self.first_norm, self.norm = _norm(in_chans), _norm(out_chans)
        self.first = nn.Conv2d(in_chans, out_chans, 3, padding=1)
        self.level = nn.Linear(level, out_chans)
        self.conv = nn.Conv2d(out_chans, out_chans, 3, padding=1)
        self.shortcut = nn.Identity() if in_chans == out_chans else nn.Conv2d(in_chans, out_chans, 1)

    def forward(self, x_NCHW: Tensor, level_NE: Tensor) -> Tensor:
        y = self.first(F.silu(self.first_norm(x_NCHW))) + self.level(level_NE)[:, :, None, None]
        return self.shortcut(x_NCHW) + self.conv(F.silu(self.norm(y)))


class TimeBlock(nn.Module):
    """Two convolutions of three frames, with the level between them, beside what goes in: [B C T H W] and [B E] ->
    [B C T H W]. The second starts at zero.
    """

    def __init__(self, chans: int, level: int) -> None:
        super().__init__()
        self.first_norm, self.norm = _norm(chans), _norm(chans)
        self.first = nn.Conv3d(chans, chans, (3, 1, 1), padding=(1, 0, 0))
        self.level = nn.Linear(level, chans)
        self.conv = _zero(nn.Conv3d(chans, chans, (3, 1, 1), padding=(1, 0, 0)))

    def forward(self, x_BCTHW: Tensor, level_BE: Tensor) -> Tensor:
        y = self.first(F.silu(self.first_norm(x_BCTHW))) + self.level(level_BE)[:, :, None, None, None]
        return x_BCTHW + self.conv(F.silu(self.norm(y)))


class FrameAttention(nn.Module):
    """Attention among the places of a picture, beside what goes in: [N C H W] -> [N C H W]."""

    def __init__(self, chans: int) -> None:
        super().__init__()
        self.norm, self.attention = _norm(chans), SelfAttention(chans, _heads(chans))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW + self.attention(self.norm(x_NCHW).flatten(2).transpose(1, 2)).transpose(1, 2).view_as(x_NCHW)


class TimeAttention(nn.Module):
    """Attention among the frames of a clip at each place, by how far they are apart, beside what goes in:
    [B C T H W] -> [B C T H W]. Its last layer starts at zero.
    """

    def __init__(self, chans: int) -> None:
        super().__init__()
        self.norm, self.attention = _norm(chans), SelfAttention(chans, _heads(chans), turns=True)
        _zero(self.attention.out)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        B, _, _, H, W = x_BCTHW.shape
        at_BHWTC = self.norm(x_BCTHW).permute(0, 3, 4, 2, 1)
        mixed = self.attention(at_BHWTC.flatten(0, 2))
        return x_BCTHW + mixed.unflatten(0, (B, H, W)).permute(0, 4, 3, 1, 2)


class SpaceTimeLayer(nn.Module):
    """A block, and where it attends attention, of the frames and then along time: [B in_chans T H W] and [B E] ->
    [B out_chans T H W].
    """

    def __init__(self, in_chans: int, out_chans: int, level: int, attends: bool) -> None:
        super().__init__()
        self.frame, self.time = FrameBlock(in_chans, out_chans, level), TimeBlock(out_chans, level)
        self.frame_attention = FrameAttention(out_chans) if attends else None
        self.time_attention = TimeAttention(out_chans) if attends else None

    def forward(self, x_BCTHW: Tensor, level_BE: Tensor) -> Tensor:
        frames = x_BCTHW.shape[2]
        x = as_clip(self.frame(as_frames(x_BCTHW), level_BE.repeat_interleave(frames, dim=0)), frames)
        x = self.time(x, level_BE)
        if self.frame_attention is not None and self.time_attention is not None:
            x = self.time_attention(as_clip(self.frame_attention(as_frames(x)), frames))
        return x


class VideoUNet(nn.Module):
    """Noisy clips [B in_chans T H W] and how noisy they are, float [B] -> [B out_chans T H W], of any T, H and W.

    Args:
        in_chans, out_chans: at least 1. Conditions that are concatenated to the noisy clip, such as a reference
            picture in each frame, count among the first.
        widths: of the levels, from the finest down, each of half the sides of the one before, rounded up; at least one.
        depth: layers of a level on the way down, at least 1; there are as many on the way up.
        attend_from: the first level, counted from 0, with attention; None is the last alone.
        context: numbers of a description of a clip, such as an embedding of a picture; 0 is none.
    Attributes:
        hint_chans: channels of a map [B hint_chans T H W] that may be added to the first features; widths[0].
        context: as given.
    Raises: UserError for numbers outside of these.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        widths: Sequence[int] = (32, 64),
        depth: int = 1,
        attend_from: int | None = None,
        context: int = 0,
    ) -> None:
        super().__init__()
        require_in("[1, inf)", in_chans=in_chans, out_chans=out_chans, widths=widths, depth=depth)
        require_in("[0, inf)", context=context)
        if not widths or any(width % 2 for width in widths):
            raise UserError(f"VideoUNet widths={[*widths]} must be even, one at least")
        last = len(widths) - 1
        require_in(f"[0, {last}]", attend_from=attend_from)
        attends = [level >= (last if attend_from is None else attend_from) for level in range(len(widths))]
        self.in_chans, self.out_chans, self.hint_chans, self.context = in_chans, out_chans, widths[0], context
        E = 4 * widths[0]
        self.level = nn.Sequential(nn.Linear(2 * FREQUENCIES, E), nn.SiLU(), nn.Linear(E, E))
        self.told = nn.Linear(context, E, bias=False) if context else None
        self.first = nn.Conv2d(in_chans, widths[0], 3, padding=1)
        kept, chans = [widths[0]], widths[0]
        self.down, self.halve = nn.ModuleList(), nn.ModuleList()
        for width, attending in zip(widths, attends, strict=True):
            layers = nn.ModuleList()
            for _ in range(depth):
                layers.append(SpaceTimeLayer(chans, width, E, attending))
                kept.append(chans := width)
            self.down.append(layers)
            self.halve.append(
                nn.Conv2d(width, width, 3, stride=2, padding=1) if len(self.down) <= last else nn.Identity()
            )
        self.middle = SpaceTimeLayer(chans, chans, E, True)
        self.up = nn.ModuleList()
        for width, attending in zip(widths[::-1], attends[::-1], strict=True):
            layers = nn.ModuleList()
            for _ in range(depth):
                layers.append(SpaceTimeLayer(chans + kept.pop(), width, E, attending))
                chans = width
            self.up.append(layers)
        self.norm = _norm(chans + kept.pop())
        self.last = _zero(nn.Conv2d(chans + widths[0], out_chans, 3, padding=1))

    def forward(
        self, x_BCTHW: Tensor, level_B: Tensor, hint_BDTHW: Tensor | None = None, context_BL: Tensor | None = None
    ) -> Tensor:
        """Args:
        hint_BDTHW: added to the first features; None adds nothing.
        context_BL: for a network with `context`; None, like zeros, tells nothing.
        """
        frames = x_BCTHW.shape[2]
        level_BE = self.level(level_waves(level_B).to(self.first.weight.dtype))
        if self.told is not None and context_BL is not None:
            level_BE = level_BE + self.told(context_BL)
        level_BE = F.silu(level_BE)
        x = as_clip(self.first(as_frames(x_BCTHW)), frames)
        if hint_BDTHW is not None:
            x = x + hint_BDTHW
        kept = [x]
        for layers, halve in zip(self.down, self.halve, strict=True):
            for layer in layers:  # type: ignore[attr-defined]
                kept.append(x := layer(x, level_BE))
            x = as_clip(halve(as_frames(x)), frames)
        x = self.middle(x, level_BE)
        for layers in self.up:
            for layer in layers:  # type: ignore[attr-defined]
                x = layer(torch.cat([_like(x, kept[-1]), kept.pop()], dim=1), level_BE)
        x = torch.cat([x, kept.pop()], dim=1)
        return as_clip(self.last(F.silu(self.norm(as_frames(x)))), frames)


def _like(x_BCTHW: Tensor, other_BCTHW: Tensor) -> Tensor:
    """With the sides of another clip, each place as its nearest."""
    sides = other_BCTHW.shape[3:]
    if x_BCTHW.shape[3:] == sides:
        return x_BCTHW
    return as_clip(F.interpolate(as_frames(x_BCTHW), sides, mode="nearest"), x_BCTHW.shape[2])


def _norm(chans: int) -> nn.GroupNorm:
    # Two channels a group at least: of one alone, a map of one place would be all that is normalised.
    return nn.GroupNorm(math.gcd(chans // 2, 8), chans)


def _heads(chans: int) -> int:
    return max(chans // HEAD, 1) if chans % HEAD == 0 else 1


def _zero(layer: L) -> L:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
