"""DiT: a transformer that predicts the noise in an image from the noisy image, the noise level and the class.

Source: Peebles, Xie, "Scalable Diffusion Models with Transformers", 2022, arXiv 2212.09748, section 3.2, the variant
adaLN-Zero: level and class set shift, scale and gate of every block, and all gates start at 0. Names of published
weights are those of facebookresearch/DiT.
Shapes: B batch, C H W image, N patches, D width, K classes and one more, P numbers per patch.
"""

import math
from functools import partial, reduce

import torch
from timm.layers import Attention, Mlp, PatchEmbed, build_sincos2d_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.weights import fill, tensors_behind
from lightspan.core.distributed import register_replicated
from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath

# A recipe may name the class and the function listed here.
__all__ = ["DiT", "published_dit"]

FREQUENCIES = 128
LONGEST_PERIOD = 10_000.0  # of the slowest frequency, in units of the level: beyond the thousand levels of DDPM


def level_waves(level_B: Tensor, frequencies: int = FREQUENCIES) -> Tensor:
    """Cosines and sines of a noise level at geometrically falling frequencies, float32 [B, 2 * frequencies]."""
    falling = torch.arange(frequencies, device=level_B.device, dtype=torch.float32) / frequencies
    phase = level_B.float()[:, None] * torch.exp(-math.log(LONGEST_PERIOD) * falling)
    return torch.cat([phase.cos(), phase.sin()], dim=1)


