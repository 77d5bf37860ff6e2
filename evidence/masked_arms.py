"""What the evidence on masked modelling shares: arms of one encoder, training, and frozen patches."""

from collections.abc import Callable
from functools import partial

import torch
from lightning import LightningDataModule, seed_everything
from quiet import quiet_trainer
from torch import Tensor

from lightspan.backbones.vit import TokenViT, vit
from lightspan.methods.masked.cae import CAE
from lightspan.methods.masked.i_jepa import IJEPA
from lightspan.methods.masked.mae import MAE
from lightspan.nn.clustering.patch_codes import PatchCodes
from lightspan.nn.decoders.latent_regressor import LatentDecoder, LatentRegressor
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.masking.block_masks import BlockMasks
from lightspan.nn.masking.multi_block import MultiBlock
from lightspan.optim.schedules import WarmupCosine
from lightspan.training.method import Method

WIDTH, DEPTH, HEADS, PATCH = 64, 4, 4, 4


def encoder(**settings: object) -> TokenViT:
    given = {"img_size": 28, "patch_size": PATCH, "in_chans": 1, "pool": "avg", "layer_scale": 0.1}
    return vit(WIDTH, DEPTH, HEADS, **given | settings)  # type: ignore[arg-type]


def optimisation(rate: float) -> dict[str, Callable]:
    """The same for all arms."""
    return {
        "optimizer": partial(torch.optim.AdamW, lr=rate, betas=(0.9, 0.95), weight_decay=0.05),
        "lr_scheduler": partial(WarmupCosine, warmup=0.05, final=0.0),
    }


def cae(rate: float, alignment: float = 2.0) -> Method:
    return CAE(
        encoder(),
        LatentRegressor(WIDTH, depth=2, heads=HEADS, drop_path=0.0),
        LatentDecoder(WIDTH, 256, depth=2, heads=HEADS, drop_path=0.0),
        PatchCodes(256, (PATCH, PATCH), channels=1),
        BlockMasks(1.0, (0.5, 0.5)),
        alignment,
        **optimisation(rate),
    )


def mae(rate: float) -> Method:
    return MAE(encoder(), MaskDecoder(WIDTH, PATCH**2, WIDTH // 2, 2, HEADS), **optimisation(rate))


def i_jepa(rate: float) -> Method:
    predictor = MaskDecoder(WIDTH, WIDTH, WIDTH // 2, 2, HEADS)
    return IJEPA(encoder(class_token=False), predictor, MultiBlock(targets=2, context_keep=0.28), **optimisation(rate))


def train(make: Callable[[], Method], data: LightningDataModule, seed: int, steps: int) -> Method:
    """A trained method, in evaluation mode; with steps=0 the untrained one."""
    seed_everything(seed, verbose=False)
    method = make()
    if steps:
        trainer = quiet_trainer(max_steps=steps, gradient_clip_val=3.0)
        trainer.fit(method, datamodule=data)
    else:
        data.setup()
    return method.eval()


@torch.no_grad()
def encoded(method: Method, batches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Tokens of patches [N T w], and labels [N]."""
    backbone: TokenViT = method.backbone  # type: ignore[assignment]
    tokens = [backbone.tokens(batch["image"])[:, backbone.num_prefix_tokens :] for batch in batches]
    return torch.cat(tokens), torch.cat([batch["label"] for batch in batches])
