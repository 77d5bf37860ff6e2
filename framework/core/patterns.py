"""Names chosen by shell-style patterns, the one way in which users of this project select parts of a module."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import pairwise

from lightspan.core.errors import UserError

_OF_A_LAYER = ("weight", "bias")


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted name matches any shell-style pattern (`*` crosses dots)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def any_matches(names: Iterable[str], patterns: Sequence[str]) -> bool:
    """Whether any of the names matches any pattern: of a tied parameter, which has several."""
    return any(matches(name, patterns) for name in names)


def require_patterns(patterns: Sequence[str], setting: str) -> None:
    """Raises: UserError for text where a list of patterns belongs: each of its letters would be one."""
    if isinstance(patterns, str):
        raise UserError(f"{setting}={patterns!r} must be a list of patterns, such as [{patterns!r}]")


def require_matches(
    patterns: Sequence[str],
    names: Sequence[str],
    what: str,
    setting: str = "match",
    sizes: Mapping[str, int] | None = None,
) -> None:
    """Raises: UserError for a pattern that matches none of `names`, with the most similar of them and patterns that
    do match, and for text instead of a list.

    Args:
        what: what they name, such as "trained parameter of CausalLM".
        setting: where the patterns come from.
        sizes: how many numbers there are in those of the names that a pattern may be suggested for; None: in each of
            them as many.
    """
    require_patterns(patterns, setting)
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            offered = suggestions(pattern, sizes or dict.fromkeys(names, 1))
            like = get_close_matches(pattern.strip("*."), names, n=3, cutoff=0.4)
            like = like or [name for name in names if matches(name, offered[:1])][:3] or list(names[:3])
            ways = f"; patterns that match: {', '.join(map(repr, offered))}" if offered else ""
            raise UserError(
                f"pattern {pattern!r} matches no {what}; names look like {', '.join(like) or '(none)'}{ways}"
            )


def suggestions(pattern: str, sizes: Mapping[str, int]) -> list[str]:
    """Up to three patterns that match some of the names: first the one that `pattern` seems to mean, then those of the
    stacks of layers and of the kinds of layers that hold most numbers, such as `*blocks.*` and `*qkv.weight`.
    """
    held: dict[str, int] = {}
    for name, size in sizes.items():
        parts = name.split(".")
        words = [part for part in parts if not part.isdecimal()]
        # The last word of a parameter, such as weight, says little without the one before it.
        ends = words[-2:] if len(words) > 1 and words[-1] in _OF_A_LAYER else words[-1:]
        stacks = [first for first, second in pairwise(parts) if second.isdecimal()]
        for one in {f"*{'.'.join(ends)}", *(f"*{stack}.*" for stack in stacks if not stack.isdecimal())}:
            held[one] = held.get(one, 0) + size
    known = sorted(held, key=lambda one: -held[one])
    core = pattern.strip("*.")
    meant = [one for one in (f"*{core}", f"*{core}*") if core and any(matches(name, [one]) for name in sizes)]
    if not meant:
        spelt = {one.strip("*."): one for one in reversed(known)}
        spelt = {word.partition(".")[0]: one for word, one in spelt.items()} | spelt
        meant = [spelt[word] for word in get_close_matches(core, spelt, n=1, cutoff=0.75)]
    return list(dict.fromkeys([*meant[:1], *known]))[:3]
