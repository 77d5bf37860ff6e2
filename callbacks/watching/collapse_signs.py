"""When figures of a run mean that its embeddings collapse, and why they may.

Rules compare a measurement with the first one of the run and with the best one so far, so that a network whose
untrained embeddings lie close together, as most do, is judged by what becomes of them. Two need no comparison: no sound
network gives most samples the same embedding, at first or later, or embeddings a hundred times as long as numbers of
variance 1 are.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Figures = Mapping[str, float]

NARROW = 0.15
"""Spread below which embeddings are nearly one point. Those of most untrained networks are; what tells is a fall."""

LONG = 100.0
"""How many times as long as at first, and as numbers of variance 1, embeddings are that have blown up. Objectives and
normalisation bring numbers near variance 1 from whatever they are at first, so that growth alone is no sign.
"""
FEW = 5.0
"""RankMe below which a fall to a third is a sign; above it, to a tenth."""
RATE = "the learning rate is likely too high: lower it, warm up longer or clip gradients"


@dataclass(frozen=True)
class Sign:
    """One way to collapse.

    Attributes:
        shows: (now, first, best) -> whether a measurement shows it; `best` has the highest value of each figure yet.
        finding: what is said of it, with figures in braces: those of `now`, and `first_` and `best_` before a name.
        advice: the likely cause and the way out; {apart} is what the method has to hold samples apart.
    """

    shows: Callable[[Figures, Figures, Figures], bool]
    finding: str
    advice: str


def _finite(figures: Figures) -> bool:
    return all(map(math.isfinite, figures.values()))


def _one_point(now: Figures, first: Figures, best: Figures) -> bool:
    return now["spread"] < best["spread"] * (0.75 if now["spread"] < NARROW else 0.5)


def _equal(now: Figures, first: Figures, best: Figures) -> bool:
    return now["duplicates"] > max(0.5, 2 * now["equal_samples"])


def _equal_since(now: Figures, first: Figures, best: Figures) -> bool:
    return _equal(now, first, best) and not _equal(first, first, first)


def _always_equal(now: Figures, first: Figures, best: Figures) -> bool:
    return _equal(now, first, best) and _equal(first, first, first)


def _few_directions(now: Figures, first: Figures, best: Figures) -> bool:
    # Transformers often begin with many random directions, of which a sound run may lose three quarters: a third of the
    # best counts only where few are left.
    return now["rankme"] < max(best["rankme"] / 10, min(best["rankme"] / 3, FEW))


def _blown_up(now: Figures, first: Figures, best: Figures) -> bool:
    return now["length"] > LONG * max(first["length"], math.sqrt(now["width"]))


def _one_prototype(now: Figures, first: Figures, best: Figures) -> bool:
    return "prototypes_in_use" in now and now["prototypes_in_use"] < 2 <= 0.5 * best["prototypes_in_use"]


def _told_apart(figures: Figures) -> float:
    """How well assignments distinguish samples, in nats: the log of how many times more prototypes all samples together
    use than one of them. 0 where all samples have the same assignment.
    """
    in_use, a_sample = figures["prototypes_in_use"], figures["prototypes_a_sample"]
    return math.log(in_use / a_sample) if a_sample else 0.0


def _same_assignments(now: Figures, first: Figures, best: Figures) -> bool:
    return "told_apart" in now and now["told_apart"] < 0.1 * best["told_apart"] and best["told_apart"] > 0.1


APART = "its stop-gradient and predictor, variance term or negatives are there, at the published weight"
"""What is said for {apart} of an objective of which nothing is known but that it compares embeddings."""
TARGETS = "its targets differ between samples, and weight decay is not too strong: it compares no embeddings"
"""The same of one that compares none."""

_NOTHING_HOLDS = "see that the objective tells samples apart: that {apart}"
SIGNS: dict[str, Sign] = {
    "not finite": Sign(
        lambda now, first, best: not _finite(now) and _finite(first), "embeddings are not finite", RATE
    ),
    "never finite": Sign(
        lambda now, first, best: not _finite(now) and not _finite(first),
        "embeddings are not finite, and were not at the first step",
        "look for such numbers in the data and in the weights that the run starts from",
    ),
    "blown up": Sign(
        _blown_up, "embeddings are {length:.3g} long (first {first_length:.3g}): they have blown up", RATE,
    ),
    "one point": Sign(
        _one_point, "embeddings of all samples become one point (spread {spread:.3f}, best {best_spread:.3f})",
        f"{_NOTHING_HOLDS}; or {RATE}",
    ),
    "equal embeddings": Sign(
        _equal_since, "{duplicates:.0%} of the samples have the same embedding as another (first "
        "{first_duplicates:.0%})", f"{_NOTHING_HOLDS}; or augmentation leaves nothing of the samples; or {RATE}",
    ),
    "always equal": Sign(
        _always_equal, "{duplicates:.0%} of the samples have the same embedding as another, and had it from the first "
        "step ({first_duplicates:.0%})", "a part of the network lets nothing through: look for weights that are zero "
        "or frozen, dead units, and a head or input that is detached or masked",
    ),
    "few directions": Sign(
        _few_directions, "embeddings keep few directions (RankMe {rankme:.1f}, best {best_rankme:.1f})",
        f"features become copies of one another: {_NOTHING_HOLDS}; weaken the augmentation, or give a projector "
        f"another width; or {RATE}. With labels, as many directions as classes are what the objective wants",
    ),
    "one prototype": Sign(
        _one_prototype, "all samples go to {prototypes_in_use:.1f} prototypes (best {best_prototypes_in_use:.1f})",
        f"{_NOTHING_HOLDS}, and keep prototypes fixed in the first steps; or {RATE}",
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
        self.told: list[str] = []  # signs that have shown often enough, and still do

    def look(self, figures: Figures, apart: str = APART, least: int = 0) -> list[str]:
        """What to say of one more measurement: each sign once, when it has shown `patience` times in succession.

        Args:
            figures: those that are logged, the `width` of embeddings, and the share of `equal_samples` in the data.
            apart: what the method has to hold samples apart, as a clause.
            least: measurements that must show a sign this time, if they are more than `patience`.
        """
        now = dict(figures)
        if "prototypes_in_use" in now:
            now["told_apart"] = _told_apart(now)
        if not self.first:
            self.first = dict(now)
        for name, value in now.items():
            self.best[name] = max(self.best.get(name, -math.inf), value if math.isfinite(value) else -math.inf)
        words: dict[str, Any] = {"apart": apart} | now | _prefixed("first", self.first) | _prefixed("best", self.best)
        said = []
        for name, sign in SIGNS.items():
            self.shown[name] = self.shown.get(name, 0) + 1 if sign.shows(now, self.first, self.best) else 0
            if self.shown[name] >= max(self.patience, least) and name not in self.told:
                self.told.append(name)
                said.append(f"{sign.finding}; {sign.advice}".format(**words))
        self.told = [name for name in self.told if self.shown[name]]
        return said

    @property
    def sound(self) -> bool:
        """Whether the last measurement showed no sign at all."""
        return bool(self.first) and not any(self.shown.values())

    @property
    def collapsed(self) -> int:
        """Signs that have shown often enough, and still do."""
        return len(self.told)

    def start_anew(self) -> None:
        """For a run that was rolled back: signs count from zero, what they are compared with stays."""
        self.shown, self.told = {}, []

    def state_dict(self) -> dict[str, Any]:
        kept = {"first": dict(self.first), "best": dict(self.best), "shown": dict(self.shown)}
        return {**kept, "told": list(self.told)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.first, self.best, self.shown = (dict(state[name]) for name in ("first", "best", "shown"))
        self.told = list(state["told"])


def _prefixed(prefix: str, figures: Figures) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in figures.items()}
