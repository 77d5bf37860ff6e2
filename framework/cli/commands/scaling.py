"""`lightspan scaling RECIPE --sizes 300 1000 3000`: how a score grows with the number of training samples, and what ten
times the data would give. The runs are a sweep over the size of a nested part of the data, see
`lightspan.cli.studies.scaling`.
"""

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lightspan.cli.commands.arguments import (
    DATA_OPTIONS,
    add_data_arguments,
    add_recipe_arguments,
    add_run_queue_arguments,
    configuration_words,
    count,
    folder,
    option_value,
    resolved_from,
)
from lightspan.cli.commands.sweep import fit_arguments, refuse_changed_recipe, require_allowed, require_summary
from lightspan.cli.config.flags import allow_options
from lightspan.cli.runs.direction import mode_of
from lightspan.cli.runs.fits import exits_on_sigterm
from lightspan.cli.runs.folder import run_folder, sole_use
from lightspan.cli.studies.scaling.study import (
    CLASSES_KEY,
    ENTRY,
    POLICIES,
    SUBSET,
    Study,
    joined,
    read,
    read_sweep,
    refuse_seed_flags,
    sizes_of,
    sweep_of,
    write,
)
from lightspan.cli.studies.sweeps import files
from lightspan.cli.studies.sweeps.files import Sweep
from lightspan.core.errors import UserError, print_notes, printable
from lightspan.core.files.runs import SCALING

if TYPE_CHECKING:
    from lightspan.cli.studies.scaling.data import Whole

UNFINISHED = 1
FEWEST = 3
SEEDS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument(
        "--sizes", nargs="+", metavar="N", help="numbers of training samples, 3 or more; of a folder: further ones"
    )
    parser.add_argument("--seeds", metavar="N|0,5,7", help=f"how many seeds, from 0 up, or which (default {SEEDS})")
    add_run_queue_arguments(parser)
    parser.add_argument(
        "--metric", metavar="NAME", help="the score, such as val/accuracy (default: the first one logged)"
    )
    parser.add_argument("--mode", choices=("min", "max"), help="whether lower or higher is better")
    parser.add_argument(
        "--top",
        metavar="X|none",
        help="the score of a perfect model, towards which it saturates (default: 1 for scores in [0, 1])",
    )
    parser.add_argument(
        "--steps",
        choices=POLICIES,
        default=None,
        help="equal: all sizes train for as many steps as the recipe on all data (default); epochs: for as many epochs",
    )
    parser.add_argument("--classes", type=count, metavar="K", help="train on K classes alone, drawn by the seed")
    parser.add_argument("--retry-failed", action="store_true", help="also start the runs again that failed")
    parser.add_argument(
        "--out", type=folder, metavar="DIR", help="folder of the curve and its runs (default: runs/RECIPE/TIME)"
    )


def run(args: argparse.Namespace) -> int:
    """0 if every run is done, 1 if not. Raises: UserError for what cannot be run, before the first run starts."""
    top = _top(args.top)
    mode = "min" if args.metric is None else mode_of(args.metric, args.mode, "--metric")
    place = Path(args.recipe)
    study, sweep, out = _continued(args, place) if (place / SCALING).is_file() else _begun(args)
    if args.metric is not None:
        sweep = replace(sweep, metric=args.metric, mode=mode)
    return _run(args, study, sweep, out, top)


def _begun(args: argparse.Namespace) -> tuple[Study, Sweep, Path]:
    """The curve of a recipe, joined with what its folder has; nothing is written if it cannot be run."""
    from lightspan.cli.studies.scaling.data import length_flags, study_of, whole_of

    sizes, seeds = _sizes(args.sizes, FEWEST), _seeds(args.seeds) or tuple(range(SEEDS))
    refuse_seed_flags(args.flags, args.seed_keys)
    resolved = resolved_from(args)
    require_summary(resolved)
    print_notes(resolved.notes)
    whole = whole_of(resolved)
    study = study_of(resolved, whole, args.steps or "equal", args.classes)
    words = [*configuration_words(args), f"{ENTRY}.class_path={SUBSET}"]
    words += [] if args.classes is None else [f"{CLASSES_KEY}={args.classes}"]
    words += [*length_flags(resolved, study), *allow_options(args.allow_modules)]
    sweep = sweep_of(args.recipe, words, sizes, seeds, args.seed_keys)
    if args.out is not None and (args.out / SCALING).is_file():
        before = read_sweep(args.out)
        sweep = joined(before, replace(sweep, metric=before.metric, mode=before.mode), args.out)
        if (found := read(args.out)) != study:
            raise UserError(f"{args.out} contains another curve ({found.text()}; {found.samples:,} samples in all)")
    elif args.out is not None and (others := _contents(args.out)):
        raise UserError(f"{args.out} contains {others[0]} and no curve; give another folder")
    _require(whole, sweep, study)
    return study, sweep, run_folder(args.out, resolved.name)


