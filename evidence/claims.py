"""Claims and figures of evidence records in words, as the pages show them."""

from collections import Counter
from collections.abc import Mapping, Sequence

from verdicts import Claim, Record, interval, verdict


def number(value: float | None) -> str:
    """Four significant digits, without an exponent where it can be helped."""
    return "not finite" if value is None else f"{value or 0.0:.4g}"  # no -0


def quantity(value: float | None, unit: str) -> str:
    return f"{number(value)} {unit}".strip()


def margin(bound: Mapping[str, float]) -> str:
    ((kind, value),) = bound.items()
    return f"{'>=' if kind == 'at_least' else '<='} {number(value)}"


def shortfall(claim: Claim) -> str:
    """How far a claim that does not hold is from its margin, and how far its floor and ceiling are; empty if its value
    is not finite.
    """
    if claim["value"] is None:
        return ""
    ((_, bound),) = claim["margin"].items()
    value, floor, ceiling = (abs(claim[name] - bound) for name in ("value", "floor", "ceiling"))
    return (
        f"Misses the margin by {quantity(value, claim['unit'])}; the floor misses it by {number(floor)}, the ceiling "
        f"keeps it by {number(ceiling)}."
    )


def ends(claim: Claim) -> str:
    """The 95 % interval of the mean over seeds; empty where there is none."""
    between = interval(claim)
    return "" if between is None else f"{number(between[0])} to {number(between[1])}"


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def tally(record: Record, about: Sequence[Claim] | None = None) -> str:
    """How many held of the claims that are decided, or of those `about` something, and how many are not;
    bold where it is not all of them.
    """
    claims = record["claims"] if about is None else about
    words = Counter(verdict(claim, record).word for claim in claims)
    told = words["held"] + words["not held"]
    parts = [f"{words['held']} of {told}"] if told or not claims else []
    parts += [f"{words['could not tell']} open"] * bool(words["could not tell"])
    parts += ["incomplete"] * (not record["complete"])
    text = ", ".join(parts)
    return text if record["complete"] and words["held"] == len(claims) else f"**{text}**"


def figure(claim: Claim) -> str:
    """What a claim measured, as it was judged: `probe, ours minus theirs: 1.019 points (0.41 to 1.63)`."""
    text = f"{claim['name']}: {quantity(claim['value'], claim['unit'])}"
    return f"{text} ({ends(claim)})" if ends(claim) else text
