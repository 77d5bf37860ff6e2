"""Records what an evidence run measured, also what fell short, as evidence/results/<system>.json."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from surroundings import surroundings, threads
from verdicts import Verdict, best, on_edge, verdict

from lightspan.core.files.atomic import write_atomic

Figure = float | Mapping[int, float]


class Recorder:
    """The `evidence` fixture: one for each evidence file.

    Args:
        system: the file's name without `test_` and `.py`, e.g. 42_mixed_barlow_twins.
        title: what was measured, one line.
        path: the JSON file, written after each test and replaced as a whole.
    """

    def __init__(self, system: str, title: str, path: Path) -> None:
        self.path, self.started = path, time.perf_counter()
        self.ended: set[str] = set()  # tests of the file that ran to their end
        self.record: dict[str, Any] = {
            "system": system,
            "title": title,
            "command": f"make evidence SYSTEM={system.split('_')[0]}",
            **surroundings(),
            "seconds": 0.0,
            "complete": False,
            "notes": [],
            "searches": [],
            "gates": {},
            "claims": [],
            "figures": [],
        }

    def figure(self, name: str, value: float, seed: int | None = None, unit: str = "") -> None:
        """Records one measured number that no margin is set for."""
        self.record["figures"].append({"name": name, "value": _finite(value), "seed": seed, "unit": unit})

    def search(
        self,
        arms: Mapping[str, Callable[[float], float]],
        settings: Sequence[float],
        *,
        what: str = "rate",
        seed: int = 100,
        limits: Sequence[float] = (),
        rounds: int = 4,
    ) -> dict[str, float]:
        """The best setting of each arm. All arms try all settings, whose range is widened, by the ratio of the
        outermost two, until no arm's best is an edge.

        Args:
            arms: {arm: its score on validation data at a setting, higher being better}. NaN is the worst.
            settings: at least three positive numbers in a rising order.
            seed: the search's own, for the record; no claim is measured on it.
            limits: settings beyond which there is nothing, such as a share of 1; a best one there is no edge.
            rounds: extensions at most. An arm that is still best at an edge then has no claim that could be told.
        """
        tried: dict[str, dict[str, float | None]] = {arm: {} for arm in arms}
        found = {"what": what, "seed": seed, "limits": list(limits), "tried": tried}
        self.record["searches"].append(found)
        ahead = list(settings)
        for _ in range(rounds + 1):
            for arm, score in arms.items():
                tried[arm] |= {repr(setting): _finite(score(setting)) for setting in ahead}
            bests = {arm: best(of) for arm, of in tried.items()}
            edges = {float(bests[arm] or settings[0]) for arm in arms if on_edge(found, arm)}
            if not edges:
                break
            known = sorted(float(setting) for setting in tried[next(iter(arms))])
            ahead = [known[0] ** 2 / known[1]] * (known[0] in edges) + [known[-1] ** 2 / known[-2]] * (
                known[-1] in edges
            )
        return {arm: float(bests[arm] or "nan") for arm in arms}

    def gate(
        self,
        arm: str,
        trained: Mapping[int, float],
        untrained: Figure,
        *,
        by: float,
        unit: str = "",
        lower_is_better: bool = False,
    ) -> None:
        """Records how far an arm's own training figure is ahead of the untrained network's.

        Args:
            arm: as claims and searches name it.
            trained: {seed: figure}, of training data or of what the arm was trained for.
            untrained: the same of the network before training, or one number for all seeds, such as chance.
            by: the least gain on average, above 0; each seed must gain a tenth of it.
        """
        if by <= 0:
            raise ValueError(f"gate {arm!r} needs by above 0, got {by}: an untrained network would pass")
        sign = -1 if lower_is_better else 1
        before = untrained if isinstance(untrained, Mapping) else dict.fromkeys(trained, untrained)
        gains = {str(seed): _finite(sign * (value - before[seed])) for seed, value in trained.items()}
        self.record["gates"][arm] = {"by": by, "gains": gains, "unit": unit}

    def claim(
        self,
        name: str,
        value: Figure,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        unit: str = "",
        floor: Figure | None = None,
        ceiling: Figure | None = None,
        arms: Sequence[str] | None = None,
    ) -> Verdict:
        """Records a claim with its margin and says what it is worth (verdicts.py). The test fails at its end if the
        claim did not hold.

        Args:
            name: of a comparison "A minus B", "A below B" or "A over B".
            value: a number, or {seed: number} of paired differences; its mean is judged. A number that is not finite
                fails every margin.
            at_least, at_most: the margin; exactly one of them.
            floor: the same with chance, or a network that has learned nothing, in A's place: must miss the margin.
            ceiling: the same with an oracle in A's place, in the same protocol: must keep it. Without floor, ceiling
                and arms the claim cannot be told.
            arms: the arms whose gates and searches count; empty where nothing is trained.
        """
        if (at_least is None) == (at_most is None):
            raise ValueError(f"claim {name!r} needs exactly one of at_least= and at_most=")
        mean, per_seed = _recorded(name, value)
        claim = {
            "name": name,
            "value": mean,
            "per_seed": per_seed,
            "unit": unit,
            "margin": {"at_least": at_least} if at_least is not None else {"at_most": at_most},
            "floor": None if floor is None else _recorded(name, floor)[0],
            "ceiling": None if ceiling is None else _recorded(name, ceiling)[0],
            "arms": None if arms is None else list(arms),
        }
        self.record["claims"].append(claim)
        return verdict(claim, self.record | {"complete": True})  # as far as this claim goes

    def note(self, text: str, found: Mapping[Any, Any] | None = None) -> None:
        """Records a sentence a reader of the figures needs: how a rate was chosen, what a run leaves out.

        Args:
            found: settings to list behind it, such as the rate of each arm.
        """
        self.record["notes"].append(text if found is None else f"{text}: {listed(found)}.")

    def write(self, complete: bool) -> None:
        """Replaces the JSON file. `complete` is false unless all tests of the file have run to their end."""
        self.record["complete"] = complete
        self.record["threads"] = threads()
        self.record["seconds"] = round(time.perf_counter() - self.started, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, json.dumps(self.record, indent=1, allow_nan=False) + "\n")


def listed(value: Any) -> str:
    """Settings as a reader wants them: `LoRA: 0.01, FLoRA: (0.03, 16)`."""
    if isinstance(value, Mapping):
        parts = []
        for key, one in value.items():
            name = " ".join(map(listed, key)) if isinstance(key, tuple) else listed(key)
            parts.append(f"{name} ({listed(one)})" if isinstance(one, Mapping) else f"{name}: {listed(one)}")
        return ", ".join(parts)
    if isinstance(value, tuple | list):
        return f"({', '.join(map(listed, value))})"
    return "none" if value is None else value if isinstance(value, str) else f"{value:g}"


def unmet(record: Mapping[str, Any], first: int = 0) -> str:
    """One line for each claim from the `first` on that did not hold; empty when all did."""
    lines = []
    for claim in record["claims"][first:]:
        judged = verdict(claim, {**record, "complete": True})  # another test may be still to come
        if judged.word != "held":
            ((bound, margin),) = claim["margin"].items()
            seeds = f", per seed {claim['per_seed']}" if claim["per_seed"] else ""
            lines.append(f"{claim['name']}: {claim['value']} {claim['unit']}, wanted {bound} {margin}{seeds}; {judged}")
    return "\n".join(lines)


def _recorded(name: str, value: Figure) -> tuple[float | None, dict[str, float | None] | None]:
    """The mean, and the figures by seed; None for what is not finite, and for the seeds of a lone number."""
    if not isinstance(value, Mapping):
        return _finite(value), None
    if not value:
        raise ValueError(f"claim {name!r} has no figures")
    return _finite(sum(value.values()) / len(value)), {str(seed): _finite(one) for seed, one in value.items()}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
