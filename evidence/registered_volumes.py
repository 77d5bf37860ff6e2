"""BM-MAE on registered volumes, pre-trained and judged by what it guesses of missing ones.

As in the paper, every modality has mean 0 and variance 1, over the volumes that pre-train.
Shapes: N samples, M modalities, D H W voxels.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

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
from lightspan.optim.muon import Muon
from lightspan.optim.schedules import WarmupCosine

PATCH, WIDTH, HEADS, BATCH = (4, 4, 4), 96, 4, 16


class FirstSeen(MaskSampler):
    """Shows the first modality, and hides all others."""

    def draw(self, grid: tuple[int, ...], step: int, indices: Sequence[int], view: int = 0) -> np.ndarray:
        hidden = np.ones((len(indices), *grid), dtype=bool)
        hidden[:, 0] = False
        return hidden


class Pretrained(NamedTuple):
    """A model in evaluation mode, and the mean and deviation of each modality [M 1 1 1]."""

    model: BMMAE
    mean: Tensor
    deviation: Tensor

    def guess(self, volumes: Tensor) -> Tensor:
        """All modalities but the first, [N M - 1 D H W], guessed from the first."""
        present = torch.tensor([[True] + [False] * (volumes.shape[1] - 1)]).expand(len(volumes), -1)
        guess = self.model.synthesise((volumes - self.mean) / self.deviation, present)
        return (guess * self.deviation + self.mean)[:, 1:]


def pretrained(
    volumes: Tensor, seed: int, rate: float, steps: int, depth: int, masks: MaskSampler | None = None
) -> Pretrained:
    """With steps=0 untrained."""
    seed_everything(seed, verbose=False)
    deviation, mean = torch.std_mean(volumes, dim=(0, 2, 3, 4), keepdim=True)
    model = BMMAE(
        ModalityViT(PATCH, volumes.shape[1], WIDTH, depth, HEADS),
        ModalityDecoder(WIDTH, WIDTH // 2, 2, HEADS, dropout=0.0),
        masks,
        optimizer=partial(Muon, lr=rate),
        lr_scheduler=partial(WarmupCosine, warmup=0.05, final=0.0),
    )
    if steps:
        standard, generator = (volumes - mean) / deviation, np.random.default_rng(seed)
        rows = [generator.choice(len(volumes), min(BATCH, len(volumes)), replace=False) for _ in range(steps)]
        batches = DataLoader(
            rows, batch_size=None, collate_fn=lambda row: {"volume": standard[row], "index": torch.from_numpy(row)}
        )
        quiet_trainer(max_steps=steps, gradient_clip_val=3.0).fit(model, batches)
    return Pretrained(model.eval(), mean[0], deviation[0])


def psnr(guess: Tensor, truth: Tensor) -> float:
    """Of intensities in [0, 1], in dB."""
    return -10 * float((guess - truth).square().mean().log10())