def _continued(args: argparse.Namespace, place: Path) -> tuple[Study, Sweep, Path]:
    """`lightspan scaling DIR`: the curve of a folder, with more sizes and seeds if some are given."""
    study, before = read(place), read_sweep(place)
    for option in ("--out", "--steps", "--classes", *DATA_OPTIONS):
        if option_value(args, option) is not None:
            raise UserError(f"{option} belongs to a new curve; {place} is continued as its {SCALING} says")
    if args.flags or args.overlays or args.seed_keys:
        given = [*args.flags, *args.overlays, *args.seed_keys][0]
        raise UserError(f"{given}: {place} is continued as its {SCALING} says; a changed curve needs another --out")
    require_allowed(before, place, args.allow_modules)
    sizes = _sizes(args.sizes, 1) if args.sizes else sizes_of(before)
    seeds = _seeds(args.seeds) or before.seeds or ()
    keys = before.seed_keys[1:]  # the first is that of the subset
    now = sweep_of(before.recipe, before.arguments, sizes, seeds, keys, before.metric, before.mode)
    sweep = joined(before, now, place)
    if len(sweep.trials) > len(before.trials):
        from lightspan.cli.studies.scaling.data import whole_of

        own = [word for word in before.arguments if not word.startswith(ENTRY)]
        _require(whole_of(resolved_from(fit_arguments([before.recipe, *own]))), sweep, study)
    return study, sweep, run_folder(place, sweep.recipe)


def _require(whole: "Whole", sweep: Sweep, study: Study) -> None:
    """Raises: UserError for a size that some run could not train on. Prints what to know of the others."""
    said = {whole.require(size, seed, study.classes) for size in sizes_of(sweep) for seed in sweep.seeds or ()}
    print_notes(sorted(line for line in said if line is not None))


def _run(args: argparse.Namespace, study: Study, sweep: Sweep, out: Path, top: float | None) -> int:
    """Runs what is due in the folder, and says what came of it."""
    from lightspan.cli.studies.scaling.outcome import conclude
    from lightspan.cli.studies.sweeps.outcome import known_metric
    from lightspan.cli.studies.sweeps.trials import run_due

    with sole_use(out), exits_on_sigterm():
        refuse_changed_recipe(sweep, out)
        files.write(out, sweep)
        write(out, study, None)
        print(printable(study.text()))
        run_due(sweep, out, args.workers or 1, args.retry_failed)
        if sweep.metric is None and (known := known_metric(sweep, out)):
            sweep = replace(sweep, metric=known, mode=mode_of(known, args.mode, "--metric"))
        files.write(out, sweep)
        return 0 if conclude(study, sweep, out, top, guess_top=args.top is None) else UNFINISHED


def _contents(place: Path) -> list[str]:
    return [path.name for path in place.iterdir() if not path.name.startswith(".")] if place.is_dir() else []


def _sizes(given: Sequence[str] | None, fewest: int) -> tuple[int, ...]:
    """Raises: UserError for what are not different whole numbers above 0, or too few of them."""
    words = [part for word in given or () for part in word.split(",") if part]
    numbers = [int(word) if re.fullmatch(r"[0-9]{1,15}", word) else 0 for word in words]
    wrong = next((word for word, number in zip(words, numbers, strict=True) if number < 1), None)
    if wrong is not None:
        raise UserError(f"--sizes: {wrong!r} is not a whole number of samples from 1 up, such as 3000")
    if twice := next((number for number in numbers if numbers.count(number) > 1), None):
        raise UserError(f"--sizes: {twice} is given twice")
    if len(numbers) < fewest:
        raise UserError(
            f"--sizes has {len(numbers)} and a curve needs {fewest} or more, such as --sizes 300 1000 3000 10000; four "
            "cannot separate a logarithm from a power law, five may"
        )
    return tuple(sorted(numbers))


def _seeds(text: str | None) -> tuple[int, ...]:
    """`3` is how many, `0,5` which. Empty if none are given. Raises: UserError."""
    if text is None:
        return ()
    words = text.split(",")
    numbers = [int(word) if re.fullmatch(r"[0-9]{1,10}", word) and int(word) < 2**32 else -1 for word in words]
    if min(numbers) < 0 or len(set(numbers)) < len(numbers) or (len(numbers) == 1 and not 1 <= numbers[0] <= 1000):
        raise UserError(f"--seeds {text!r} must be how many, from 1 to 1000, or different whole numbers such as 0,1,2")
    return tuple(range(numbers[0])) if len(numbers) == 1 else tuple(numbers)


def _top(text: str | None) -> float | None:
    if text is None or text == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"--top {text!r} must be a number, such as 1 or 100, or none")
    return value