class DiTBlock(nn.Module):
    """Attention and MLP, each between a modulated norm and a gate: x_BND, condition_BD -> x_BND. Starts as identity."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, num_heads=heads, qkv_bias=True)
        self.mlp = Mlp(width, int(width * mlp_ratio), act_layer=partial(nn.GELU, approximate="tanh"))
        self.modulation = _zero(nn.Linear(width, 6 * width))

    def forward(self, x_BND: Tensor, condition_BD: Tensor) -> Tensor:
        modulation_B1D = self.modulation(F.silu(condition_BD))[:, None]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation_B1D.chunk(6, dim=-1)
        x_BND = x_BND + gate_a * self.attn(self.norm(x_BND) * (1 + scale_a) + shift_a)
        return x_BND + gate_m * self.mlp(self.norm(x_BND) * (1 + scale_m) + shift_m)


class DiT(nn.Module):
    """Predicted noise [B C H W] of noisy images [B C H W] at levels [B], of classes int64 [B] or of no class.

    The table of positions belongs to its state: from scratch it is timm's, and published weights bring their own, which
    has the same sines and cosines in another order of channels.

    Args:
        image_size: H and W, a multiple of `patch_size`.
        in_chans: C.
        width: D, a multiple of `heads` and of 4.
        depth: blocks, >= 1.
        mlp_ratio: hidden width of the MLP over D.
        num_classes: number of classes, 0 for a network without them. Row `num_classes` of the table stands for no
            class; training draws it sometimes, so that one network predicts with and without a class.
        learned_variance: also predict how wide the step back spreads; the output is then [B 2C H W], the noise first,
            see `lightspan.objectives.diffusion.log_variance`.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int = 2,
        in_chans: int = 1,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        num_classes: int = 0,
        learned_variance: bool = False,
    ) -> None:
        super().__init__()
        if image_size % patch_size or width % heads or width % 4 or depth < 1 or num_classes < 0:
            raise UserError(
                f"DiT: patch_size={patch_size} must divide image_size={image_size}, heads={heads} and 4 must divide "
                f"width={width}, depth={depth} be at least 1 and num_classes={num_classes} at least 0"
            )
        self.patch_size, self.grid, self.num_classes = patch_size, image_size // patch_size, num_classes
        self.learned_variance, self.out_chans = learned_variance, in_chans * (1 + learned_variance)
        self.patch_embed = PatchEmbed(image_size, patch_size, in_chans, width)
        place_ND = build_sincos2d_pos_embed([self.grid, self.grid], width)
        register_replicated(self, "place_ND", place_ND)
        self.level = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        # A table as a layer over one-hot classes: adapters can use it like any other, so that a task can have its own.
        # `lightspan.optim.groups` could not see that it is a table.
        self.label = nn.Linear(num_classes + 1, width, bias=False)
        self.label.parameter_kinds = {"weight": "embeddings"}  # type: ignore[assignment]
        self.blocks = nn.ModuleList(DiTBlock(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = _zero(nn.Linear(width, 2 * width))
        self.head = _zero(nn.Linear(width, self.out_chans * patch_size**2))
        self._start()

    def _start(self) -> None:
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear) and name.startswith("blocks") and not name.endswith("modulation"):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # a view: as the linear layer that it is
        for layer in (*self.level, self.label):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The blocks, see `lightspan.nn.tokens`."""
        return list(self.blocks)

    def forward(self, noisy_BCHW: Tensor, level_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        if label_B is None:
            label_B = torch.full_like(level_B, self.num_classes, dtype=torch.int64)
        one_hot_BK = F.one_hot(label_B, self.num_classes + 1).to(noisy_BCHW.dtype)
        condition_BD = self.level(level_waves(level_B).to(noisy_BCHW.dtype)) + self.label(one_hot_BK)
        x_BND = self.patch_embed(noisy_BCHW) + self.place_ND
        for block in self.blocks:
            x_BND = block(x_BND, condition_BD)
        shift, scale = self.modulation(F.silu(condition_BD))[:, None].chunk(2, dim=-1)
        return self._image(self.head(self.norm(x_BND) * (1 + scale) + shift))

    def _image(self, patches_BNP: Tensor) -> Tensor:
        """Patches [B N P] put back in place, [B C H W]."""
        folded = patches_BNP.unflatten(2, (self.out_chans, self.patch_size, self.patch_size))
        rows = folded.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 4, 2, 5)
        return rows.flatten(4, 5).flatten(2, 3)


def published_dit(network: DiT, path: ReadPath | None = None) -> DiT:
    """Loads the weights that were published for DiT, all of them, into a network of their size.

    Args:
        network: DiT-XL/2, say, has in_chans 4, width 1152, depth 28, heads 16, num_classes 1000 and learned_variance,
            and image_size 32 for pictures of 256 pixels.
        path: safetensors file of the tensors under the names of facebookresearch/DiT; None leaves random weights.
    Raises: UserError as `lightspan.backbones.weights.with_weights`.
    """
    if path is None:
        return network
    state = {own_name(name): tensor for name, tensor in tensors_behind(path, "").items()}
    if (table := state.get("label.weight")) is not None and table.ndim == 2:
        state["label.weight"] = table.T
    if (places := state.get("place_ND")) is not None and places.ndim == 3:
        state["place_ND"] = places[0]
    for name in ("head.weight", "head.bias"):  # numbers of a patch: there by place and then channel, here the reverse
        if (rows := state.get(name)) is not None and rows.ndim and len(rows) % network.patch_size**2 == 0:
            state[name] = rows.unflatten(0, (network.patch_size**2, -1)).transpose(0, 1).flatten(0, 1)
    fill(network, state, path, "")
    return network


PUBLISHED = {
    "x_embedder.": "patch_embed.",
    "t_embedder.mlp.": "level.",
    "y_embedder.embedding_table.": "label.",
    "pos_embed": "place_ND",
    "final_layer.linear.": "head.",
    "final_layer.adaLN_modulation.1.": "modulation.",
    "adaLN_modulation.1.": "modulation.",
}
"""Parts of published names, and what they are called here, in the order of replacing them."""


def own_name(published: str) -> str:
    """What a tensor of facebookresearch/DiT is called in `DiT`."""
    return reduce(lambda name, part: name.replace(part, PUBLISHED[part]), PUBLISHED, published)


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
