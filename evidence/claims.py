"""Claims and figures of evidence records in words, as the pages show them."""

from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]


def number(value: float | None) -> str:
    """Four significant digits, without an exponent where it can be helped."""
    return "not finite" if value is None else f"{value:.4g}"


def quantity(value: float | None, unit: str) -> str:
    return f"{number(value)} {unit}".strip()


def margin(bound: dict[str, float]) -> str:
    ((kind, value),) = bound.items()
    return f"{'>=' if kind == 'at_least' else '<='} {number(value)}"


def asks(claim: dict[str, Any]) -> str:
    """What a claim asks for: *better* where two equal arms would not keep the margin, *not much worse* where they
    would, *level* where nothing is compared. Names tell: A minus B or A below B is a difference, A over B a ratio.
    """
    words = claim["name"].replace(",", "").split()
    if not {"minus", "below", "over"} & set(words):
        return "level"
    equal = 0.0 if {"minus", "below"} & set(words) else 100.0 if claim["unit"] == "%" else 1.0
    ((kind, value),) = claim["margin"].items()
    return "not much worse" if (equal >= value if kind == "at_least" else equal <= value) else "better"


def middle(claim: dict[str, Any]) -> str:
    """The median over seeds; empty for a claim of one number."""
    return "" if claim["median"] is None else number(claim["median"])


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def held(record: Record, about: Sequence[dict[str, Any]] | None = None) -> str:
    """How many of the claims held, or of those `about` something; bold where it is not all of them."""
    claims = record["claims"] if about is None else about
    count = sum(claim["held"] for claim in claims)
    text = f"{count} of {len(claims)}"
    if not record["complete"]:
        text += ", incomplete"
    return text if record["complete"] and count == len(claims) else f"**{text}**"


def by_kind(claims: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The claims by what they ask for; kinds without a claim are left out."""
    sorted_out: dict[str, list[dict[str, Any]]] = {"better": [], "not much worse": [], "level": []}
    for claim in claims:
        sorted_out[asks(claim)].append(claim)
    return {kind: of for kind, of in sorted_out.items() if of}


def figure(claim: dict[str, Any]) -> str:
    """What a claim measured: `probe, ours minus theirs: 1.019 points`; with the median over seeds where the mean keeps
    the margin and the claim failed by the median.
    """
    text = f"{claim['name']}: {quantity(claim['value'], claim['unit'])}"
    return f"{text}, median {middle(claim)}" if not claim["held"] and _keeps_the_margin(claim) else text


def _keeps_the_margin(claim: dict[str, Any]) -> bool:
    """Whether the mean alone does."""
    if claim["value"] is None:
        return False
    ((kind, bound),) = claim["margin"].items()
    return bool(claim["value"] >= bound if kind == "at_least" else claim["value"] <= bound)
