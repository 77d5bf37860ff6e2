"""Corrupted texts and what is missing in them, as UL2's mixture of denoisers makes them.

Each hidden span gives way to a token of its own in the input, its sentinel. The target has the sentinel of each span
and the span behind it. Source: Tay et al., "UL2", 2022, arXiv 2205.05131, section 3.1.
Shapes: L tokens of a text, T of an input, U of a target, K denoisers.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in, require_numbers
from lightspan.datamodules.text.batch import DenoisingBatch
from lightspan.datamodules.text.documents import TextTokens
from lightspan.datamodules.text.forms import TextForm, padded, window
from lightspan.datamodules.text.packing import packed, trimmed
from lightspan.datamodules.text.spans import MIXTURE, SHORTEST, Denoiser, Mode

MODES: tuple[Mode, ...] = ("R", "S", "X")
OWN = 2 + len(MODES)
"""Tokens besides sentinels."""
SENTINELS = "[1, 65536]"
"""How many there may be: as many hidden spans as the longest texts have."""


@dataclass(frozen=True)
class DenoisingTokens:
    """Numbers of the tokens that no text has.

    Args:
        pad: also what a decoder reads first, as in T5.
        eos: ends inputs and targets.
        modes: of each mode.
        first_sentinel: of the first span; those of the others count down from it.
        sentinels: how many, in [1, 65536].
    Raises: UserError for a number that is negative or has two meanings.
    """

    pad: int
    eos: int
    modes: Mapping[Mode, int]
    first_sentinel: int
    sentinels: int = 100

    def __post_init__(self) -> None:
        if set(self.modes) != set(MODES):
            raise UserError(f"modes={dict(self.modes)} must give one number to each of {', '.join(MODES)}")
        require_in(SENTINELS, sentinels=self.sentinels)
        numbers = self.all()
        repeated = sorted(number for number, times in Counter(numbers).items() if times > 1)
        if repeated or min(numbers) < 0:
            raise UserError(
                f"pad={self.pad}, eos={self.eos}, modes={dict(self.modes)} and {self.sentinels} sentinels down from "
                f"{self.first_sentinel} must be numbers from 0 up, each with one meaning"
                + (f"; {repeated[0]} has two" if repeated else "")
            )

    def all(self) -> list[int]:
        return [self.pad, self.eos, *self.modes.values(), *self.sentinel_numbers().tolist()]

    def sentinel_numbers(self) -> np.ndarray:
        """int64 [sentinels], that of the first span first."""
        return self.first_sentinel - np.arange(self.sentinels)


def appended(text_tokens: int, sentinels: int) -> DenoisingTokens:
    """Numbers behind those of texts: <pad>, <eos>, [R], [S], [X], and sentinels, the first of which is the last."""
    modes = {mode: text_tokens + 2 + place for place, mode in enumerate(MODES)}
    return DenoisingTokens(text_tokens, text_tokens + 1, modes, text_tokens + OWN + sentinels - 1, sentinels)


class Corrupted(NamedTuple):
    """An input [T] and a target [U], int64 without padding, and bytes of real text of each target token, [U]."""

    inputs: np.ndarray
    targets: np.ndarray
    target_bytes: np.ndarray


def corrupted(text: TextTokens, hidden: np.ndarray, tokens: DenoisingTokens, mode: Mode | None) -> Corrupted:
    """A text whose hidden tokens stand in the target: `[mode] seen <s0> seen <s1> <eos>`, `<s0> span <s1> span <eos>`.

    Args:
        hidden: bool [L], with no more spans than there are sentinels.
        mode: None leaves its token out.
    """
    begins = hidden & ~np.concatenate([[False], hidden[:-1]])
    sentinels = tokens.sentinel_numbers()
    marked = text.tokens.astype(np.int64)
    marked[begins] = sentinels[: begins.sum()]
    seen = marked[~hidden | begins]
    spans, places = text.tokens[hidden].astype(np.int64), np.flatnonzero(begins[hidden])
    first = [] if mode is None else [tokens.modes[mode]]
    return Corrupted(
        np.concatenate([first, seen, [tokens.eos]]).astype(np.int64),
        np.append(np.insert(spans, places, sentinels[: len(places)]), tokens.eos),
        np.append(np.insert(text.byte_counts[hidden].astype(np.int64), places, 0), 0),
    )


def restored(inputs: np.ndarray, targets: np.ndarray, tokens: DenoisingTokens) -> np.ndarray:
    """The text [L] that was corrupted: the inverse of `corrupted`, with or without padding and the token of a mode.

    A span that the target lacks is left out, and what it has of others is not read: so are answers of a network put
    into their text.
    """
    leave_out = [tokens.pad, tokens.eos, *tokens.modes.values()]
    sentinels = tokens.sentinel_numbers()
    targets = targets[~np.isin(targets, leave_out)]
    begins = np.flatnonzero(np.isin(targets, sentinels))
    spans = {int(span[0]): span[1:] for span in np.split(targets, begins) if len(span) and span[0] in sentinels}
    kept = inputs[~np.isin(inputs, leave_out)]
    places = np.flatnonzero(np.isin(kept, sentinels))
    parts = [part for place in np.split(kept, places) for part in _filled(place, spans)]
    return np.concatenate([*parts, np.empty(0, np.int64)]).astype(np.int64)


def _filled(part: np.ndarray, spans: Mapping[int, np.ndarray]) -> Sequence[np.ndarray]:
    """A part of an input that begins with a sentinel, if that has a place, with its span instead."""
    if len(part) and int(part[0]) in spans:
        return [spans[int(part[0])], part[1:]]
    return [part]


@dataclass
class Denoising(TextForm):
    """Samples of `DenoisingBatch`: each text is corrupted by one of several denoisers, which is drawn for it.

    All that is random is a function of (seed of the data, epoch, index). A piece of a document has as many tokens as
    the denoiser that hides most needs to fill a row; any other reads a part of it, from a random place.

    Args:
        inputs, targets: T and U, tokens of a row, with sentinels, mode and <eos>.
        denoisers: K of them; None is UL2's mixture of seven.
        weights: how often each is drawn, in any unit; None draws all equally often.
        mode_tokens: whether inputs begin with the token of their mode.
        sentinels: how many there are; a text may have so many hidden spans.
        tokens: numbers of what no text has; None takes those behind the text's, with 100 sentinels or as many as
            `sentinels` says.
        pack: whether several texts share a row in training, where they fit. Losses are the same, and rows fewer.
        trim: whether columns that are padding in all rows of a batch to train on are left out, which saves their time;
            a network that is compiled is compiled anew for each width.

    Attributes:
        names: of the denoisers.
        lengths: tokens of a text that each reads.

    Raises: UserError for rows in which nothing fits, more spans than sentinels, and weights that do not fit; in
        `prepare` for tokens that a text may have.
    """

    batch_type = DenoisingBatch

    inputs: int = 512
    targets: int = 512
    denoisers: Sequence[Denoiser] | None = None
    weights: Sequence[float] | None = None
    mode_tokens: bool = True
    sentinels: int = 100
    tokens: DenoisingTokens | None = None
    pack: bool = False
    trim: bool = False
    used: DenoisingTokens = field(init=False)

    shortest = SHORTEST

    def __post_init__(self) -> None:
        self.mixture = tuple(MIXTURE if self.denoisers is None else self.denoisers)
        weights = np.ones(len(self.mixture)) if self.weights is None else np.asarray(self.weights, dtype=np.float64)
        if not self.mixture:
            raise UserError("denoisers is empty, so nothing would be hidden; leave it out for UL2's seven")
        if len(weights) != len(self.mixture) or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
            raise UserError(
                f"weights={self.weights} must be {len(self.mixture)} numbers from 0 up, one above 0 and none infinite, "
                "for each denoiser"
            )
        self.shares = weights / weights.sum()
        self.names = tuple(denoiser.name for denoiser in self.mixture)
        if len(set(self.names)) < len(self.names):
            raise UserError(f"denoisers {', '.join(self.names)} must differ; give one of them more weight instead")
        require_in(SENTINELS, sentinels=self.sentinels)
        require_numbers(self.inputs + self.targets, inputs=self.inputs, targets=self.targets)
        self.lengths = tuple(self._length(denoiser) for denoiser in self.mixture)
        self.longest = max(length for length, share in zip(self.lengths, self.shares, strict=True) if share)

    def _length(self, denoiser: Denoiser) -> int:
        """The longest text whose inputs and targets fit. Raises: UserError if there is none, or for its spans."""
        around = 1 + self.mode_tokens  # <eos> and mode
        for length in range(self.inputs + self.targets, SHORTEST - 1, -1):
            seen, hidden, spans = denoiser.most(length)
            if seen + spans + around <= self.inputs and hidden + spans + 1 <= self.targets:
                break
        else:
            raise UserError(
                f"inputs={self.inputs} and targets={self.targets} have no room for a text of two tokens with its "
                f"sentinel, <eos> and mode under {denoiser.name}; raise them"
            )
        available = self.sentinels if self.tokens is None else self.tokens.sentinels
        if spans > available:
            raise UserError(
                f"{denoiser.name} hides {spans} spans in the {length} tokens that fill a row, more than there are "
                f"sentinels, {available}; set form.init_args.sentinels={spans} and let the network know as many tokens "
                f"more, or lower inputs={self.inputs} or targets={self.targets}"
            )
        return length

    def prepare(self, text_tokens: int, free: frozenset[int] = frozenset()) -> int:
        self.used = appended(text_tokens, self.sentinels) if self.tokens is None else self.tokens
        numbers = self.used.all()
        clashing = sorted(number for number in numbers if number < text_tokens and number not in free)
        if clashing:
            raise UserError(
                f"{len(clashing)} numbers of pad, eos, modes and sentinels are among the {text_tokens:,} that texts "
                f"have, the first: {clashing[0]}; leave form.init_args.tokens out to use numbers behind them, or name "
                "special tokens of the tokenizer"
            )
        return max(text_tokens, *(number + 1 for number in numbers))

    def corrupt(self, piece: TextTokens, seed: int) -> tuple[Corrupted, int]:
        """What becomes of a piece, and the place of its denoiser in the mixture."""
        chosen = int(np.random.default_rng((seed, 2)).choice(len(self.mixture), p=self.shares))
        denoiser, text = self.mixture[chosen], window(piece, self.lengths[chosen], seed, 1)
        hidden = denoiser.hidden(len(text.tokens), np.random.default_rng((seed, 3)))
        return corrupted(text, hidden, self.used, denoiser.mode if self.mode_tokens else None), chosen

    def __call__(self, piece: TextTokens, seed: int) -> dict[str, Tensor]:
        (inputs, targets, target_bytes), chosen = self.corrupt(piece, seed)
        read = np.concatenate([[self.used.pad], targets[:-1]])
        return {
            "inputs": padded(inputs, self.inputs, self.used.pad),
            "input_segments": padded(np.ones(len(inputs)), self.inputs),
            "decoder_inputs": padded(read, self.targets, self.used.pad),
            "targets": padded(targets, self.targets, self.used.pad),
            "target_segments": padded(np.ones(len(targets)), self.targets),
            "target_bytes": padded(target_bytes, self.targets),
            "denoiser": padded(np.full(len(targets), chosen), self.targets),
        }

    def joined(self, batch: Any) -> Any:
        """With `pack`, rows that several texts share; with `trim`, no wider than the widest."""
        batch = packed(batch) if self.pack else batch
        return trimmed(batch) if self.trim else batch


def continuation(length: int, share: float) -> np.ndarray:
    """bool [L]: exactly the last `share` of a text, at least a token: what `Ending` hides on average."""
    return np.arange(length) >= length - min(max(round(length * share), 1), length - 1)


def rows_of(batch: Mapping[str, Tensor]) -> list[Corrupted]:
    """The texts of a batch, without padding, of several that share a row too, by row and then by place."""
    found = []
    columns = ("inputs", "input_segments", "targets", "target_segments", "target_bytes")
    for row in zip(*(batch[name].cpu().numpy() for name in columns), strict=True):
        inputs, input_segments, targets, target_segments, target_bytes = row
        for segment in range(1, int(input_segments.max(initial=0)) + 1):
            there = target_segments == segment
            found.append(Corrupted(inputs[input_segments == segment], targets[there], target_bytes[there]))
    return found
