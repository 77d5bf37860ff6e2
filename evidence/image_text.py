"""What the evidence on CLIP and PRE shares: scenes as tensors, a small CLIP, and training."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightspan.backbones.dual_encoder import DualEncoder
from lightspan.backbones.text import TextTransformer
from lightspan.backbones.tokenizers import HashedWords
from lightspan.backbones.vision import SmallConvNet
from lightspan.datamodules.text.tokenized import tokenized
from lightspan.methods.image_text.clip import CLIP
from lightspan.optim.schedules import WarmupCosine

LENGTH, BATCH = 24, 128
WORDS = HashedWords()


class Pairs(NamedTuple):
    """Images [N C H W], about standardised, tokens and mask [N T], and labels [N]."""

    images: Tensor
    tokens: Tensor
    mask: Tensor
    labels: Tensor

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        return {
            "image": self.images[rows],
            "tokens": self.tokens[rows],
            "mask": self.mask[rows],
            "label": self.labels[rows],
        }


def pairs(images: np.ndarray, captions: Sequence[str], labels: np.ndarray) -> Pairs:
    tokens, mask = (torch.from_numpy(array) for array in tokenized(WORDS, captions, LENGTH))
    return Pairs((torch.from_numpy(images).float() / 255 - 0.25) / 0.25, tokens, mask, torch.from_numpy(labels))


def clip(seed: int, rate: float, channels: int = 3, stages: int = 4) -> CLIP:
    torch.manual_seed(seed)
    image = SmallConvNet(channels, 16, stages)
    encoders = DualEncoder(image, TextTransformer(8192, 64, 2, 4, LENGTH), width=64)
    optimizer = partial(torch.optim.AdamW, lr=rate, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6)
    return quiet(CLIP(encoders, optimizer=optimizer))


def quiet(method: Any) -> Any:
    method.log_training = lambda figures, **options: None
    return method


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Epochs, each in an order of its own, without their last incomplete batch."""
    generator, at, order = np.random.default_rng(seed), count, np.arange(count)
    for _ in range(steps):
        if at + size > count:
            at, order = 0, generator.permutation(count)
        yield torch.from_numpy(order[at : at + size])
        at += size


def train(method: Any, given: Pairs, seed: int, steps: int, size: int = BATCH) -> None:
    optimizer = method.groups.optimizer(method, method.optimizer)
    schedule = WarmupCosine(optimizer, steps, final=0.0)
    method.train()
    for step, rows in enumerate(batches(len(given.labels), size, steps, seed)):
        optimizer.zero_grad()
        method.training_step(given.batch(rows), step).backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            method.after_optimizer_step()
    method.eval()


@torch.no_grad()
def image_rows(encoders: nn.Module, given: Pairs) -> Tensor:
    return torch.cat([encoders.encode_image(part) for part in given.images.split(256)])  # type: ignore[operator]


@torch.no_grad()
def text_rows(encoders: nn.Module, given: Pairs) -> Tensor:
    parts = zip(given.tokens.split(256), given.mask.split(256), strict=True)
    return torch.cat([encoders.encode_text(*part) for part in parts])  # type: ignore[operator]
