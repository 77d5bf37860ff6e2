"""Networks for sequences of any kind, values or symbols: a transformer and a diagonal state-space network.

Source: pre-norm blocks as in Amos, Berant, Gupta, "Never Train from Scratch" (SPT), 2023, arXiv 2310.02980, appendix;
the state-space block (one norm, recurrence, GELU, gated linear map) as in Gu et al., "Efficiently Modeling Long
Sequences with Structured State Spaces" (S4), 2021, arXiv 2111.00396. Neither knows of rows and columns: a picture is a
sequence of pixels here.
Shapes: B sequences, L steps, C numbers of a step, D width.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_shares
from lightspan.nn.heads.pooling import masked_mean
from lightspan.nn.sequences.positions import sincos
from lightspan.nn.sequences.self_attention import SelfAttention
from lightspan.nn.sequences.state_space import StateSpace

# A recipe may name the functions listed here.
__all__ = ["sequence_state_space", "sequence_transformer"]

Positions = Literal["sinusoidal", "rotary", "none"]


class AttentionBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)): [B L D] -> [B L D]."""

    def __init__(self, width: int, attention: SelfAttention, mlp_width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), attention, nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_width), nn.GELU(), nn.Linear(mlp_width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor, own_BL: Tensor | None = None) -> Tensor:
        x_BLD = x_BLD + self.dropout(self.attention(self.norm1(x_BLD), own_BL))
        return x_BLD + self.dropout(self.mlp(self.norm2(x_BLD)))


