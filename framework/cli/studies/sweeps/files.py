"""sweep.json: what a sweep runs through, and the run folder of each of its trials. Read without torch.

A sweep folder contains this file and an ordinary run folder for each trial. A trial is one point with one seed.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lightspan.cli.config.key_names import short_names
from lightspan.cli.runs.direction import Mode
from lightspan.cli.studies.sweeps.points import Axis, Choices, Settings, axis_from, drawn, flags_of, grid, written
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import irregular, read_small, write_atomic
from lightspan.core.files.runs import SWEEP

Method = Literal["grid", "random", "tpe"]
METHODS: tuple[Method, ...] = ("grid", "random", "tpe")
SEED_KEY = "seed_everything"
MOST_BYTES = 2**26
_FOLDER = re.compile(r"[0-9A-Za-z][\w.+-]{0,199}")
# Of `arguments`, each with a value.
_OPTIONS = (
    "-c",
    "--config",
    "--images",
    "--image-size",
    "--volumes",
    "--videos",
    "--points",
    "--graphs",
    "--table",
    "--target",
    "--allow-module",
)
_SWITCHES = ("--wandb",)


@dataclass(frozen=True)
class Trial:
    """One run: its folder inside the sweep's, the point and the seed (None: the recipe's)."""

    run: str
    values: Settings
    seed: int | None


@dataclass(frozen=True)
class Sweep:
    """What sweep.json says.

    Attributes:
        recipe: as given to `lightspan fit`.
        arguments: words common to all fits: overlays, flags, --allow-module and the like.
        keys: key -> what it runs through; none for a sweep over seeds alone.
        metric, mode: what ranks the points, by its last value, and whether lower or higher is better.
        seeds: each point is run with each; None for once with the recipe's own.
        seed_keys: keys that take the seed too, besides seed_everything.
        points: how many points `random` and `tpe` try; None for a grid.
        draw_seed: what their draws follow from.
        trials: in the order in which they start, the seeds of a point one after the other. With `tpe` those so far.
    """

    recipe: str
    arguments: tuple[str, ...]
    keys: dict[str, Axis]
    method: Method = "grid"
    metric: str | None = None
    mode: Mode = "min"
    seeds: tuple[int, ...] | None = None
    seed_keys: tuple[str, ...] = ()
    points: int | None = None
    draw_seed: int = 0
    trials: tuple[Trial, ...] = ()

    def planned(self) -> "Sweep":
        """With all trials, unless each has to wait for the results of others. Raises: UserError."""
        if self.method == "tpe":
            return self
        points = grid(self.keys) if self.method == "grid" else drawn(self.keys, self.draw_seed, self.points or 0)
        return replace(
            self, trials=tuple(trial for at, point in enumerate(points) for trial in self.of_point(at, point))
        )

    def of_point(self, number: int, values: Settings) -> list[Trial]:
        """The trials of the point with this number, one for each seed."""
        seeds: Sequence[int | None] = self.seeds or (None,)
        first = number * len(seeds)
        return [Trial(self._folder(first + at, values, seed), values, seed) for at, seed in enumerate(seeds)]

    @property
    def total(self) -> int:
        """How many trials there are in the end."""
        return len(self.trials) if self.method != "tpe" else (self.points or 0) * len(self.seeds or (None,))

    @property
    def modules(self) -> list[str]:
        """The modules of others that its runs may use, as given with --allow-module."""
        return [self.arguments[at + 1] for at, word in enumerate(self.arguments) if word == "--allow-module"]

    def words(self, trial: Trial) -> list[str]:
        """The command line of a trial's fit without its run folder, beginning with the recipe."""
        return [self.recipe, *self.arguments, *self.flags(trial)]

    def flags(self, trial: Trial) -> list[str]:
        """What a trial adds to the common command line."""
        seeds = [] if trial.seed is None else [f"{key}={trial.seed}" for key in (SEED_KEY, *self.seed_keys)]
        return [*flags_of(trial.values), *seeds]

    def label(self, key: str) -> str:
        """The shortest end of a key that no other key of this sweep shares: lr, width."""
        return short_names(self.keys)[key]

    def record(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "arguments": list(self.arguments),
            "method": self.method,
            "metric": self.metric,
            "mode": self.mode,
            "keys": {key: axis.record() for key, axis in self.keys.items()},
            "seeds": None if self.seeds is None else list(self.seeds),
            "seed_keys": list(self.seed_keys),
            "points": self.points,
            "draw_seed": self.draw_seed,
            "trials": [vars(trial) for trial in self.trials],
        }

    def _folder(self, number: int, values: Settings, seed: int | None) -> str:
        parts = [f"{self.label(key)}{_end(value)}" for key, value in values.items()]
        seeded = "" if seed is None else f"-seed{seed}"
        text = re.sub(r"[^\w.+-]+", "_", "-".join([f"{number:03d}", *parts]), flags=re.ASCII)
        return text[: 120 - len(seeded)] + seeded


