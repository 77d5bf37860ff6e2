"""LCVD: a portrait is animated under a light of one's choice, by a diffusion model of clips with a shaded face as hint.

Source: Guo et al., "High-Fidelity Relightable Monocular Portrait Animation with Lighting-Controllable Video Diffusion
Model", CVPR 2025, arXiv 2502.19894. Who a clip shows comes from a picture of the person, the reference; pose,
expression and light come from a shaded face of the same geometry without colours, rendered for each frame
(`lightspan.datamodules.rendered.harmonic_light`). Two adapters that start at zero (`lightspan.nn.hint_encoder`) add
both to the first features of a U-Net. Beside the noisy clip the U-Net reads the reference, without its face, which can
thus come through the adapters alone. Noise, scaling and sampler are those of `lightspan.objectives.edm`, with which
L = mean w (D - clean)^2 + face_weight * the same over the face, w = 1 / c_out^2.
What is drawn is guided away from what the model draws without some of the hints: without the shading, the light is
stronger; without both, everything is.
Assumed: the reference's face is hidden by its own mask, and the mean over a face is taken in each clip.
Shapes: B clips of this rank, C channels, T frames, H W sides, h w sides of pictures, D channels of a hint, L context.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightspan.core.batches import described, require_fields
from lightspan.core.devices import wide, wide_type
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in, require_log_normal, require_weights
from lightspan.datamodules.video.batch import LitClipBatch
from lightspan.nn.frames import by_frame
from lightspan.objectives import edm
from lightspan.objectives.means import mean, weighted_sum
from lightspan.training.method import Method

Hint = Literal["shading", "reference"]
HINTS: tuple[Hint, ...] = ("shading", "reference")
VALIDATION_LEVELS, VALIDATION_SEED = 5, 0
WAY_OUT = (
    "take data whose batches are a LitClipBatch of lightspan.datamodules.video.batch, such as "
    "lightspan.datamodules.rendered.heads.LitHeads"
)


class ToldClips(NamedTuple):
    """What the network is conditioned on, for each clip. beside: the reference without its face, in each frame."""

    hint_BDTHW: Tensor
    beside_BCTHW: Tensor
    context_BL: Tensor | None


class KeptHints(NamedTuple):
    """Which conditions of each clip are kept, bool [B] each; hints [B 2], as in `HINTS`."""

    hints_B2: Tensor
    beside_B: Tensor
    context_B: Tensor


def drawn_to_keep(draws_B4: Tensor, all_kept: float, none_kept: float, hidden: float) -> KeptHints:
    """What is kept of each clip, from uniform numbers in [0, 1).

    Args:
        all_kept, none_kept: shares of clips with both hints and without any; of the others each hint is kept with a
            probability of 1/2, by itself. Together at most 1.
        hidden: share of clips without context alone, of those without the picture beside the noise alone, and of those
            without either, as in InstructPix2Pix (arXiv 2211.09800, section 3.2.1); at most 1/3.
    """
    kind_B1, own_B2, still_B = draws_B4[:, :1], draws_B4[:, 1:3], draws_B4[:, 3]
    hints_B2 = (kind_B1 < all_kept) | ((own_B2 < 0.5) & (kind_B1 >= all_kept + none_kept))
    return KeptHints(hints_B2, (still_B < hidden) | (still_B >= 3 * hidden), still_B >= 2 * hidden)


def face_loss(output: Tensor, target: Tensor, face_BTHW: Tensor) -> Tensor:
    """The mean over clips, of all ranks, of the mean of (F - target)^2 within the face: a scalar in float32 or wider; a
    clip without a face counts as 0.
    """
    own_B1THW = face_BTHW.bool()[:, None]
    error = (wide(output) - wide(target)).square().where(own_B1THW, 0)
    entries_B = own_B1THW.flatten(1).sum(dim=1).clamp_min(1) * output.shape[1]
    return mean(error.flatten(1).sum(dim=1) / entries_B)


def windows(frames: int, length: int, overlap: int) -> list[list[int]]:
    """The frames of each window of a long clip: the first frame of all, which all windows share, and then consecutive
    ones, `overlap` of them shared with the window before. The last window ends with the clip.

    Args:
        length: of a window, above `overlap` + 1. A clip that is no longer is one window.
    """
    if frames <= length:
        return [[*range(frames)]]
    own = length - 1
    starts = [*range(1, frames - own, own - overlap), frames - own]
    return [[0, *range(start, start + own)] for start in starts]


def blend_weights(length: int) -> Tensor:
    """Of the frames of a window, float64 [length]: highest in its middle, falling evenly to both ends, above 0."""
    place = torch.arange(length, dtype=torch.float64)
    return torch.minimum(place + 1, length - place)


class LCVD(Method):
    """Trains `backbone` and both adapters; batches are `LitClipBatch`.

    Args:
        backbone: noisy clip with the reference beside it [B 2C T H W], level [B], what is added to its first features
            [B D T H W], and context [B L] or None -> [B C T H W], with the attributes `hint_chans`, D, and `context`,
            L, such as `lightspan.backbones.video_unet.VideoUNet`. Batches of one with a context have an `embedding`.
        shading, reference: pictures -> what is added of each, with the sides of the first features, such as
            `lightspan.nn.hint_encoder.HintEncoder`.
        level_mean, level_std: of the logarithm of the noise's standard deviation sigma, in training.
        reference_level_mean, reference_level_std: of that of the noise in the reference beside it.
        face_weight: of the loss within the face, at least 0.
        all_kept, none_kept, hidden: see `drawn_to_keep`.
        least_sigma, most_sigma: between which clips are drawn, above 0.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    Raises: UserError for settings outside of these, or adapters whose channels are not those of the first features.
    """

    features = None  # type: ignore[assignment]  # its backbone gives noise, not [B, D]
    batch_type = LitClipBatch

    def __init__(
        self,
        backbone: nn.Module,
        shading: nn.Module,
        reference: nn.Module,
        level_mean: float = 0.7,
        level_std: float = 1.6,
        reference_level_mean: float = -3.0,
        reference_level_std: float = 0.5,
        face_weight: float = 1.0,
        all_kept: float = 0.1,
        none_kept: float = 0.1,
        hidden: float = 0.05,
        least_sigma: float = 0.002,
        most_sigma: float = 700.0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_log_normal(level_mean=level_mean, level_std=level_std)
        require_log_normal(reference_level_mean=reference_level_mean, reference_level_std=reference_level_std)
        require_weights(face_weight=face_weight)
        require_in("[0, 1]", all_kept=all_kept, none_kept=none_kept, **{"all_kept + none_kept": all_kept + none_kept})
        require_in("[0, 0.3333333333333333]", hidden=hidden)
        require_in("(0, inf)", most_sigma=most_sigma)
        require_in(f"(0, {most_sigma}]", least_sigma=least_sigma)
        width: Any = getattr(backbone, "hint_chans", None)
        if width is None:
            raise UserError(
                f"LCVD backbone={type(backbone).__name__} must say in hint_chans how many channels its first features "
                "have, as lightspan.backbones.video_unet.VideoUNet does"
            )
        for name, adapter in (("shading", shading), ("reference", reference)):
            given = getattr(adapter, "out_chans", width)
            if given != width:
                raise UserError(
                    f"LCVD {name} gives {given} channels, and the first features of its backbone have {width}; set "
                    f"model.init_args.{name}.init_args.out_chans={width}"
                )
        self.backbone, self.adapters = backbone, nn.ModuleDict({"shading": shading, "reference": reference})
        self.context: int = getattr(backbone, "context", 0)
        self.levels = level_mean, level_std
        self.reference_levels = reference_level_mean, reference_level_std
        self.weights = {"clip": 1.0, "face": face_weight}
        self.shares = all_kept, none_kept, hidden
        self.sigmas = least_sigma, most_sigma

    def told(self, batch: Mapping[str, Any], kept: KeptHints, noise_BCHW: Tensor | None = None) -> ToldClips:
        """What the network is told of the clips of a batch.

        Args:
            noise_BCHW: added to the reference beside the noisy clip; None adds none.
        """
        given = self._given(batch)
        frames = batch["clip"].shape[2]
        shown_BDTHW = by_frame(self.adapters["shading"], given["shading"])
        known_BDHW = self.adapters["reference"](given["portrait"])
        for name, hint in (("shading", shown_BDTHW), ("reference", known_BDHW)):
            _require_sides(name, hint, batch["clip"])
        shading_B, reference_B = (keep.view(-1, 1, 1, 1, 1) for keep in kept.hints_B2.unbind(1))
        # Products, so that an adapter that no clip of a batch needs has gradients of 0, not none.
        hint_BDTHW = shown_BDTHW * shading_B + known_BDHW[:, :, None] * reference_B
        beside_BCHW = given["reference"] if noise_BCHW is None else given["reference"] + noise_BCHW
        shown_B1HW = ~given["reference_face"].bool()[:, None] & kept.beside_B.view(-1, 1, 1, 1)
        beside_BCTHW = beside_BCHW.where(shown_B1HW, 0)[:, :, None].expand(-1, -1, frames, -1, -1)
        context_BL = given["embedding"] * kept.context_B[:, None] if self.context else None
        return ToldClips(hint_BDTHW, beside_BCTHW, context_BL)

    def predict(self, noisy_BCTHW: Tensor, sigma_B: Tensor, told: ToldClips) -> Tensor:
        """F [B C T H W]."""
        scale = edm.scales(sigma_B, noisy_BCTHW)
        scaled_BCTHW = (scale.into * noisy_BCTHW).to(told.beside_BCTHW.dtype)
        read = torch.cat([scaled_BCTHW, told.beside_BCTHW], dim=1)
        return self.backbone(read, scale.level_B, told.hint_BDTHW, told.context_BL)

    def losses(
        self, batch: Mapping[str, Any], sigma_B: Tensor, noise_BCTHW: Tensor, told: ToldClips
    ) -> dict[str, Tensor]:
        """`clip`, the mean over all entries, and `face`, over the face, scalars. Every rank must call it."""
        clip_BCTHW = batch["clip"]
        output = self.predict(edm.with_noise(clip_BCTHW, noise_BCTHW, sigma_B), sigma_B, told)
        return {
            "clip": edm.denoising_loss(output, clip_BCTHW, noise_BCTHW, sigma_B),
            "face": face_loss(output, edm.target(clip_BCTHW, noise_BCTHW, sigma_B), batch["face"]),
        }

    def training_step(self, batch: LitClipBatch, batch_idx: int) -> Tensor:
        clip_BCTHW = _clip_of(batch)
        rows, device = len(clip_BCTHW), clip_BCTHW.device
        # Drawn from torch's CPU generator on every device: a resumed run then draws the same.
        mean_level, std_level = self.levels
        sigma_B = (mean_level + std_level * torch.randn(rows)).exp()
        noise_BCTHW = torch.randn(clip_BCTHW.shape).to(clip_BCTHW)
        mean_level, std_level = self.reference_levels
        grain_B111 = (mean_level + std_level * torch.randn(rows, 1, 1, 1)).exp()
        grain_BCHW = grain_B111 * torch.randn(clip_BCTHW[:, :, 0].shape)
        kept = KeptHints(*(keep.to(device) for keep in drawn_to_keep(torch.rand(rows, 4), *self.shares)))
        told = self.told(batch, kept, grain_BCHW.to(clip_BCTHW))
        losses = self.losses(batch, sigma_B.to(device), noise_BCTHW, told)
        loss = weighted_sum(losses, self.weights)
        self.log_training({"train/loss": loss}, prog_bar=True)
        self.log_training({f"train/{name}": value for name, value in losses.items()})
        return loss

    def validation_step(self, batch: LitClipBatch, batch_idx: int) -> None:
        clip_BCTHW = _clip_of(batch)
        loss = self.held_out_loss(batch, batch_idx)
        self.log("val/loss", loss, batch_size=len(clip_BCTHW), sync_dist=True)

    def held_out_loss(self, batch: Mapping[str, Any], batch_idx: int, without: Sequence[Hint] = ()) -> Tensor:
        """Mean loss at five levels of equal probability, with noise that is the same in every call for the same
        `batch_idx`, and told everything but the hints in `without`.
        """
        clip_BCTHW = _clip_of(batch)
        generator = torch.Generator().manual_seed(VALIDATION_SEED + batch_idx)
        share = (torch.arange(VALIDATION_LEVELS) + 0.5) / VALIDATION_LEVELS
        mean_level, std_level = self.levels
        told, found = self.told(batch, self.all_but(without, clip_BCTHW)), []
        for sigma in (mean_level + std_level * torch.special.ndtri(share)).exp():
            noise_BCTHW = torch.randn(clip_BCTHW.shape, generator=generator).to(clip_BCTHW)
            sigma_B = sigma.to(clip_BCTHW.device).expand(len(clip_BCTHW))
            found.append(weighted_sum(self.losses(batch, sigma_B, noise_BCTHW, told), self.weights))
        return torch.stack(found).mean()

    def all_but(self, without: Sequence[Hint], clip_BCTHW: Tensor) -> KeptHints:
        """Everything but some hints. Raises: UserError for a name that is no hint."""
        if unknown := [name for name in without if name not in HINTS]:
            raise UserError(f"without={[*without]} names {unknown[0]}, which is none of the hints {', '.join(HINTS)}")
        rows = torch.ones(len(clip_BCTHW), dtype=torch.bool, device=clip_BCTHW.device)
        hints_B2 = torch.stack([rows & (name not in without) for name in HINTS], dim=1)
        return KeptHints(hints_B2, rows, rows)

    @torch.no_grad()
    def sample(
        self,
        batch: Mapping[str, Any],
        steps: int = 25,
        guidance: float = 4.5,
        without: Sequence[Hint] = ("shading",),
        seed: int = 0,
        window: int = 16,
        overlap: int = 6,
    ) -> Tensor:
        """Clips [B C T H W] of the persons, poses and lights of a batch, standardised as those of training, in float32
        or wider. Of its `clip` the shape alone is read.

        Each step denoises every window of a clip, and takes the mean where they overlap, by `blend_weights`.

        Args:
            steps: at least 1.
            guidance: how many times as far from what is drawn without some hints: D = D_un + g (D_all - D_un). 1 leaves
                what is drawn with all of them, 0 is without.
            without: hints that D_un lacks: "shading" makes the light stronger, both make everything stronger.
            seed: of the noise, which the CPU draws.
            window: frames that the network sees at a time, at least 2.
            overlap: frames that a window shares with the one before besides the first of all, in [0, window - 2].
        Raises: UserError for numbers outside of these.
        """
        require_in("[2, inf)", window=window)
        require_in(f"[0, {window - 2}]", overlap=overlap)
        clip_BCTHW = _clip_of(batch)
        device, frames = clip_BCTHW.device, clip_BCTHW.shape[2]
        seen = next((p.dtype for p in self.backbone.parameters() if p.is_floating_point()), torch.float32)
        sigmas = edm.falling_sigmas(steps, *self.sigmas).tolist()
        noise_BCTHW = torch.randn(clip_BCTHW.shape, generator=torch.Generator().manual_seed(seed))
        x_BCTHW = sigmas[0] * noise_BCTHW.to(device, wide_type(seen))
        fields = {name: x for name, x in batch.items() if isinstance(x, Tensor)}
        given = {name: x.to(seen) if x.is_floating_point() else x for name, x in fields.items()}
        told = self.told(given, self.all_but((), clip_BCTHW))
        fewer = self.told(given, self.all_but(without, clip_BCTHW)) if guidance != 1 else told
        parts = windows(frames, window, overlap)
        for sigma, following in pairwise(sigmas):
            total_BCTHW, weight_T = torch.zeros_like(x_BCTHW), x_BCTHW.new_zeros(frames)
            for part in parts:
                clean = self._denoised(x_BCTHW, sigma, told, part)
                if guidance != 1:
                    plain = self._denoised(x_BCTHW, sigma, fewer, part)
                    clean = plain + guidance * (clean - plain)
                own_T = blend_weights(len(part)).to(weight_T)
                total_BCTHW[:, :, part] += own_T[:, None, None] * clean
                weight_T[part] += own_T
            x_BCTHW = edm.euler_step(x_BCTHW, total_BCTHW / weight_T[:, None, None], sigma, following)
        return x_BCTHW

    def _denoised(self, x_BCTHW: Tensor, sigma: float, told: ToldClips, part: list[int]) -> Tensor:
        """D of some frames."""
        noisy = x_BCTHW[:, :, part]
        sigma_B = noisy.new_full((len(noisy),), sigma)
        own = ToldClips(told.hint_BDTHW[:, :, part], told.beside_BCTHW[:, :, part], told.context_BL)
        return edm.denoised(self.predict(noisy, sigma_B, own).to(noisy.dtype), noisy, sigma_B)

    def _given(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The fields of a `LitClipBatch` that are told. Raises: UserError for one that is missing or does not fit."""
        B, C, T, H, W = _clip_of(batch).shape
        colours = {name: getattr(adapter, "in_chans", None) for name, adapter in self.adapters.items()}
        wanted: dict[str, tuple[tuple[int | None, ...], bool]] = {
            "reference": ((B, C, H, W), True),
            "reference_face": ((B, H, W), False),
            "face": ((B, T, H, W), False),
            "portrait": ((B, colours["reference"], None, None), True),
            "shading": ((B, colours["shading"], T, None, None), True),
            **({"embedding": ((B, self.context), True)} if self.context else {}),
        }
        for name, (sides, floats) in wanted.items():
            x = batch.get(name)
            fits = isinstance(x, Tensor) and x.ndim == len(sides) and x.is_floating_point() == floats
            if not fits or any(side not in (None, size) for side, size in zip(sides, x.shape, strict=True)):  # type: ignore[union-attr]
                shape = ", ".join("any" if side is None else str(side) for side in sides)
                raise UserError(
                    f"LCVD needs {name} as {'floats' if floats else 'whole numbers'} [{shape}], and this batch "
                    f"{'has none' if x is None else f'gives {described(x)}'}; {WAY_OUT}"
                )
        return {name: batch[name] for name in wanted}


def _require_sides(name: str, hint: Tensor, clip_BCTHW: Tensor) -> None:
    sides, wanted = [*hint.shape[-2:]], [*clip_BCTHW.shape[-2:]]
    if sides != wanted:
        raise UserError(
            f"LCVD {name} gives a map of {sides} pixels, and clips have {wanted}; set model.init_args.{name}.init_args."
            "halvings, or give pictures of another size"
        )


def _clip_of(batch: Mapping[str, Any]) -> Tensor:
    """[B C T H W]. Raises: UserError for a batch without clips."""
    require_fields(batch, "LCVD")
    clip = batch.get("clip")
    if not isinstance(clip, Tensor) or clip.ndim != 5 or not clip.is_floating_point():
        found = "has none" if clip is None else f"gives {described(clip)}"
        raise UserError(f"LCVD needs a clip as floats [B, C, T, H, W], and this batch {found}; {WAY_OUT}")
    return clip
