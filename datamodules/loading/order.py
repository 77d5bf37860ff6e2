"""The canonical order of samples: a function of seed and epoch, independent of ranks, workers and micro-batches."""

import base64
import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from lightspan.core.errors import UserError


def sample_seeds(seed: int, epoch: int, length: int) -> np.ndarray:
    """One seed per sample, by sample index: a pure function of (seed, epoch, index), int64 [length]."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, 1]))).integers(2**63, size=length)


def content_of(arrays: Iterable[np.ndarray]) -> str:
    """32 hexadecimal digits that tell numbers from all others: by their values, types and shapes, and their order."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()[:32]


def packed(chosen: np.ndarray, count: int) -> str:
    """Which of `count` samples these are, distinct and ascending, as base64 of one bit for each sample."""
    return base64.b64encode(np.packbits(np.isin(np.arange(count), chosen)).tobytes()).decode()


def unpacked(text: str, count: int) -> np.ndarray:
    """What `packed` took, int64 [n]. Raises: ValueError for text that it does not give for `count`."""
    bits = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(bits) != -(-count // 8):
        raise ValueError(f"{len(bits):,} bytes are not one bit for each of {count:,} samples")
    return np.flatnonzero(np.unpackbits(bits, count=count))


@dataclass(frozen=True)
class Order:
    """In which order the samples of one epoch are seen.

    Samples are in blocks (shards), which are drawn in random order and opened `window` at a time; the samples of an
    open window are mixed. One block mixes everything, which is right if all samples are equally fast to read.

    Args:
        sizes: samples of each block, each >= 0. Sample indices run through the blocks in this order.
        window: blocks whose samples are mixed, >= 1. Reading touches only these until all their samples are used.
        carries: if an epoch does not fill its last batch, True lets the next epoch fill it, so that every sample is
            seen exactly once in each epoch; False drops the rest, which differs in each epoch.
        content: what identifies the samples beyond their number, such as a digest; empty if nothing does.
        skips_damaged: whether the loader may meet damaged samples and replace them.
        damage: what was left out of the blocks because it cannot be read, one line for each; for reports.
    """

    sizes: tuple[int, ...]
    window: int = 1
    carries: bool = False
    content: str = ""
    skips_damaged: bool = False
    damage: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(self.sizes)

    def require_micro_batch(self, size: int) -> None:
        """Raises: UserError for an order that means nothing when a rank gets `size` samples of it at a time."""

    def of_part(self, chosen: np.ndarray, digest: str) -> "Order":
        """The order of some of these samples, each seen once in an epoch: tails are carried over.

        Args:
            chosen: their numbers, ascending, int64 [n].
            digest: tells this part from others.
        """
        blocks = np.searchsorted(np.cumsum(self.sizes), chosen, side="right")
        sizes = np.bincount(blocks, minlength=len(self.sizes)).tolist()
        return replace(self, sizes=tuple(sizes), carries=True, content=f"{self.content}/{digest}")

    def weighted(self, weight_N: np.ndarray, group_N: np.ndarray) -> "Weighted":
        """The order of the same blocks in which samples come as often as their weights say, see `Weighted`."""
        return Weighted(self.sizes, self.window, True, self.content, self.skips_damaged, self.damage, weight_N, group_N)

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """A permutation of range(len(self)): int64 [len(self)]. It needs 8 bytes per sample."""
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, 0])))
        if len(self.sizes) == 1:
            return generator.permutation(len(self))
        return self._mixed(np.arange(len(self)), np.cumsum(self.sizes), generator)

    def _mixed(self, samples: np.ndarray, ends: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Samples by block, of which those of block b end at `ends[b]`: blocks in random order, open windows mixed."""
        by_block = np.split(samples, ends[:-1])
        blocks = generator.permutation(len(by_block))
        windows = [
            np.concatenate([by_block[block] for block in blocks[at : at + self.window]])
            for at in range(0, len(blocks), self.window)
        ]
        return np.concatenate([generator.permutation(opened) for opened in windows])

    def seeds(self, seed: int, epoch: int, drawn: np.ndarray) -> np.ndarray:
        """The seed of the sample at each place of an epoch, int64 [len(self)].

        Args:
            drawn: what `epoch` gave for the same seed and epoch.
        """
        return sample_seeds(seed, epoch, len(self))[drawn]


@dataclass(frozen=True)
class Weighted(Order):
    """Samples in proportion to weights: over epochs each comes as often as its weight says, and in each nearly so.

    An epoch has N places, of which a sample should have e = N w / (sum of w). It gets the whole number below or above
    e, by systematic draws, and so does each group: its number of places is e of its samples together, rounded down or
    up. Where one comes several times in an epoch, each time has a random seed of its own. Reading touches only the
    blocks of an open window, as in any order.

    Args:
        weight_N: of each sample, float64, above 0 and finite.
        group_N: of each sample, int64; groups are what a mixture is of, and a single one is none.
    """

    weight_N: np.ndarray = field(default_factory=lambda: np.empty(0), compare=False)
    group_N: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), compare=False)

    def of_part(self, chosen: np.ndarray, digest: str) -> Order:
        """Of the samples that are left, as often as their weights say among these."""
        plain = super().of_part(chosen, digest)
        assert isinstance(plain, Weighted)
        return replace(plain, weight_N=self.weight_N[chosen], group_N=self.group_N[chosen])

    def weighted(self, weight_N: np.ndarray, group_N: np.ndarray) -> "Weighted":
        """Raises: UserError, since these samples have weights."""
        raise UserError("these samples have weights of their own; name one selection")

    def times(self, generator: np.random.Generator) -> np.ndarray:
        """How often each sample comes in one epoch, int64 [N], N together."""
        count = len(self)
        # Within its group in random order, so that which samples are rounded up differs from epoch to epoch.
        turn = np.lexsort((generator.random(count), self.group_N))
        upto = np.cumsum(self.weight_N[turn])
        passed = np.floor(upto * (count / upto[-1]) + generator.random()).astype(np.int64)
        passed[-1] = count  # whatever rounding made of it
        times = np.empty(count, np.int64)
        times[turn] = np.diff(np.minimum(passed, count), prepend=0)
        return times

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """int64 [N], each sample as often as `times` says."""
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, 0])))
        times = self.times(generator)
        ends = np.cumsum([0, *times])[np.cumsum(self.sizes)]
        return self._mixed(np.repeat(np.arange(len(self)), times), ends, generator)

    def seeds(self, seed: int, epoch: int, drawn: np.ndarray) -> np.ndarray:
        """Those of any order where a sample comes first, and others where it comes again."""
        first = np.zeros(len(drawn), bool)
        first[np.unique(drawn, return_index=True)[1]] = True
        others = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, 3])))
        return np.where(first, super().seeds(seed, epoch, drawn), others.integers(2**63, size=len(drawn)))


def _no_weights(kind: str) -> UserError:
    return UserError(
        f"{kind} have an order of their own, in which samples cannot have weights; take a selection of samples "
        "without weights, or leave that order out"
    )


@dataclass(frozen=True)
class InSequence(Order):
    """Blocks in their own order, each mixed by itself: tasks that come one after the other."""

    def of_part(self, chosen: np.ndarray, digest: str) -> Order:
        """Raises: UserError, since a task of a part would not fill whole batches."""
        raise UserError(
            "a part of tasks that come one after the other would mix two of them in a batch; take fewer samples of "
            "each (train_size of their source)"
        )

    def weighted(self, weight_N: np.ndarray, group_N: np.ndarray) -> Weighted:
        """Raises: UserError, as batches would mix tasks."""
        raise _no_weights("tasks that come one after the other")

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, 0])))
        ends = np.cumsum(self.sizes)
        return np.concatenate(
            [end - size + generator.permutation(size) for size, end in zip(self.sizes, ends, strict=True)]
        )


@dataclass(frozen=True)
class ClassBalanced(Order):
    """Batches of equally many samples of each of several classes; each is of one cluster, and clusters take turns.

    A batch has `batch_size / per_class` classes, drawn for it without repeats while there are enough. Those of its
    samples that a class has in the cluster come in an order of their own, each once before one comes again: a class
    with fewer than `per_class` repeats some within a batch. So an epoch sees rare samples often and some not at all. A
    class with a single sample in a cluster is left out there, since that has none to be compared with, and a cluster
    without two samples of one class has no batch.

    Args:
        sizes: of the one block.
        labels: of each sample, int64.
        batch_size: samples of an optimiser step over all ranks, a multiple of `per_class`.
        per_class: at least 2.
        clusters: epoch -> the cluster of each sample, int64, called when the epoch begins; None is one cluster.
    Raises: UserError for a batch size that does not fit, and in `epoch` if no class has two samples in a cluster.
    """

    labels: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), compare=False)
    batch_size: int = 1
    per_class: int = 2
    clusters: Callable[[int], np.ndarray] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.per_class < 2 or self.batch_size % self.per_class:
            raise UserError(
                f"per_class={self.per_class} must be at least 2 and divide batch_size={self.batch_size}; set "
                "data.init_args.per_class or batch_size"
            )

    def of_part(self, chosen: np.ndarray, digest: str) -> Order:
        """Batches go by class as before, so that an epoch need not see each sample."""
        whole = self.clusters
        return replace(
            self,
            sizes=(len(chosen),),
            content=f"{self.content}/{digest}",
            labels=self.labels[chosen],
            clusters=None if whole is None else lambda epoch: whole(epoch)[chosen],
        )

    def weighted(self, weight_N: np.ndarray, group_N: np.ndarray) -> Weighted:
        """Raises: UserError, as classes are balanced already."""
        raise _no_weights("batches of equally many samples of a class (per_class)")

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, 0])))
        clusters = np.zeros(len(self), np.int64) if self.clusters is None else self.clusters(epoch)
        of_clusters = [self._decks(clusters == cluster, generator) for cluster in np.unique(clusters)]
        playing = [decks for decks in of_clusters if decks]
        if not playing:
            raise UserError("no class has two samples to compare, so that no batch has a pair; give more of each class")
        batches = [self._batch(playing[i % len(playing)], generator) for i in range(len(self) // self.batch_size)]
        return np.resize(np.concatenate(batches), len(self))  # the tail is dropped

    def _decks(self, within: np.ndarray, generator: np.random.Generator) -> "list[_Deck]":
        members = [np.flatnonzero(within & (self.labels == label)) for label in np.unique(self.labels[within])]
        return [_Deck(own, generator) for own in members if len(own) > 1]

    def _batch(self, decks: "list[_Deck]", generator: np.random.Generator) -> np.ndarray:
        """Mixed, so that ranks and micro-batches have several classes each."""
        count = self.batch_size // self.per_class
        chosen = generator.choice(len(decks), count, replace=count > len(decks))
        return generator.permutation(np.concatenate([decks[i].take(self.per_class) for i in chosen]))


class _Deck:
    """Samples that are dealt in random order, and shuffled again when none is left."""

    def __init__(self, members: np.ndarray, generator: np.random.Generator) -> None:
        self.members, self.generator, self.left = members, generator, members[:0]

    def take(self, count: int) -> np.ndarray:
        while len(self.left) < count:
            self.left = np.concatenate([self.left, self.generator.permutation(self.members)])
        taken, self.left = self.left[:count], self.left[count:]
        return taken


@dataclass(frozen=True)
class GroupSizes:
    """How many samples of a class stand side by side, by epoch.

    Args:
        sizes: at least 1 each.
        from_epochs: the epoch from which each holds, ascending from 0; the last one holds to the end.
    """

    sizes: tuple[int, ...] = (2, 4, 6, 8)
    from_epochs: tuple[int, ...] = (0, 40, 60, 80)

    def __post_init__(self) -> None:
        starts = list(self.from_epochs)
        if not starts or starts[0] or starts != sorted(set(starts)) or len(self.sizes) != len(starts):
            raise UserError(
                f"sizes={[*self.sizes]} need as many from_epochs={starts}, which must begin with 0 and ascend"
            )
        if min(self.sizes) < 1:
            raise UserError(f"sizes={[*self.sizes]} of groups must each be at least 1")

    def at(self, epoch: int) -> int:
        return self.sizes[bisect_right(self.from_epochs, epoch) - 1]


@dataclass(frozen=True)
class ClassGroups(Order):
    """Groups of as many samples of one class side by side, so that ranks and micro-batches have whole ones.

    No class is twice in a batch. Classes come in random order, each once before one comes again, but for those that do
    not fill a batch any more, which wait for the next round. A group has distinct samples; a class with fewer repeats
    them.

    Args:
        sizes: of the one block.
        labels: of each sample, int64.
        batch_size: samples of an optimiser step over all ranks, a multiple of each size of group.
        groups: the size by epoch.
    Raises: UserError for a batch that does not divide into groups, has more of the smallest than there are classes, or
        fewer than two of the largest, and for a single class.
    """

    labels: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), compare=False)
    batch_size: int = 1
    groups: GroupSizes = field(default_factory=GroupSizes)

    def __post_init__(self) -> None:
        self.require_micro_batch(self.batch_size)
        largest = max(self.groups.sizes)
        if self.batch_size < 2 * largest:
            raise UserError(
                f"a batch of {self.batch_size} in groups of {largest} has a single class, with nothing to tell "
                f"it from; set data.init_args.batch_size to at least {2 * largest}, or groups to sizes of at most "
                f"{self.batch_size // 2}"
            )
        classes, most = len(np.unique(self.labels)), self.batch_size // min(self.groups.sizes)
        if classes < max(2, most):
            raise UserError(
                f"a batch of {self.batch_size} in groups of {min(self.groups.sizes)} has {most} classes, of which it "
                f"takes at least 2 to tell them apart, and the data have {classes}; lower data.init_args.batch_size, "
                "or give more classes"
            )

    def of_part(self, chosen: np.ndarray, digest: str) -> Order:
        """Batches go by class as before. Raises: UserError as the whole, for a part with too few classes."""
        return replace(self, sizes=(len(chosen),), content=f"{self.content}/{digest}", labels=self.labels[chosen])

    def weighted(self, weight_N: np.ndarray, group_N: np.ndarray) -> Weighted:
        """Raises: UserError, as classes are balanced already."""
        raise _no_weights("batches of groups of a class (groups)")

    def require_micro_batch(self, size: int) -> None:
        if wrong := [group for group in self.groups.sizes if size % group]:
            raise UserError(
                f"{size} samples at a time do not divide into whole groups of {wrong[0]}; set "
                "data.init_args.batch_size so that each rank and micro-batch gets a multiple of each of "
                f"{[*self.groups.sizes]}"
            )

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, 0])))
        by_class = np.argsort(self.labels, kind="stable")
        members = np.split(by_class, np.flatnonzero(np.diff(self.labels[by_class])) + 1)
        group, batches = self.groups.at(epoch), len(self) // self.batch_size
        per_batch = self.batch_size // group
        in_a_round = len(members) // per_batch * per_batch
        rounds = -(-batches * per_batch // in_a_round)
        turns = np.concatenate([generator.permutation(len(members))[:in_a_round] for _ in range(rounds)])
        drawn = [
            np.resize(generator.permutation(members[turn])[:group], group) for turn in turns[: batches * per_batch]
        ]
        return np.resize(np.concatenate(drawn), len(self))  # the tail is dropped
