"""BM-MAE on registered volumes, pre-trained and judged by what it guesses of missing ones.

Shapes: N samples, M modalities, D H W voxels.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from lightning import seed_everything
from quiet import quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightspan.backbones.placed_vit import ModalityViT
from lightspan.methods.masked.bm_mae import BMMAE
from lightspan.nn.decoders.modality_decoder import ModalityDecoder
from lightspan.nn.masking.mask_samplers import MaskSampler
from lightspan.optim.schedules import WarmupCosine

PATCH, WIDTH, DEPTH, HEADS, BATCH = (4, 4, 4), 96, 4, 4, 12
STEPS, RATES = 250, (1e-3, 3e-3, 1e-2)


class FirstSeen(MaskSampler):
    """Shows the first modality, and hides all others."""

    def draw(self, grid: tuple[int, ...], step: int, indices: Sequence[int], view: int = 0) -> np.ndarray:
        hidden = np.ones((len(indices), *grid), dtype=bool)
        hidden[:, 0] = False
        return hidden


def method(rate: float, modalities: int = 3, masks: MaskSampler | None = None) -> BMMAE:
    return BMMAE(
        ModalityViT(PATCH, modalities, WIDTH, DEPTH, HEADS),
        ModalityDecoder(WIDTH, WIDTH // 2, 2, HEADS, dropout=0.0),
        masks,
        optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=0.05),
        lr_scheduler=partial(WarmupCosine, warmup=0.05, final=0.0),
    )


def chosen_rows(count: int, steps: int, seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.choice(count, min(BATCH, count), replace=False) for _ in range(steps)]


def pretrained(volumes: Tensor, seed: int, rate: float, steps: int, masks: MaskSampler | None = None) -> BMMAE:
    """In evaluation mode; with steps=0 untrained."""
    seed_everything(seed, verbose=False)
    model = method(rate, volumes.shape[1], masks)
    if steps:
        rows = chosen_rows(len(volumes), steps, seed)
        batches = DataLoader(
            rows, batch_size=None, collate_fn=lambda row: {"volume": volumes[row], "index": torch.from_numpy(row)}
        )
        quiet_trainer(max_steps=steps, gradient_clip_val=3.0).fit(model, batches)
    return model.eval()


def psnr(guess: Tensor, truth: Tensor) -> float:
    """Of intensities in [0, 1], in dB."""
    return -10 * float((guess - truth).square().mean().log10())


def synthesised(model: BMMAE, volumes: Tensor) -> float:
    """PSNR of all modalities but the first, guessed from the first."""
    present = torch.tensor([[True] + [False] * (volumes.shape[1] - 1)]).expand(len(volumes), -1)
    return psnr(model.synthesise(volumes, present)[:, 1:], volumes[:, 1:])