class StateSpaceBlock(nn.Module):
    """x + GLU(GELU(recurrence(norm(x)))): [B L D] -> [B L D]. Steps that are not a sequence's own enter as zeros."""

    def __init__(self, width: int, recurrence: StateSpace, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.recurrence = nn.LayerNorm(width), recurrence
        self.out = nn.Sequential(nn.GELU(), nn.Dropout(dropout), nn.Linear(width, 2 * width), nn.GLU())

    def forward(self, x_BLD: Tensor, own_BL: Tensor | None = None) -> Tensor:
        normed_BLD = self.norm(x_BLD)
        if own_BL is not None:
            normed_BLD = normed_BLD.where(own_BL[:, :, None], 0)
        return x_BLD + self.out(self.recurrence(normed_BLD))


class SequenceNetwork(nn.Module):
    """An input map, equal blocks and a last norm; features are the mean over the steps, 0 without any: [B L C] or [B L]
    -> [B D].

    Padding at the end of a sequence has no effect on its own steps.

    Attributes:
        num_features: D.
        vocab_size: of symbols; None if inputs are values.
        channels: C; None if inputs are symbols.
        causal: whether no step depends on later ones.

    Args:
        channels, vocab_size: one of them; the other is None.
        make_block: called once for each of `depth` blocks.
        sinusoidal: whether sines of a step's place are added to its input.
    Raises: UserError for both or neither kind of input, or sizes below 1.
    """

    def __init__(
        self,
        channels: int | None,
        vocab_size: int | None,
        width: int,
        depth: int,
        make_block: Callable[[], nn.Module],
        causal: bool,
        sinusoidal: bool,
    ) -> None:
        super().__init__()
        if (channels is None) == (vocab_size is None):
            raise UserError(
                f"channels={channels} and vocab_size={vocab_size}: set the first for values, the second for symbols, "
                "and the other to null"
            )
        if min(channels or vocab_size or 0, width, depth) < 1 or (sinusoidal and width % 2):
            raise UserError(
                f"channels={channels} or vocab_size={vocab_size}, width={width} and depth={depth} must be at least 1"
                + (", and width even for sinusoidal positions" if sinusoidal else "")
            )
        self.channels, self.vocab_size, self.num_features = channels, vocab_size, width
        self.causal, self.sinusoidal = causal, sinusoidal
        self.input = nn.Linear(channels, width) if vocab_size is None else nn.Embedding(vocab_size, width)  # type: ignore[arg-type]
        self.blocks = nn.ModuleList(make_block() for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    @property
    def feature_modules(self) -> list[nn.Module]:
        return list(self.blocks)

    def embed(self, x: Tensor) -> Tensor:
        """Values [B L C] or symbols [B L] -> [B L D], before positions."""
        return self.input(x)

    def encode(self, embedded_BLD: Tensor, own_BL: Tensor | None = None) -> Tensor:
        """The state of each step behind the last norm, [B L D].

        Args:
            own_BL: bool, which steps are a sequence's own; None: all. The states of others mean nothing.
        """
        x_BLD = embedded_BLD
        length = x_BLD.shape[1]
        if self.sinusoidal and length:
            x_BLD = x_BLD + sincos([length], self.num_features, device=x_BLD.device).to(x_BLD.dtype)
        for block in self.blocks:
            x_BLD = block(x_BLD, own_BL)
        return self.norm(x_BLD)

    def forward(self, x: Tensor, own_BL: Tensor | None = None) -> Tensor:
        states_BLD = self.encode(self.embed(x), own_BL)
        if own_BL is not None:
            return masked_mean(states_BLD, own_BL)
        return states_BLD.mean(dim=1) if states_BLD.shape[1] else states_BLD.sum(dim=1)  # no step has no NaN


def sequence_transformer(
    channels: int | None = 1,
    vocab_size: int | None = None,
    width: int = 64,
    depth: int = 3,
    heads: int = 4,
    positions: Positions = "sinusoidal",
    causal: bool = False,
    window: int | None = None,
    dropout: float = 0.0,
    mlp_width: int | None = None,
) -> SequenceNetwork:
    """A pre-norm transformer.

    Args:
        channels, vocab_size: numbers of a step, or symbols that there are; the other is null.
        width, depth, heads: residual width, blocks, attention heads.
        positions: "sinusoidal" adds sines to the input, "rotary" turns queries and keys in each block.
        causal: each step sees itself and those before it alone.
        window: steps of a chunk of local attention, for long sequences; see `SelfAttention`.
        dropout: of each branch, in [0, 1]; the paper has none.
        mlp_width: of the hidden layer of each block; None is 4 D. The authors of SPT have 2 D for Long Range Arena.
    Raises: UserError for settings out of these ranges.
    """
    require_shares(dropout=dropout)
    if mlp_width is not None and mlp_width < 1:
        raise UserError(f"mlp_width={mlp_width} must be at least 1; leave it out for four times the width")
    if positions not in ("sinusoidal", "rotary", "none"):
        raise UserError(f"positions={positions!r} must be sinusoidal, rotary or none")
    turns = positions == "rotary"

    def block() -> nn.Module:
        return AttentionBlock(
            width, SelfAttention(width, heads, causal, window, turns), mlp_width or 4 * width, dropout
        )

    return SequenceNetwork(channels, vocab_size, width, depth, block, causal, positions == "sinusoidal")


def sequence_state_space(
    channels: int | None = 1,
    vocab_size: int | None = None,
    width: int = 64,
    depth: int = 3,
    states: int = 32,
    causal: bool = False,
    start: Literal["hippo", "random"] = "hippo",
    dropout: float = 0.0,
) -> SequenceNetwork:
    """A network of diagonal linear recurrences, both ways unless `causal`; it needs no positions.

    Args:
        channels, vocab_size: numbers of a step, or symbols that there are; the other is null.
        width, depth: residual width, blocks.
        states, start: of each channel, see `lightspan.nn.sequences.state_space.StateSpace`.
        causal: each step depends on itself and those before it alone.
        dropout: of each branch, in [0, 1].
    """
    require_shares(dropout=dropout)

    def block() -> nn.Module:
        return StateSpaceBlock(width, StateSpace(width, states, not causal, start), dropout)

    return SequenceNetwork(channels, vocab_size, width, depth, block, causal, sinusoidal=False)
