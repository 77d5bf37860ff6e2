"""The sizes at which one encoder is to work: its first layers, and of what they give the first coordinates.

Source: Zhuang et al., "Starbucks: Improved Training for 2D Matryoshka Embeddings", 2024, arXiv 2410.13230, section 3:
a fixed short list of (layer, width) pairs; and Li et al., "2D Matryoshka Sentence Embeddings" (2DMSE), 2024, arXiv
2402.14776, section 3, which draws them. Shapes: B texts, T tokens, K layers, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.nn.heads.pooling import masked_mean

Pooling = Literal["cls", "mean"]


class NestedSize(NamedTuple):
    """layer: how many blocks are kept, from 1. width: how many of the first coordinates, from 1."""

    layer: int
    width: int

    def __str__(self) -> str:
        return f"{self.layer}x{self.width}"


class NestedSizes(ABC):
    """What a step trains, and what validation looks at.

    Args:
        pairs: (layer, width), from the smallest to the whole network. No size may be smaller than the one before in
            either number.
    Raises: UserError for another list.
    """

    def __init__(self, pairs: list[tuple[int, int]]) -> None:
        self.listed = tuple(NestedSize(*pair) for pair in pairs)
        if not self.listed or min(map(min, self.listed)) < 1:
            raise UserError(f"pairs={pairs} must name at least one (layer, width), both numbers at least 1")
        for before, after in zip(self.listed, self.listed[1:], strict=False):
            if after == before or after.layer < before.layer or after.width < before.width:
                raise UserError(
                    f"pairs={[*map(tuple, self.listed)]} must grow: {tuple(after)} comes after {tuple(before)}, and "
                    "neither of its numbers may be smaller, nor both equal"
                )

    @property
    def full(self) -> NestedSize:
        return self.listed[-1]

    @abstractmethod
    def of_step(self, step: int) -> tuple[NestedSize, ...]:
        """What this step trains; the whole network comes last."""

    def require(self, backbone: nn.Module, method: str) -> None:
        """Raises: UserError if the last pair is not the whole of a transformers encoder, or it is no such network."""
        config: Any = getattr(backbone, "config", None)
        whole = NestedSize(getattr(config, "num_hidden_layers", 0), getattr(config, "hidden_size", 0))
        two = hasattr(backbone, "encoder") and hasattr(backbone, "decoder")
        if two or not min(whole):
            raise UserError(
                f"{method} needs an encoder of transformers, whose config tells num_hidden_layers and hidden_size, not "
                f"{type(backbone).__name__}"
            )
        if beyond := [tuple(size) for size in self.listed if size.layer > whole.layer or size.width > whole.width]:
            raise UserError(
                f"{method} pairs has {beyond[0]}, beyond the {whole.layer} layers of width {whole.width} of "
                f"{type(backbone).__name__}; remove it, or take a larger network"
            )
        if self.full != whole:
            raise UserError(
                f"{method} pairs ends with {tuple(self.full)}, and must end with the whole network, {tuple(whole)}: "
                "all other sizes learn from it"
            )


class FixedSizes(NestedSizes):
    """All pairs in every step, as Starbucks trains them. Those of BERT-base: (2, 32), (4, 64), (6, 128), (8, 256),
    (10, 512), (12, 768).
    """

    def of_step(self, step: int) -> tuple[NestedSize, ...]:
        return self.listed


class RandomSizes(NestedSizes):
    """2DMSE, the baseline of Starbucks: in each step one layer n below the last, one width d of the pairs below the
    whole one, and the four sizes (n, d), (n, D), (N, d), (N, D) of these. The pairs are what validation looks at.

    Args:
        pairs: as in `NestedSizes`.
        seed: of the draws, which are functions of it and the step; >= 0.
    Raises: UserError for pairs without a second layer or a second width.
    """

    def __init__(self, pairs: list[tuple[int, int]], seed: int = 0) -> None:
        super().__init__(pairs)
        self.widths = sorted({size.width for size in self.listed} - {self.full.width})
        if self.full.layer < 2 or not self.widths or seed < 0:
            raise UserError(
                f"RandomSizes pairs={[*map(tuple, self.listed)]} and seed={seed}: draws need two layers, two widths "
                "and a seed of at least 0"
            )
        self.seed = seed

    def of_step(self, step: int) -> tuple[NestedSize, ...]:
        generator = np.random.default_rng((self.seed, step))
        layer, width = int(generator.integers(1, self.full.layer)), int(generator.choice(self.widths))
        return (
            NestedSize(layer, width),
            NestedSize(layer, self.full.width),
            NestedSize(self.full.layer, width),
            self.full,
        )


def require_positions(backbone: Any, tokens_BT: Tensor, method: str) -> None:
    """Raises: UserError for texts of more tokens than a network has positions."""
    positions = getattr(backbone.config, "max_position_embeddings", None)
    if positions is not None and tokens_BT.shape[-1] > positions:
        raise UserError(
            f"{method}: texts of {tokens_BT.shape[-1]} tokens are longer than the {positions} positions of "
            f"{type(backbone).__name__}; lower the length of the data, or take a network with more positions"
        )


def states_of(backbone: nn.Module, tokens_BT: Tensor, mask_BT: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """[B T D] of each of the layers, all from one forward pass. Layer n is what n blocks give; 0 are the embeddings."""
    states = backbone(input_ids=tokens_BT, attention_mask=mask_BT, output_hidden_states=True).hidden_states
    return [states[layer] for layer in layers]


def pooled(states_BTD: Tensor, mask_BT: Tensor, pooling: Pooling) -> Tensor:
    """One row a text, [B D]: the first token's state, or the mean over the mask."""
    return states_BTD[:, 0] if pooling == "cls" else masked_mean(states_BTD, mask_BT)


def pooled_layers(
    backbone: nn.Module, layers: Sequence[int], pooling: Pooling, tokens_BT: Tensor, mask_BT: Tensor
) -> Tensor:
    """[B K D], the pooled states of K layers."""
    states = states_of(backbone, tokens_BT, mask_BT, layers)
    return torch.stack([pooled(states_BTD, mask_BT, pooling) for states_BTD in states], dim=1)
