"""Cases in which any two values of different factors meet, instead of all combinations of all factors.

A fault nearly always needs one value or two of them together: Kuhn, Wallace and Gallo, Software Fault Interactions and
Implications for Software Testing, IEEE Transactions on Software Engineering 30(6), 2004.
"""

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest


def pairwise(**factors: Iterable[Any]) -> pytest.MarkDecorator:
    """`pytest.mark.parametrize` over rows of these factors, each a name with its values."""
    names, values = list(factors), [list(given) for given in factors.values()]
    rows = [
        tuple(given[place] for given, place in zip(values, row, strict=True)) for row in covering(*map(len, values))
    ]
    ids = ["-".join(str(getattr(value, "__name__", value)) for value in row) for row in rows]
    return pytest.mark.parametrize(names, rows, ids=ids)


def covering(*sizes: int) -> list[tuple[int, ...]]:
    """Rows of places below `sizes` in which every pair of places of two columns occurs; greedy, so nearly as few as can
    be, and always the same.
    """
    left, rows = list(product(*map(range, sizes))), []
    missing = {pair for row in left for pair in combinations(enumerate(row), 2)}
    while missing:
        best = max(left, key=lambda row: len(missing.intersection(combinations(enumerate(row), 2))))
        missing.difference_update(combinations(enumerate(best), 2))
        rows.append(best)
    return sorted(rows)
