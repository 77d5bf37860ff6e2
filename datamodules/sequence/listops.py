"""ListOps: nested lists of digits under operators, whose value is a digit. Drawn here, with their values.

Source: Nangia and Bowman, "ListOps", 2018, arXiv 1804.06028; Tay et al., "Long Range Arena", 2020, arXiv 2011.04006,
section 2.2.1, whose shares, sizes and lengths are the defaults. Brackets around arguments, which LRA drops too, are
left out. Shapes: N expressions, L symbols, d levels, a arguments.
"""

from typing import Any, NamedTuple

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.sequence.sets import Labelled, SequenceSets, SymbolRows

SYMBOLS = ("", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
"""By number; 0 is padding. MED is the lower whole number of the median, SM the sum modulo 10."""
OPERATORS, CLOSE = SYMBOLS.index("[MIN"), SYMBOLS.index("]")
CANDIDATES = 2048
"""Expressions that are drawn at once; those of other lengths are left out."""


class Expressions(NamedTuple):
    """symbols: uint8 [N, L], 0 behind an end; lengths: int64 [N], 0 where an expression did not end within L symbols;
    values: int64 [N].
    """

    symbols: np.ndarray
    lengths: np.ndarray
    values: np.ndarray


def values_of(operator_N: np.ndarray, digits_Na: np.ndarray, count_N: np.ndarray) -> np.ndarray:
    """Of N lists, of whose arguments the first `count` are there, at least one: int64 [N]."""
    there_Na = np.arange(digits_Na.shape[1]) < count_N[:, None]
    ordered_Na = np.sort(np.where(there_Na, digits_Na.astype(np.int64), 99), axis=1)
    own = np.arange(len(count_N))
    middle_N = (ordered_Na[own, (count_N - 1) // 2] + ordered_Na[own, count_N // 2]) // 2
    sum_N = np.where(there_Na, digits_Na, 0).sum(axis=1) % 10
    return np.choose(operator_N, [ordered_Na[:, 0], ordered_Na[own, count_N - 1], middle_N, sum_N])


def draw(
    generator: np.random.Generator, count: int, longest: int, depth: int, arguments: int, nested: float
) -> Expressions:
    """`count` expressions, all at once, symbol by symbol.

    Args:
        longest: L; an expression that has no end by then is given up.
        depth: levels of lists in one another, at least 1.
        arguments: most of a list, at least 2, which is the least.
        nested: probability that an argument is a list and no digit.
    """
    operator_Nd, left_Nd, count_Nd = (np.zeros((count, depth), dtype=np.int64) for _ in range(3))
    digits_Nda = np.zeros((count, depth, arguments), dtype=np.uint8)
    level_N, lengths_N, values_N = np.full(count, -1), np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    symbols_NL = np.zeros((count, longest), dtype=np.uint8)
    for place in range(longest):
        rows = np.flatnonzero(lengths_N == 0)
        if not len(rows):
            break
        shares_n, digit_n = generator.random(len(rows)), generator.integers(10, size=len(rows))
        kind_n, most_n = generator.integers(4, size=len(rows)), generator.integers(2, arguments + 1, size=len(rows))
        level_n = level_N[rows]
        closes_n = (level_n >= 0) & (left_Nd[rows, level_n] == 0)
        opens_n = ~closes_n & ((level_n < 0) | ((level_n + 1 < depth) & (shares_n < nested)))
        given_n = digit_n

        opened, at = rows[opens_n], level_n[opens_n]
        inner = at >= 0
        left_Nd[opened[inner], at[inner]] -= 1
        level_N[opened] = at + 1
        operator_Nd[opened, at + 1], left_Nd[opened, at + 1] = kind_n[opens_n], most_n[opens_n]
        count_Nd[opened, at + 1] = 0
        symbols_NL[opened, place] = OPERATORS + kind_n[opens_n]

        closed, at = rows[closes_n], level_n[closes_n]
        given_n[closes_n] = values_of(operator_Nd[closed, at], digits_Nda[closed, at], count_Nd[closed, at])
        level_N[closed] = at - 1
        symbols_NL[closed, place] = CLOSE
        ended = at == 0
        lengths_N[closed[ended]], values_N[closed[ended]] = place + 1, given_n[closes_n][ended]

        plain_n = ~closes_n & ~opens_n
        left_Nd[rows[plain_n], level_n[plain_n]] -= 1
        symbols_NL[rows[plain_n], place] = 1 + digit_n[plain_n]
        # A digit, or the value of a list that has just closed, is an argument of the list around it.
        arrives_n = plain_n | (closes_n & (level_n > 0))
        to, at = rows[arrives_n], level_N[rows[arrives_n]]
        digits_Nda[to, at, count_Nd[to, at]] = given_n[arrives_n]
        count_Nd[to, at] += 1
    return Expressions(symbols_NL, lengths_N, values_N)


class ListOps(SequenceSets):
    """Expressions, all of them different, whose class is their value: batches of `LabelledTextBatch`.

    A larger set begins with the expressions of a smaller one; the first `test_size` are for testing.

    Args:
        size, test_size: expressions for training and for testing, each at least 1.
        shortest, longest: symbols of an expression, operators and brackets counted; the second is L.
        depth: levels of lists in one another, at least 1.
        arguments: most of a list, at least 2.
        nested: probability that an argument is a list and no digit, in [0, 1].
        drawn_by: seed of the expressions; `seed` is that of the order.
        settings: those of `SequenceSets`.
    Raises: UserError for sizes out of range, or where too few expressions have such a length.
    """

    num_classes = 10
    vocab_size = len(SYMBOLS)

    def __init__(
        self,
        size: int = 96_000,
        test_size: int = 2_000,
        shortest: int = 500,
        longest: int = 2_000,
        depth: int = 10,
        arguments: int = 10,
        nested: float = 0.25,
        drawn_by: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if min(size, test_size, depth) < 1 or arguments < 2 or not 0 <= nested <= 1 or not 4 <= shortest <= longest:
            raise UserError(
                f"ListOps size={size}, test_size={test_size} and depth={depth} must be at least 1, "
                f"arguments={arguments} at least 2, nested={nested} in [0, 1], and shortest={shortest} at least 4 and "
                f"at most longest={longest}"
            )
        require_numbers((size + test_size) * longest, size=size, test_size=test_size, longest=longest)
        require_numbers(CANDIDATES * depth * arguments, depth=depth, arguments=arguments)
        self.size, self.test_size, self.shortest, self.longest = size, test_size, shortest, longest
        self.depth, self.arguments, self.nested, self.drawn_by = depth, arguments, nested, drawn_by

    def load(self) -> tuple[Labelled, Labelled]:
        wanted, known = self.size + self.test_size, set[bytes]()
        found: list[tuple[np.ndarray, int, int]] = []
        tried = 0
        while len(found) < wanted:
            generator = np.random.default_rng((self.drawn_by, tried))
            drawn = draw(generator, CANDIDATES, self.longest, self.depth, self.arguments, self.nested)
            before, tried = len(found), tried + 1
            for place in np.flatnonzero(drawn.lengths >= self.shortest):
                if (key := drawn.symbols[place].tobytes()) not in known:
                    known.add(key)
                    found.append((drawn.symbols[place], int(drawn.lengths[place]), int(drawn.values[place])))
            if len(found) - before < CANDIDATES // 500:
                raise UserError(
                    f"ListOps found {len(found)} different expressions of {self.shortest} to {self.longest} symbols, "
                    f"and size={self.size} and test_size={self.test_size} ask for more; lower them, or change the "
                    "lengths, depth, arguments or nested"
                )
        rows, lengths, values = (np.array(column) for column in zip(*found[:wanted], strict=True))
        data = SymbolRows(rows, values.astype(np.int64), lengths.astype(np.int64))
        parts = slice(self.test_size, None), slice(self.test_size)
        training, test = (SymbolRows(*(column[part] for column in data)) for part in parts)
        return training, test
