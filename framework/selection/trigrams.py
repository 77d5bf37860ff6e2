"""A proxy of texts that trains in a tenth of a second: a smoothed model of three tokens in a row, by counting.

    p(c | a b) = (n(abc) + k p(c | b)) / (n(ab) + k),   p(c | b) = (n(bc) + k p(c)) / (n(b) + k),
    p(c) = (n(c) + k / V) / (n + k)                      all n of windows of three tokens, V numbers of tokens

Source of the smoothing: MacKay, Peto, "A hierarchical Dirichlet language model", 1995. Such a model notices which words
and spellings a mixture has, and that repeated samples say nothing new; it does not know what a network may learn.

Shapes: N samples, W windows of three tokens, U of those that the target has.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from lightning import LightningDataModule
from scipy.sparse import csr_array, hstack
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.datamodules.loading.selection import DataSelection
from lightspan.evaluation.features.encoded import Split, split_loader
from lightspan.evaluation.features.identity import data_identity
from lightspan.selection.proxies import Losses, Proxy, TrainedOn


class TokenWindows(NamedTuple):
    """Three tokens in a row, int64 [W 3], and the sample of each, int64 [W]."""

    tokens_W3: np.ndarray
    sample_W: np.ndarray

    @classmethod
    def of(cls, batches: Iterable[Any]) -> "TokenWindows":
        """Those of all samples. Tokens where `mask` is 0 are left out. Raises: UserError for batches without `tokens`
        and `mask`.
        """
        found, samples, before = [np.zeros((0, 3), np.int64)], [np.zeros(0, np.int64)], 0
        for batch in batches:
            tokens, mask = batch.get("tokens"), batch.get("mask")
            if not isinstance(tokens, Tensor) or not isinstance(mask, Tensor) or tokens.ndim != 2:
                raise UserError(
                    f"trigrams are counted in tokens and mask [B, T], and a batch has {', '.join(sorted(batch))}; give "
                    "texts such as those of lightspan.datamodules.text.corpus.Corpus with the form Padded"
                )
            if tokens.shape[1] >= 3:
                whole_BT = mask.unfold(1, 3, 1).bool().all(dim=2)
                found.append(tokens.unfold(1, 3, 1)[whole_BT].long().numpy())
                samples.append(before + whole_BT.nonzero()[:, 0].numpy())
            before += len(tokens)
        return cls(np.concatenate(found), np.concatenate(samples))


COLUMNS = ([0, 1, 2], [0, 1], [1, 2], [1], [2])
"""abc, ab, bc, b and c of a window abc."""


class TrigramModel:
    """Counts of a pool, for windows of a target.

    Args:
        pool: windows of N samples.
        count: N.
        target_U3: different windows whose probability is asked for.
        vocabulary: V, above every token.
        strength: k.
    """

    def __init__(self, pool: TokenWindows, count: int, target_U3: np.ndarray, vocabulary: int, strength: float) -> None:
        self.vocabulary, self.strength = vocabulary, strength
        place = vocabulary ** np.arange(2, -1, -1, dtype=np.int64)
        parts, self.at = list[csr_array](), list[np.ndarray]()
        for columns in COLUMNS:
            keys_U, at_U = np.unique(target_U3[:, columns] @ place[columns], return_inverse=True)
            key_W = pool.tokens_W3[:, columns] @ place[columns]
            found_W = np.minimum(np.searchsorted(keys_U, key_W), len(keys_U) - 1)
            known_W = keys_U[found_W] == key_W
            entries = np.ones(int(known_W.sum())), (pool.sample_W[known_W], found_W[known_W])
            parts.append(csr_array(entries, shape=(count, len(keys_U))))
            self.at.append(at_U)
        self.starts = np.cumsum([0, *(part.shape[1] for part in parts)])
        self.counts = hstack(parts, format="csr")
        self.windows_N = np.bincount(pool.sample_W, minlength=count)

    def log_probability(self, times_N: np.ndarray) -> np.ndarray:
        """log p(c | a b), float64 [U], of a model of samples that are seen so many times, at least 0 each."""
        counted = self.counts.T @ times_N
        abc, ab, bc, b, c = (counted[self.starts[i] :][at_U] for i, at_U in enumerate(self.at))
        k, total = self.strength, float(self.windows_N @ times_N)
        one_U = (c + k / self.vocabulary) / (total + k)
        two_U = (bc + k * one_U) / (b + k)
        return np.log((abc + k * two_U) / (ab + k))


class TrigramProxy(Proxy):
    """Trigrams of a sample of the mixture, and their loss in nats a token on the texts of a target.

    Each sample is seen a Poisson number of times, whose mean is in proportion to its share, so that `tokens` are seen
    on the average. Of the texts of the target, by turns, one is searched by and one reported.

    Args:
        data: what is mixed, as in the inputs `features` and `samples`.
        target: other texts, of the kind that the mixture is to serve.
        split: of the target.
        tokens: that a proxy sees, at least 1.
        strength: k of the smoothing, above 0.
    Raises: UserError for numbers out of range; when it is loaded for data without tokens, data and target of other
        tokenizers, and a target of fewer than two texts with three tokens.
    """

    def __init__(
        self,
        data: LightningDataModule,
        target: LightningDataModule,
        split: Split = "val",
        tokens: int = 200_000,
        strength: float = 5.0,
    ) -> None:
        require_in("[1, inf)", tokens=tokens)
        require_in("(0, inf)", strength=strength)
        self.data, self.target, self.split = data, target, split
        self.tokens, self.strength = tokens, strength

    def trained_on(self) -> TrainedOn:
        bank, asked = split_loader(self.data, "bank"), split_loader(self.target, self.split)
        own, other = (getattr(data, "num_tokens", None) for data in (self.data, self.target))
        if own is None or own != other:
            raise UserError(
                f"data and target of TrigramProxy have {own} and {other} numbers of tokens; give both one tokenizer"
            )
        windows = TokenWindows.of(asked)
        if len(np.unique(windows.sample_W)) < 2:
            raise UserError("the target of TrigramProxy needs two texts of at least three tokens; give it more")
        target_U3, at_W = np.unique(windows.tokens_W3, axis=0, return_inverse=True)
        turn_W = np.unique(windows.sample_W, return_inverse=True)[1] % 2
        halves = [np.bincount(at_W[turn_W == turn], minlength=len(target_U3)) for turn in (0, 1)]
        model = TrigramModel(TokenWindows.of(bank), len(bank.dataset), target_U3, own, self.strength)

        def losses(selection: DataSelection, seed: int) -> Losses:
            log_U = model.log_probability(self._times(selection, model.windows_N, seed))
            return Losses(*(-float(half_U @ log_U) / int(half_U.sum()) for half_U in halves))

        identity = {
            "kind": "trigrams",
            "tokens": self.tokens,
            "strength": self.strength,
            "data": data_identity(self.data, bank),
            "target": data_identity(self.target, asked),
            "split": self.split,
        }
        return TrainedOn(identity, losses)

    def _times(self, selection: DataSelection, windows_N: np.ndarray, seed: int) -> np.ndarray:
        """How often each sample is seen, float64 [N]: never in a mixture without three tokens in a row, such as of a
        group of empty texts.
        """
        weight_N, _ = selection.expanded((selection.count,))
        seen = float(weight_N @ windows_N)
        if not seen:
            return np.zeros(len(weight_N))
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 3])))
        return generator.poisson(weight_N * (self.tokens / seen)).astype(np.float64)
