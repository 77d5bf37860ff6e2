"""When figures of a run mean that its embeddings collapse, and why they may.

Each rule compares a measurement with the first one of the run and with the best one so far, so that a network whose
untrained embeddings lie close together, as most do, is judged by what becomes of them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Figures = Mapping[str, float]

NARROW = 0.15
"""Spread below which embeddings are nearly one point. Those of most untrained networks are; what tells is a fall."""

RATE = "the learning rate is likely too high: lower it, warm up longer or clip gradients"


@dataclass(frozen=True)
class Sign:
    """One way to collapse.

    Attributes:
        shows: (now, first, best) -> whether a measurement shows it; `best` has the highest value of each figure yet.
        finding: what is said of it, with figures in braces: those of `now`, and `first_` and `best_` before a name.
        advice: the likely cause and the way out.
    """

    shows: Callable[[Figures, Figures, Figures], bool]
    finding: str
    advice: str


def _one_point(now: Figures, first: Figures, best: Figures) -> bool:
    return now["spread"] < best["spread"] * (0.75 if now["spread"] < NARROW else 0.5)


def _equal(now: Figures, first: Figures, best: Figures) -> bool:
    return now["duplicates"] > max(0.5, 2 * first["duplicates"])


def _few_directions(now: Figures, first: Figures, best: Figures) -> bool:
    return now["rankme"] < best["rankme"] / 3  # a sound run may lose a quarter of its best


def _blown_up(now: Figures, first: Figures, best: Figures) -> bool:
    return now["length"] > 100 * first["length"] > 0 and now["rankme"] < 2 * first["rankme"]


def _one_prototype(now: Figures, first: Figures, best: Figures) -> bool:
    return "prototypes_in_use" in now and now["prototypes_in_use"] < 2 <= 0.5 * best["prototypes_in_use"]


def _told_apart(figures: Figures) -> float:
    """How well assignments distinguish samples, in nats: the log of how many times more prototypes all samples together
    use than one of them. 0 where all samples have the same assignment.
    """
    return math.log(figures["prototypes_in_use"] / figures["prototypes_a_sample"])


def _same_assignments(now: Figures, first: Figures, best: Figures) -> bool:
    return "told_apart" in now and now["told_apart"] < 0.1 * best["told_apart"] and best["told_apart"] > 0.1


_NOTHING_HOLDS = (
    "nothing holds different samples apart: see that the objective has its stop-gradient and predictor, its variance "
    "term or its negatives, at the published weight"
)
SIGNS: dict[str, Sign] = {
    "not finite": Sign(
        lambda now, first, best: not all(map(math.isfinite, now.values())), "embeddings are not finite", RATE
    ),
    "one point": Sign(
        _one_point, "embeddings of all samples become one point (spread {spread:.3f}, best {best_spread:.3f})",
        f"{_NOTHING_HOLDS}; or {RATE}",
    ),
    "equal embeddings": Sign(
        _equal, "{duplicates:.0%} of the samples have the same embedding as another (first {first_duplicates:.0%})",
        f"{_NOTHING_HOLDS}; or augmentation leaves nothing of the samples",
    ),
    "few directions": Sign(
        _few_directions, "embeddings keep few directions (RankMe {rankme:.1f}, best {best_rankme:.1f})",
        "features become copies of one another: raise the term that decorrelates them or the temperature, weaken the "
        f"augmentation, or give the projector another width; or {RATE}. With labels, as many directions as classes are "
        "what the objective wants",
    ),
    "blown up": Sign(
        _blown_up, "embeddings are {length:.3g} long (first {first_length:.3g}) and keep few directions (RankMe "
        "{rankme:.1f})", RATE,
    ),
    "one prototype": Sign(
        _one_prototype, "all samples go to {prototypes_in_use:.1f} prototypes (best {best_prototypes_in_use:.1f})",
        "centre the teacher's scores faster, or run Sinkhorn for more iterations, and keep prototypes fixed in the "
        f"first steps; or {RATE}",
    ),
    "same assignments": Sign(
        _same_assignments, "samples are no longer told apart: each goes to {prototypes_a_sample:.1f} of "
        "{prototypes_in_use:.1f} prototypes", "sharpen: lower the teacher's temperature, or centre more slowly",
    ),
}  # fmt: skip


class Judge:
    """Keeps what measurements are compared with, and says which signs have shown.

    Args:
        patience: measurements in succession that must show a sign, >= 1.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.first: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.shown: dict[str, int] = {}  # sign -> measurements in succession

    def look(self, figures: Figures) -> list[str]:
        """What to say of one more measurement: each sign once, when it has shown `patience` times in succession."""
        now = dict(figures)
        if "prototypes_in_use" in now:
            now["told_apart"] = _told_apart(now)
        if not self.first:
            self.first = dict(now)
        for name, value in now.items():
            if not value <= self.best.get(name, -math.inf) and not math.isnan(value):
                self.best[name] = value
        words: dict[str, float] = now | _prefixed("first", self.first) | _prefixed("best", self.best)
        said = []
        for name, sign in SIGNS.items():
            self.shown[name] = self.shown.get(name, 0) + 1 if sign.shows(now, self.first, self.best) else 0
            if self.shown[name] == self.patience:
                said.append(f"{sign.finding.format(**words)}; {sign.advice}")
        return said

    @property
    def sound(self) -> bool:
        """Whether the last measurement showed no sign at all."""
        return bool(self.first) and not any(self.shown.values())

    @property
    def collapsed(self) -> int:
        """Signs that have shown often enough, and still do."""
        return sum(count >= self.patience for count in self.shown.values())

    def start_anew(self) -> None:
        """For a run that was rolled back: signs count from zero, what they are compared with stays."""
        self.shown = {}

    def state_dict(self) -> dict[str, Any]:
        return {"first": dict(self.first), "best": dict(self.best), "shown": dict(self.shown)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.first, self.best, self.shown = (dict(state[name]) for name in ("first", "best", "shown"))


def _prefixed(prefix: str, figures: Figures) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in figures.items()}