def write(folder: Path, sweep: Sweep) -> None:
    """Replaces the folder's sweep.json as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / SWEEP, json.dumps(sweep.record(), indent=1, allow_nan=False) + "\n")


def read(folder: Path) -> Sweep:
    """Reads a sweep folder. Raises: UserError if there is no sweep.json, or it is not one that `write` writes."""
    path = folder / SWEEP
    try:
        return _sweep(record_in(path))
    except OSError as error:
        raise UserError(f"{folder} is not the folder of a sweep: {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is not what `lightspan sweep` writes: {said}") from error


def record_in(path: Path) -> Any:
    """The JSON of a record of this folder or of one beside it, which others may have written.

    Raises: OSError if nothing is there; ValueError for what is no regular file, is too large, or is no JSON.
    """
    path.stat()
    if (content := read_small(path, MOST_BYTES)) is None:
        raise ValueError(f"it {irregular(path) or f'has more than {MOST_BYTES:,} bytes, or cannot be opened'}")
    return json.loads(content)


def differences(before: Sweep, now: Sweep) -> list[str]:
    """What makes another sweep of it, as `what: before -> now`. More points of `random` and `tpe` continue the same
    one, and so does another metric, except for `tpe`, which follows it.
    """
    free = {"trials"} | (set() if "tpe" in (before.method, now.method) else {"metric", "mode"})
    old, new = before.record(), now.record()
    if before.points and now.points and before.points < now.points:
        free |= {"points"}
    changed = []
    for what in old:
        if what == "keys":
            changed += [
                f"{key}: {_text(before.keys.get(key))} -> {_text(now.keys.get(key))}"
                for key in dict.fromkeys([*before.keys, *now.keys])
                if before.keys.get(key) != now.keys.get(key)
            ]
        elif what not in free and old[what] != new[what]:
            changed.append(f"{what}: {old[what]} -> {new[what]}")
    if not changed and list(before.keys) != list(now.keys):
        changed.append(f"order of the keys: {', '.join(before.keys)} -> {', '.join(now.keys)}")
    return changed


def _sweep(found: dict[str, Any]) -> Sweep:
    keys = {_key(key): axis_from(str(key), record) for key, record in _mapping(found["keys"]).items()}
    sweep = Sweep(
        recipe=_text_of(found["recipe"], "recipe"),
        arguments=_words(found["arguments"]),
        keys=keys,
        method=_one_of(found["method"], METHODS, "method"),
        metric=None if found["metric"] is None else _text_of(found["metric"], "metric"),
        mode=_one_of(found["mode"], ("min", "max"), "mode"),
        seeds=None if found["seeds"] is None else tuple(_whole(seed, "seeds") for seed in found["seeds"]),
        seed_keys=tuple(_key(key) for key in found.get("seed_keys", ())),
        points=None if found.get("points") is None else _whole(found["points"], "points"),
        draw_seed=_whole(found.get("draw_seed", 0), "draw_seed"),
        trials=tuple(_trial(one, set(keys)) for one in found["trials"]),
    )
    if len({trial.run for trial in sweep.trials}) < len(sweep.trials):
        raise ValueError("two trials have one folder")
    return sweep


def _trial(found: dict[str, Any], keys: set[str]) -> Trial:
    run, values, seed = found["run"], _mapping(found["values"]), found["seed"]
    if not isinstance(run, str) or not _FOLDER.fullmatch(run):
        raise ValueError(f"the folder {str(run)[:80]!r} of a trial is not a plain name")
    if set(values) != keys:
        raise ValueError(f"trial {run} sets other keys than the sweep has")
    return Trial(run, values, None if seed is None else _whole(seed, "seed"))


def _words(found: Any) -> tuple[str, ...]:
    """The common arguments; options that would change more than the configuration are refused."""
    words = [_text_of(word, "arguments") for word in found]
    at = 0
    while at < len(words):
        if words[at] in _OPTIONS:
            at += 2
        elif words[at] in _SWITCHES or re.match(r"[A-Za-z_][\w.-]*=", words[at]):
            at += 1
        else:
            raise ValueError(f"{words[at][:80]!r} does not belong to its arguments")
    return tuple(words)


def _key(found: Any) -> str:
    if not isinstance(found, str) or not re.fullmatch(r"[A-Za-z_][\w.-]*", found):
        raise ValueError(f"{str(found)[:80]!r} is not a key")
    return found


def _mapping(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"{str(found)[:80]} is not a mapping")
    return found


def _text_of(found: Any, what: str) -> str:
    if not isinstance(found, str) or not found or "\0" in found:
        raise ValueError(f"{what} must be text")
    return found


def _whole(found: Any, what: str) -> int:
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise ValueError(f"{what} must be a whole number from 0 up")
    return found


def _one_of(found: Any, known: Sequence[Any], what: str) -> Any:
    if found not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}")
    return found


def _text(axis: Axis | None) -> str:
    return "not given" if axis is None else axis.text() if not isinstance(axis, Choices) else f"[{axis.text()}]"


def _end(value: Any) -> str:
    """A value in a folder's name; of a class its own name."""
    text = written(value)
    return text.rpartition(".")[2] if isinstance(value, str) and re.fullmatch(r"[\w.]+\.[A-Z]\w*", text) else text
