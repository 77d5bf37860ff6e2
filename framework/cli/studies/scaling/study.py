"""scaling.json: what a curve over sizes of training data is made of, beside the sweep whose trials are its runs.

A folder of a curve is the folder of a sweep: `lightspan sweep`, `runs` and `report` read it as such. Its key is the
size of a `TrainingSubset`, whose seed is that of the run. Read without torch.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lightspan.cli.runs.direction import Mode
from lightspan.cli.studies.sweeps import files
from lightspan.cli.studies.sweeps.files import SEED_KEY, Sweep, Trial, differences, record_in
from lightspan.cli.studies.sweeps.points import Choices
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import write_atomic
from lightspan.core.files.runs import SCALING, SWEEP

SUBSET = "lightspan.datamodules.loading.subset.TrainingSubset"
ENTRY = "trainer.callbacks.training_subset"
SIZE_KEY, SUBSET_SEED_KEY, CLASSES_KEY = (f"{ENTRY}.init_args.{name}" for name in ("size", "seed", "classes"))
Policy = Literal["equal", "epochs"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclass(frozen=True)
class Study:
    """What the runs of a curve have in common besides their command line.

    Attributes:
        policy: "equal": all sizes train for equally many steps; "epochs": for equally many epochs.
        length: how many of them.
        samples: of all training data.
        batch_size: samples of a step.
        classes: how many of them are trained on; None is all.
    """

    policy: Policy
    length: int
    samples: int
    batch_size: int
    classes: int | None = None

    def text(self) -> str:
        """The policy in words."""
        if self.policy == "equal":
            return f"equal steps: each size trains for {self.length:,} steps of {self.batch_size} samples"
        return f"equal epochs: each size trains for {self.length:,} epochs, smaller ones for fewer steps"


def sweep_of(
    recipe: str,
    arguments: Sequence[str],
    sizes: Sequence[int],
    seeds: Sequence[int],
    seed_keys: Sequence[str] = (),
    metric: str | None = None,
    mode: Mode = "min",
) -> Sweep:
    """The runs of a curve: each size with each seed, smaller sizes first.

    Their folders are named by size and seed alone, so that they stay theirs when sizes and seeds are added.
    """
    sizes, seeds = sorted(sizes), sorted(seeds)
    trials = [Trial(f"size{size}-seed{seed}", {SIZE_KEY: size}, seed) for size in sizes for seed in seeds]
    return Sweep(
        recipe, tuple(arguments), {SIZE_KEY: Choices(tuple(sizes))}, metric=metric, mode=mode, seeds=tuple(seeds),
        seed_keys=(SUBSET_SEED_KEY, *seed_keys), trials=tuple(trials),
    )  # fmt: skip


def read_sweep(folder: Path) -> Sweep:
    """The sweep of a folder of a curve. Raises: UserError as `files.read`, and for a sweep over anything but sizes."""
    sweep = files.read(folder)
    axis = sweep.keys.get(SIZE_KEY)
    sizes = axis.values if isinstance(axis, Choices) and len(sweep.keys) == 1 else ()
    if (
        not sizes
        or not all(type(size) is int and size >= 1 for size in sizes)
        or SUBSET_SEED_KEY not in sweep.seed_keys
    ):
        raise UserError(f"{folder / SWEEP} is not a sweep over {SIZE_KEY} and its seed, which a curve is")
    return sweep


def sizes_of(sweep: Sweep) -> tuple[int, ...]:
    return tuple(sweep.keys[SIZE_KEY].grid())


def joined(before: Sweep, now: Sweep, folder: Path) -> Sweep:
    """The curve of a folder with the sizes and seeds of `now` added, none taken away.

    Raises: UserError if anything else differs, which would make it another curve.
    """
    sizes, seeds = ({*sizes_of(before), *sizes_of(now)}, {*(before.seeds or ()), *(now.seeds or ())})

    def enlarged(sweep: Sweep) -> Sweep:
        keys = [key for key in sweep.seed_keys if key != SUBSET_SEED_KEY]
        return sweep_of(sweep.recipe, sweep.arguments, [*sizes], [*seeds], keys, sweep.metric, sweep.mode)

    if found := differences(enlarged(before), enlarged(now)):
        lines = "\n".join(f"  {line}" for line in found)
        raise UserError(
            f"{folder} contains another curve (then -> now):\n{lines}\nRestore them, or give another folder with --out"
        )
    return enlarged(now)


def refuse_seed_flags(flags: Sequence[str], seed_keys: Sequence[str]) -> None:
    """Raises: UserError for a flag that sets what each run sets for itself."""
    for flag in flags:
        key = flag.partition("=")[0]
        if key in (SEED_KEY, *seed_keys):
            raise UserError(f"{flag} and --seeds both set the seed; leave one of them out")
        if key.startswith(ENTRY):
            raise UserError(f"{flag}: the subset of each run follows from --sizes, --seeds and --classes")


def write(folder: Path, study: Study, outcome: dict[str, Any] | None) -> None:
    """Replaces the folder's scaling.json: the study, and what came of it so far."""
    record = {"study": vars(study), "outcome": outcome}
    write_atomic(folder / SCALING, json.dumps(record, indent=1, allow_nan=False) + "\n")


def read(folder: Path) -> Study:
    """Raises: UserError if there is no scaling.json, or it is not one that `write` writes."""
    path = folder / SCALING
    try:
        study = Study(**record_in(path)["study"])
        numbers = (study.length, study.samples, study.batch_size, 1 if study.classes is None else study.classes)
        if study.policy not in POLICIES or not all(type(number) is int and number >= 1 for number in numbers):
            raise ValueError("a value is out of its range")
    except OSError as error:
        raise UserError(f"{folder} is not the folder of a curve: {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not what `lightspan scaling` writes: {error}") from error
    return study
