"""What a claim of a record is worth: held, not held, or could not tell, and why.

A claim can be judged only where the same protocol could have shown both answers: its *floor*, the value with an arm
that learned nothing instead of the first, misses the margin; its *ceiling*, the value with an oracle instead, keeps
it; each arm passed its *gate*, so that it learned what it was trained on; and no arm's best setting is an edge of its
search. Then it holds if the mean over seeds keeps the margin and the interval of the mean lies beyond the point where
nothing would be gained. Everything is worked out from the record, so that a better rule judges old records too.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scipy.stats import t as student_t

CONFIDENCE = 0.95
UNMEASURED = "no floor, ceiling or gate was measured"

Claim = Mapping[str, Any]
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """`word` is "held", "not held" or "could not tell"; `reason` says why it could not be told, else it is empty."""

    word: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.word}: {self.reason}" if self.reason else self.word


def asks(claim: Claim) -> str:
    """What a claim asks for: *better* where two equal arms would not keep the margin, *not much worse* where they
    would, *level* where nothing is compared. Names tell: A minus B or A below B is a difference, A over B a ratio.
    """
    equal = equal_arms(claim)
    return "level" if equal is None else "not much worse" if keeps(claim, equal) else "better"


def equal_arms(claim: Claim) -> float | None:
    """The value of two equal arms: 0 for a difference, 1 or 100 % for a ratio, None where nothing is compared."""
    words = set(claim["name"].replace(",", "").split())
    if words & {"minus", "below"}:
        return 0.0
    return None if "over" not in words else 100.0 if claim["unit"] == "%" else 1.0


def keeps(claim: Claim, value: float | None) -> bool:
    """Whether a value keeps the claim's margin; one that is not finite keeps none."""
    if value is None or not math.isfinite(value):
        return False
    ((kind, bound),) = claim["margin"].items()
    return bool(value >= bound if kind == "at_least" else value <= bound)


def interval(claim: Claim) -> tuple[float, float] | None:
    """The ends of Student's 95 % interval of the mean over seeds; None for a claim of one number, or one seed."""
    values = list((claim["per_seed"] or {}).values())
    if len(values) < 2 or None in values:
        return None
    half = student_t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def passed(gate: Mapping[str, Any]) -> bool:
    """Whether an arm learned: by the stated amount on average, and by a tenth of it in each seed, so that no seed that
    stayed where it began, or diverged, is among them.
    """
    gains = gate["gains"].values()
    return None not in gains and min(gains) >= gate["by"] / 10 and statistics.fmean(gains) >= gate["by"]


def best(tried: Mapping[str, float | None]) -> str | None:
    """The setting with the best score, higher being better; None if no score is finite."""
    finite = {setting: score for setting, score in tried.items() if score is not None}
    return max(finite, key=finite.__getitem__) if finite else None


def on_edge(search: Mapping[str, Any], arm: str) -> bool:
    """Whether the arm's best setting is the least or largest that was tried and the setting could go on there."""
    chosen = best(search["tried"][arm])
    if chosen is None:
        return True
    settings = [float(setting) for setting in search["tried"][arm]]
    return float(chosen) in {min(settings), max(settings)} - set(search["limits"])


def verdict(claim: Claim, record: Record) -> Verdict:
    """The judgement of one claim of a record."""
    obstacles = _obstacles(claim, record)
    if obstacles:
        return Verdict("could not tell", "; ".join(obstacles))
    if not keeps(claim, claim["value"]):
        return Verdict("not held")
    ends = interval(claim)
    if ends is None:
        return Verdict("could not tell", "one seed has no interval") if claim["per_seed"] else Verdict("held")
    end = ends["at_most" in claim["margin"]]  # the end that a doubter would take
    if _gains(claim, end):
        return Verdict("held")
    return Verdict("could not tell", f"its interval is {ends[0]:.4g} to {ends[1]:.4g}; more seeds are needed")


def _gains(claim: Claim, end: float) -> bool:
    """Whether the less favourable end of the interval is on the claim's side of equal arms; of the margin, where equal
    arms keep it; of the floor, where nothing is compared.
    """
    kind = asks(claim)
    if kind == "not much worse":
        return keeps(claim, end)
    nothing = equal_arms(claim) if kind == "better" else claim["floor"]
    assert nothing is not None
    return end > nothing if "at_least" in claim["margin"] else end < nothing


def _obstacles(claim: Claim, record: Record) -> list[str]:
    """Why the experiment could not have told, whatever its figures."""
    floor, ceiling, arms = claim.get("floor"), claim.get("ceiling"), claim.get("arms")
    if floor is None or ceiling is None or arms is None:
        return [UNMEASURED]
    found = []
    if not record["complete"]:
        found.append("the run stopped before its end")
    if keeps(claim, floor):
        found.append(f"the floor, {floor:.4g}, keeps it too")
    if not keeps(claim, ceiling):
        found.append(f"the ceiling, {ceiling:.4g}, misses it")
    gates, searches = record["gates"], record["searches"]
    for arm in arms:
        if arm not in gates:
            found.append(f"{arm} has no gate")
        elif not passed(gates[arm]):
            found.append(f"{arm} did not learn")
    for search in searches:
        searched = set(arms) & search["tried"].keys()
        if searched and searched != set(arms):
            found.append(f"the {search['what']} of {', '.join(sorted(set(arms) - searched))} was not searched")
        edges = [arm for arm in arms if arm in searched and on_edge(search, arm)]
        found += [f"the best {search['what']} of {arm} is an edge" for arm in edges]
    return found
