"""Random linear maps from d coordinates to D weights, recreated from (size, dim, seed) wherever they are needed.

theta = theta_0 + P z trains D weights through d numbers (Li et al. 2018, "Measuring the Intrinsic Dimension of
Objective Landscapes", arXiv 1804.08838). `push(z) = P z` lifts coordinates to weights, `pull(g) = P^T g` is its
adjoint: <push(z), g> = <z, pull(g)>. Columns of P have unit length over all D rows, never tensor by tensor, so that a
step of length 1 in a coordinate is one of length 1 in the weights. They are orthogonal only on average.

| kind     | unit length                | time of push or pull | kept                     |
|----------|----------------------------|----------------------|--------------------------|
| Dense    | exact                      | D d                  | 4 D d bytes, D d <= 10^8 |
| Sparse   | exact                      | d sqrt(D)            | 9 d sqrt(D) bytes        |
| Fastfood | exact for D = L, else mean | D log D              | 8 L bytes, for any d     |

The CPU draws everything, normal numbers in float64, so a seed means the same map on every machine and device; products
are those of the device. Scales are applied to the coordinates, so unit length holds up to the rounding of the
argument's dtype.

Shapes: D weights (`size`), d coordinates (`dim`), K entries that are not zero, L and M powers of two.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.triton_kernels.walsh_hadamard import walsh_hadamard

DENSE_LIMIT = 10**8
"""Most entries of a dense map: 400 MB."""
_DRAWN_AT_ONCE = 2**22  # normal numbers, in float64
_BINS = 4096  # partial sums of a fold, so that none has too many terms for float32


class Projection(ABC):
    """A map P [D d]. A subclass draws it and writes `_push` and `_pull`, in float32 or wider.

    Args:
        size: D, >= 1.
        dim: d, >= 1.
        seed: everything that is drawn follows from it and the two sizes.
    Raises: UserError for sizes below 1.
    """

    def __init__(self, size: int, dim: int, seed: int = 0) -> None:
        if size < 1 or dim < 1:
            raise UserError(f"{type(self).__name__} size={size} and dim={dim} must both be at least 1")
        self.size, self.dim, self.seed = size, dim, seed

    def push(self, z_d: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` of P z, [stop - start] in the dtype and on the device of `z_d`; all D by default."""
        stop = self.size if stop is None else stop
        assert z_d.shape == (self.dim,), f"{tuple(z_d.shape)} coordinates, the map takes {self.dim}"
        assert 0 <= start <= stop <= self.size, f"rows {start} to {stop} of {self.size}"
        self._move(z_d.device)
        return self._push(wide(z_d), start, stop).to(z_d.dtype)

    def pull(self, g: Tensor, start: int = 0) -> Tensor:
        """P^T g [d] for a `g` that is zero except for the given rows from `start` on: all D by default.

        What ranks pull from their own slices sums to what one pulls from all rows.
        """
        assert g.ndim == 1, f"{g.ndim} axes, the map takes a vector"
        assert 0 <= start <= start + len(g) <= self.size, f"rows {start} to {start + len(g)} of {self.size}"
        self._move(g.device)
        return self._pull(wide(g), start).to(g.dtype)

    @abstractmethod
    def _push(self, z_d: Tensor, start: int, stop: int) -> Tensor: ...

    @abstractmethod
    def _pull(self, g: Tensor, start: int) -> Tensor: ...

    def _move(self, device: torch.device) -> None:
        """Moves what was drawn to the device where it is used, once."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.device != device:
                setattr(self, name, value.to(device))


ProjectionCallable = Callable[[int, int, int], Projection]
"""Makes a projection from (size, dim, seed): one of the classes below."""


class Dense(Projection):
    """Entries N(0, 1), then every column divided by its length (arXiv 1804.08838, section 2). Memory and time D d.

    Raises: UserError for more than `DENSE_LIMIT` entries.
    """

    def __init__(self, size: int, dim: int, seed: int = 0) -> None:
        super().__init__(size, dim, seed)
        if size * dim > DENSE_LIMIT:
            raise UserError(
                f"a Dense projection of size={size} and dim={dim} has {size * dim:.2g} entries, more than "
                f"{DENSE_LIMIT:.0e}; use Fastfood or Sparse, or a dim of at most {DENSE_LIMIT // size}"
            )
        generator = _generator(seed, "dense")
        self.entries_Dd = torch.empty(size, dim)
        squares_d = torch.zeros(dim, dtype=torch.float64)
        for rows_Rd in self.entries_Dd.split(max(1, _DRAWN_AT_ONCE // dim)):
            rows_Rd.copy_(torch.randn(rows_Rd.shape, generator=generator, dtype=torch.float64))
            squares_d += rows_Rd.double().square().sum(0)
        self.scale_d = squares_d.rsqrt()

    def _push(self, z_d: Tensor, start: int, stop: int) -> Tensor:
        return self.entries_Dd[start:stop].to(z_d.dtype) @ (z_d * self.scale_d.to(z_d.dtype))

    def _pull(self, g: Tensor, start: int) -> Tensor:
        return (g @ self.entries_Dd[start : start + len(g)].to(g.dtype)) * self.scale_d.to(g.dtype)


class Sparse(Projection):
    """Very sparse random projection (Li, Hastie, Church, KDD 2006): an entry is not zero with probability 1/sqrt(D),
    then +c or -c with equal probability; c makes columns unit length. Memory and time d sqrt(D).

    Entries are independent, so the distances between nonzero ones are geometric: d sqrt(D) numbers are drawn
    instead of D d. A column that has none, which happens only for small D, gets one in a random place.

    On a GPU equal runs can differ in the last bit, because the order of sums varies, unless
    `torch.use_deterministic_algorithms` is set.
    """

    def __init__(self, size: int, dim: int, seed: int = 0) -> None:
        super().__init__(size, dim, seed)
        generator = _generator(seed, "sparse")
        rows_K, columns_K = _bernoulli(size, dim, size**-0.5, generator)
        counts_d = torch.bincount(columns_K, minlength=dim)
        empty = (counts_d == 0).nonzero().flatten()
        rows_K = torch.cat([rows_K, torch.randint(size, (len(empty),), generator=generator)])
        columns_K = torch.cat([columns_K, empty])
        signs_K = 1 - 2 * torch.randint(2, rows_K.shape, generator=generator, dtype=torch.int8)
        order_K = rows_K.argsort(stable=True)  # by rows, so that a slice of them is one run
        index = torch.int32 if size < 2**31 else torch.int64
        self.rows_K, self.columns_K = (part[order_K].to(index) for part in (rows_K, columns_K))
        self.signs_K = signs_K[order_K]
        self.scale_d = counts_d.clamp_min(1).double().rsqrt()

    def _push(self, z_d: Tensor, start: int, stop: int) -> Tensor:
        run = self._run(start, stop)
        parts = (z_d * self.scale_d.to(z_d.dtype)).index_select(0, self.columns_K[run]) * self.signs_K[run]
        return z_d.new_zeros(stop - start).index_add_(0, self.rows_K[run] - start, parts)

    def _pull(self, g: Tensor, start: int) -> Tensor:
        run = self._run(start, start + len(g))
        parts = g.index_select(0, self.rows_K[run] - start) * self.signs_K[run]
        return g.new_zeros(self.dim).index_add_(0, self.columns_K[run], parts) * self.scale_d.to(g.dtype)

    def _run(self, start: int, stop: int) -> slice:
        """The entries in rows `start` to `stop`."""
        if (start, stop) == (0, self.size):
            return slice(None)
        bounds = torch.tensor([start, stop], dtype=self.rows_K.dtype, device=self.rows_K.device)
        first, last = torch.searchsorted(self.rows_K, bounds).tolist()
        return slice(first, last)


class Fastfood(Projection):
    """P z = the first D of H G Pi H B pad(z) / sqrt(D sum G^2) (arXiv 1804.08838, appendix S7, after Le, Sarlós, Smola,
    2013). H Walsh-Hadamard of size L, the power of two from D on, never stored, with entries +-1 in this equation; B
    random signs; Pi a permutation; G normal. Time D log D and 8 L bytes, for any d.

    B changes only the signs of d numbers. Padding with zeros makes the first transform M = 2^ceil(log2 d) numbers
    long, not L: its result is L / M copies of theirs. So push costs a gather and one long transform, pull one and a
    scatter.

    Coordinates beyond L have no effect: a tensor with fewer weights than that sees the first L of them, which matters
    only for `PerTensor`. A slice costs as much as all rows.
    """

    def __init__(self, size: int, dim: int, seed: int = 0) -> None:
        super().__init__(size, dim, seed)
        self.length = _power_of_two(size)
        self.seen = min(dim, self.length)
        self.short = _power_of_two(self.seen)
        generator = _generator(seed, "fastfood")
        signs_d = 1.0 - 2.0 * torch.randint(2, (self.seen,), generator=generator, dtype=torch.int8).double()
        index = torch.int32 if self.length < 2**31 else torch.int64
        self.order_L = torch.randperm(self.length, generator=generator).to(index)
        self.normal_L = torch.empty(self.length)
        squares = torch.zeros((), dtype=torch.float64)  # no number of Python's, so that a plan can pass shapes alone
        for part in self.normal_L.split(_DRAWN_AT_ONCE):
            part.copy_(torch.randn(part.shape, generator=generator, dtype=torch.float64))
            squares += part.double().square().sum()
        # `walsh_hadamard` is orthonormal: H is sqrt(L) times it, and sqrt(M) of the first H is in the short transform.
        self.scale_d = signs_d * (self.length * self.short / (size * squares)).sqrt()

    def _push(self, z_d: Tensor, start: int, stop: int) -> Tensor:
        padded_M = z_d.new_zeros(self.short)
        torch.mul(z_d[: self.seen], self.scale_d.to(z_d.dtype), out=padded_M[: self.seen])
        mixed_L = walsh_hadamard(padded_M).index_select(0, self.order_L & (self.short - 1)).mul_(self.normal_L)
        return walsh_hadamard(mixed_L)[start:stop]

    def _pull(self, g: Tensor, start: int) -> Tensor:
        padded_L = torch.nn.functional.pad(g, (start, self.length - start - len(g)))
        short_M = walsh_hadamard(_folded(walsh_hadamard(padded_L).mul_(self.normal_L), self.order_L, self.short))
        pulled_d = short_M[: self.seen] * self.scale_d.to(g.dtype)
        return torch.nn.functional.pad(pulled_d, (0, self.dim - self.seen))


class PerTensor(Projection):
    """One projection per tensor, all of the same coordinates: rows [D_1; D_2; ...] (Aghajanyan et al. 2021, "Intrinsic
    Dimensionality Explains the Effectiveness of Language Model Fine-Tuning", arXiv 2012.13255, as in its code).

    Each tensor's columns have unit length, so a whole column has length sqrt(number of tensors), and small tensors move
    as far as large ones.

    Args:
        sizes: weights of each tensor.
        kind: makes the projection of a tensor.
    """

    def __init__(self, sizes: Sequence[int], dim: int, seed: int = 0, kind: ProjectionCallable = Fastfood) -> None:
        super().__init__(sum(sizes), dim, seed)
        self.kind = kind
        self.parts = [kind(size, dim, derived_seed(seed, f"tensor {i}")) for i, size in enumerate(sizes)]

    def _push(self, z_d: Tensor, start: int, stop: int) -> Tensor:
        pieces = [part.push(z_d, first, last) for part, _, first, last in self._overlaps(start, stop)]
        return torch.cat(pieces) if pieces else z_d.new_zeros(0)

    def _pull(self, g: Tensor, start: int) -> Tensor:
        total_d = g.new_zeros(self.dim)
        for part, offset, first, last in self._overlaps(start, start + len(g)):
            total_d += part.pull(g[offset + first - start : offset + last - start], first)
        return total_d

    def _overlaps(self, start: int, stop: int) -> list[tuple[Projection, int, int, int]]:
        """(part, its first row, and the first and last + 1 of its rows) for the parts that have rows in the slice."""
        found, offset = [], 0
        for part in self.parts:
            first, last = max(start - offset, 0), min(stop - offset, part.size)
            if first < last:
                found.append((part, offset, first, last))
            offset += part.size
        return found


def derived_seed(seed: int, stream: str) -> int:
    """A separate seed below 2^63 for each (seed, stream): neighbouring seeds are unrelated."""
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _generator(seed: int, stream: str) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(seed, stream))


def _bernoulli(rows: int, columns: int, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Row and column numbers, int64 [K] each, of independent nonzero entries among rows x columns, column by column."""
    total, last, places = rows * columns, -1, []
    log_miss = torch.log1p(torch.tensor(-probability, dtype=torch.float64))
    while last < total:
        expected = (total - last) * probability
        uniform = torch.rand(int(expected + 4 * expected**0.5) + 16, generator=generator, dtype=torch.float64)
        gaps = (torch.log1p(-uniform) / log_miss).floor_().long() + 1
        places.append(last + gaps.cumsum(0))
        last = int(places[-1][-1])
    found = torch.cat(places)
    found = found[found < total]
    return found % rows, found // rows


def _folded(values_L: Tensor, order_L: Tensor, length: int) -> Tensor:
    """Sums of the values with the same position modulo `length`, a power of two: [length], the same in every run."""
    if values_L.is_cuda:  # sums of colliding writes would have no fixed order there; those of a permutation never meet
        spread_L = torch.empty_like(values_L)
        spread_L[order_L] = values_L
        return spread_L.view(-1, length).sum(0)
    # Ten times faster than scattering on a CPU, in a table that stays in its cache.
    bins = min(len(values_L), max(length, _BINS))
    return values_L.new_zeros(bins).index_add_(0, order_L & (bins - 1), values_L).view(-1, length).sum(0)


def _power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()
