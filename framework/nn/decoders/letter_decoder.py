"""A decoder of words that learns to guess letters in any order from a memory of tokens, be they of a picture or a text.

Source: Bautista and Atienza, "Scene Text Recognition with Permuted Autoregressive Sequence Models" (PARSeq), ECCV 2022,
arXiv 2207.06966, section 3, and the authors' code.
A word is a row of T numbers: 1 to V for its letters, 0 behind its end. It has S = T + 1 places: place i < T is that of
letter i, and any place may be that of its end. An order is a permutation of places: the decoder guesses a place from
those letters that come before it in the order.
Shapes: B words, T letters, S places, M tokens of memory, w width, V letters of the alphabet, K orders.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.layers import Mlp
from torch import Tensor, nn

from lightspan.core.batches import range_on_host, require_fields, require_rows
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.nn.sequences.attention import MultiHeadAttention


@dataclass(frozen=True)
class LetterOrders:
    """Draws the orders in which letters are guessed, anew in each step, the same on all ranks.

    Args:
        count: of a step: 1 for left to right alone, or an even number, since each order comes with its mirror.
        seed: >= 0.
    """

    count: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count != 1 and (self.count < 2 or self.count % 2):
            raise UserError(
                f"LetterOrders count={self.count} must be 1, for left to right alone, or even, since each order comes "
                "with its mirror"
            )
        require_in("[0, inf)", seed=self.seed)

    def draw(self, letters: int, step: int) -> np.ndarray:
        """int64 [K S]: from left to right, from right to left, then pairs of a random order and its mirror, none twice.

        The end comes last in each order but the second, where it comes first. K is `count`, or as many as there are.

        Args:
            letters: T, at least 1.
        """
        generator = np.random.default_rng((self.seed, step))
        first, pairs = tuple(range(letters)), min(self.count // 2, math.factorial(letters) // 2)
        drawn = {first: None}
        while len(drawn) < pairs:
            order = tuple(generator.permutation(letters).tolist())
            if order[::-1] not in drawn:
                drawn[order] = None
        both = [one for order in drawn for one in (order, order[::-1])] if pairs else [first]
        orders = [[*order, letters] for order in both]
        if pairs:
            orders[1] = [letters, *both[1]]
        return np.asarray(orders, dtype=np.int64)


def seen_in_order(order_S: Tensor) -> tuple[Tensor, Tensor]:
    """bool [S S] each, True where a row may look at a column: what the guess of a place sees, and what a letter sees.

    Columns are the start and the T letters. A guess sees letters before its place, a letter also itself; rows of the
    second are the start and the letters too.
    """
    rank_S = order_S.argsort()
    letters_T = rank_S[:-1]
    start_S1 = torch.ones_like(rank_S, dtype=torch.bool)[:, None]
    guess_SS = torch.cat([start_S1, letters_T < rank_S[:, None]], dim=1)
    letter_TS = torch.cat([start_S1[1:], letters_T <= letters_T[:, None]], dim=1)
    first_1S = torch.arange(len(rank_S), device=rank_S.device)[None] == 0
    return guess_SS, torch.cat([first_1S, letter_TS])


class LetterBlock(nn.Module):
    """Guesses and letters look at letters, then at the memory, then pass an MLP; LayerNorm comes first. Both have the
    same weights but for the first norm.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.norm_guess, self.norm_letter, self.norm_memory, self.norm_mlp = (nn.LayerNorm(width) for _ in range(4))
        self.own, self.cross = (MultiHeadAttention(width, heads, dropout=dropout) for _ in range(2))
        self.mlp = Mlp(width, int(mlp_ratio * width), drop=(dropout, 0.0))
        self.drop = nn.Dropout(dropout)

    def forward(
        self, guess_BSw: Tensor, letter_BSw: Tensor, memory_BMw: Tensor, guess_seen: Tensor, letter_seen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Guesses and letters, each after what they have seen; without `letter_seen` letters stay as they are."""
        normed_BSw = self.norm_letter(letter_BSw)
        seen_BSw = self._stream(guess_BSw, self.norm_guess(guess_BSw), normed_BSw, memory_BMw, guess_seen)
        if letter_seen is None:
            return seen_BSw, letter_BSw
        return seen_BSw, self._stream(letter_BSw, normed_BSw, normed_BSw, memory_BMw, letter_seen)

    def _stream(
        self, x_BSw: Tensor, normed_BSw: Tensor, letter_BSw: Tensor, memory_BMw: Tensor, seen: Tensor
    ) -> Tensor:
        x_BSw = x_BSw + self.drop(self.own(normed_BSw, letter_BSw, letter_BSw, seen))
        x_BSw = x_BSw + self.drop(self.cross(self.norm_memory(x_BSw), memory_BMw, memory_BMw))
        return x_BSw + self.drop(self.mlp(self.norm_mlp(x_BSw)))


class LetterDecoder(nn.Module):
    """Logits of the letter at each place, from a memory and from letters that are known.

    Args:
        letters: V, of the alphabet.
        length: the longest word that it reads, in letters.
        width: w, that of the memory too, a multiple of `heads`.
        depth, heads: blocks, and heads of each. DPTR has 6 blocks of 8 heads.
        mlp_ratio: width of the MLPs by w.
        dropout: of attention weights, branches and inputs, in [0, 1).
    Raises: UserError for sizes that do not fit.
    """

    def __init__(
        self,
        letters: int = 26,
        length: int = 25,
        width: int = 512,
        depth: int = 6,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        require_in("[1, inf)", letters=letters, length=length, depth=depth)
        self.letters, self.length, self.in_features = letters, length, width
        self.embed = nn.Embedding(letters + 1, width)  # 0 is the start
        self.pos_embed = nn.Parameter(torch.empty(length + 1, width))
        self.blocks = nn.ModuleList(LetterBlock(width, heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm, self.head, self.drop = nn.LayerNorm(width), nn.Linear(width, letters + 1), nn.Dropout(dropout)
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(part.weight, std=0.02)
            if isinstance(part, nn.Linear):
                nn.init.zeros_(part.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, memory_BMw: Tensor, letters_BT: Tensor, order_S: Tensor) -> Tensor:
        """Logits [B S V+1] of every place, each from the letters before it in the order; letter 0 is the end."""
        return self._guess(memory_BMw, letters_BT, *seen_in_order(order_S))

    def in_orders(self, memory_BMw: Tensor, letters_BT: Tensor, orders: LetterOrders, step: int) -> Tensor:
        """Logits [K B S V+1] in each of a step's orders."""
        orders_KS = torch.from_numpy(orders.draw(letters_BT.shape[1], step)).to(letters_BT.device)
        return torch.stack([self(memory_BMw, letters_BT, order_S) for order_S in orders_KS])

    @torch.no_grad()
    def read(self, memory_BMw: Tensor, refinements: int = 1) -> Tensor:
        """The likeliest letters, int64 [B length], from left to right, then each anew from all others.

        Args:
            refinements: how often, at least 0.
        """
        B, S, device = len(memory_BMw), self.length + 1, memory_BMw.device
        letters_BT = torch.zeros(B, self.length, dtype=torch.int64, device=device)
        forward, open_B = torch.arange(S, device=device), torch.ones(B, dtype=torch.bool, device=device)
        for place in range(self.length):
            found_B = self(memory_BMw, letters_BT, forward)[:, place].argmax(dim=1)
            open_B = open_B & (found_B > 0)
            letters_BT[:, place] = found_B * open_B
        every_SS = torch.ones(S, S, dtype=torch.bool, device=device)
        others_SS = ~every_SS.triu(1).tril(1)  # letter i is in column i + 1
        for _ in range(refinements):
            found_BT = self._guess(memory_BMw, letters_BT, others_SS, every_SS)[:, :-1].argmax(dim=2)
            letters_BT = found_BT * (found_BT > 0).cumprod(dim=1)
        return letters_BT

    def _guess(self, memory_BMw: Tensor, letters_BT: Tensor, guess_SS: Tensor, letter_SS: Tensor) -> Tensor:
        places_Sw = self.pos_embed[: letters_BT.shape[1] + 1].to(memory_BMw.dtype)
        scale = places_Sw.shape[1] ** 0.5
        start_B1w = scale * self.embed(torch.zeros_like(letters_BT[:, :1]))
        letter_BSw = torch.cat([start_B1w, places_Sw[:-1] + scale * self.embed(letters_BT)], dim=1)
        guess_BSw, letter_BSw = self.drop(places_Sw.expand(len(letters_BT), -1, -1)), self.drop(letter_BSw)
        known_BS = torch.cat([torch.ones_like(letters_BT[:, :1], dtype=torch.bool), letters_BT > 0], dim=1)
        guess_seen, letter_seen = (seen_SS & known_BS[:, None, None] for seen_SS in (guess_SS, letter_SS))
        for number, block in enumerate(self.blocks):
            last = number + 1 == len(self.blocks)  # after which nothing reads the letters
            guess_BSw, letter_BSw = block(guess_BSw, letter_BSw, memory_BMw, guess_seen, None if last else letter_seen)
        return self.head(self.norm(guess_BSw))


def letters_of(batch: Mapping[str, Any], decoder: LetterDecoder, method: str) -> Tensor:
    """`characters` of a batch, int64 [B T].

    Args:
        method: its name, for messages.
    Raises: UserError for a batch without them, for words with more places than the decoder has, and on the host for
        numbers that are no letters of its alphabet; to ask an accelerator would wait for it.
    """
    require_fields(batch, method)
    letters_BT = batch.get("characters")
    if not isinstance(letters_BT, Tensor) or letters_BT.ndim != 2 or letters_BT.dtype != torch.int64:
        raise UserError(
            f"{method} reads the letters of words as characters, int64 [B, T], and this batch holds "
            f"{', '.join(sorted(batch))}; take data such as lightspan.datamodules.shards.words.WordShards, which reads "
            "pictures of words of your own, or lightspan.datamodules.rendered.words.PrintedWords"
        )
    if letters_BT.shape[1] > decoder.length:
        raise UserError(
            f"words of up to {letters_BT.shape[1]} letters are longer than the decoder's length={decoder.length}; set "
            "data.init_args.longest to that, or raise the length"
        )
    ends = range_on_host(letters_BT)
    if ends is not None and (ends[0] < 0 or ends[1] > decoder.letters):
        raise UserError(
            f"characters from {ends[0]} to {ends[1]} are outside the decoder's alphabet of letters={decoder.letters}"
            ", which are numbered from 1, with 0 behind the end of a word; give it as many as the data have"
        )
    require_rows(batch, "characters", method)
    return letters_BT
