"""`lightspan sweep RECIPE key=a,b key2=log(1e-4,1e-1,4)`: one run for each point and seed, side by side or as an array
of jobs; and `lightspan fit RECIPE --seeds 0,1,2`, which is a sweep without keys.
"""

import argparse
import copy
import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lightspan.cli.commands.arguments import (
    add_data_arguments,
    add_recipe_arguments,
    add_worker_arguments,
    configuration_words,
    count,
    folder,
    resolved_from,
)
from lightspan.cli.commands.submit import Workload, add_target_arguments, hand_over, prepared
from lightspan.cli.commands.verbs import verb_of
from lightspan.cli.config import places
from lightspan.cli.config.flags import allow_options
from lightspan.cli.config.resolve import Resolved, merged, recorded
from lightspan.cli.config.secrets import redacted
from lightspan.cli.launch.job import Array
from lightspan.cli.runs.direction import Mode, mode_of
from lightspan.cli.runs.fits import exits_on_sigterm, fit_command
from lightspan.cli.runs.folder import TASK_VARIABLE, is_first_rank, run_folder, sole_use
from lightspan.cli.runs.status import Status, status_of
from lightspan.cli.studies.sweeps.files import METHODS, SEED_KEY, Sweep, differences, read, write
from lightspan.cli.studies.sweeps.points import Axis, Settings, axes_of, flags_of
from lightspan.core.errors import UserError, print_notes, printable
from lightspan.core.files.atomic import refuse_link_out
from lightspan.core.files.runs import RESOLVED, SWEEP
from lightspan.training.signals import installed

UNFINISHED = 1
SUMMARY_CLASS = "lightspan.callbacks.watching.run_summary.RunSummary"
ARRAY = "array"
_ARRAY_VARIABLES = ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_data_arguments(parser)
    add_worker_arguments(parser)
    parser.add_argument("--method", choices=METHODS, default="grid", help="which points (default grid: all)")
    parser.add_argument("--trials", type=count, metavar="N", help="how many points random or tpe tries")
    parser.add_argument(
        "--draw-seed", type=_seed, default=0, metavar="N", help="seed of the points of random and tpe (default 0)"
    )
    parser.add_argument("--metric", metavar="NAME", help="ranks the points by its last value, such as val/loss")
    parser.add_argument("--mode", choices=("min", "max"), help="whether lower or higher is better")
    parser.add_argument(
        "--out", type=folder, metavar="DIR", help="folder of the sweep and its runs (default: runs/RECIPE/TIME)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check every point, list the runs, say how far each is; write nothing"
    )
    parser.add_argument(
        "--task",
        metavar="N|array",
        help="run only the run with this number, here; array: the number that SLURM or Kubernetes gave to this job",
    )
    parser.add_argument(
        "--also", action="append", default=[], metavar="key=value", help="with --task: a flag for this start alone"
    )
    add_target_arguments(parser, ("slurm", "kubernetes"))


def run(args: argparse.Namespace) -> int:
    """0 if every run is done, 1 if not. Raises: UserError for what cannot be run, before the first run starts."""
    if (Path(args.recipe) / SWEEP).is_file():
        return _continued(args, Path(args.recipe))
    axes, args.flags = axes_of(args.flags)
    below = prepared(args) if args.to is not None else None  # leaves flags for the devices, which belong to the sweep
    sweep = _defined(args, axes)
    if args.task is not None:
        return _one_task(args, sweep.planned(), args.out)
    sweep = sweep.planned()
    resolved = _checked(args, sweep)
    if below is not None:
        return _submitted(args, sweep, below)
    return _run(args, sweep, args.out, resolved.name)


def run_seeds(args: argparse.Namespace) -> int:
    """`lightspan fit RECIPE --seeds 0,1,2`."""
    if args.resume != "auto":
        raise UserError(f"--resume {args.resume} names one run; with --seeds each continues from its own checkpoint")
    _refuse_seed(args)
    if (flag := installed()) is not None:
        flag.release()  # a fit remembers signals until its Preemption obeys them; this process only passes them on
    sweep = Sweep(args.recipe, _words(args), {}, seeds=_seeds(args.seeds), seed_keys=tuple(args.seed_keys)).planned()
    return _run(args, sweep, args.run, _checked(args, sweep).name)


def _words(args: argparse.Namespace) -> tuple[str, ...]:
    """What all fits have on their command lines."""
    wandb = ["--wandb"] if args.wandb else []
    return (*configuration_words(args), *allow_options(args.allow_modules), *wandb)


def _defined(args: argparse.Namespace, axes: dict[str, Axis]) -> Sweep:
    """The sweep of a command line, without its trials. Raises: UserError for options that do not go together."""
    seeds = None if args.seeds is None else _seeds(args.seeds)
    if SEED_KEY in axes:
        raise UserError(f"{SEED_KEY}={axes[SEED_KEY].text()}: write --seeds, over which results are averaged")
    if seeds is not None:
        _refuse_seed(args)
        if swept := next((key for key in args.seed_keys if key in axes), None):
            raise UserError(f"{swept}={axes[swept].text()} and --seed-key {swept} both set it; leave one of them out")
    elif args.seed_keys:
        raise UserError(f"--seed-key {args.seed_keys[0]} takes each of --seeds, which are not given")
    if not axes and seeds is None:
        raise UserError(
            "nothing varies: give a key several values, such as model.init_args.optimizer.init_args.lr=1e-3,1e-2 or "
            "=log(1e-4,1e-1,4), or give --seeds 0,1,2"
        )
    if (args.trials is None) != (args.method == "grid"):
        raise UserError(
            "--method grid tries all points, so --trials does not belong to it; use --method random"
            if args.trials
            else f"--method {args.method} needs --trials N, the number of points to try"
        )
    if args.method != "grid" and not axes:
        raise UserError(f"--method {args.method} chooses values of keys, and no key has several")
    if args.method == "tpe":
        from lightspan.cli.studies.sweeps.tpe import require

        require()
        if args.metric is None:
            raise UserError("--method tpe follows a metric; name it with --metric, for example --metric val/loss")
    return Sweep(
        args.recipe, _words(args), axes, args.method, args.metric, _mode(args.metric, args.mode),
        seeds, tuple(args.seed_keys), args.trials, args.draw_seed,
    )  # fmt: skip


def _mode(metric: str | None, given: Mode | None) -> Mode:
    """Whether lower or higher is better, which without a metric says nothing. Raises: UserError as `mode_of`."""
    return (given or "min") if metric is None else mode_of(metric, given, "--metric")


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(_seed(part) for part in text.split(","))
    except argparse.ArgumentTypeError:
        seeds = ()
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text!r} must be different whole numbers from 0 up, such as 0,1,2")
    return seeds


def _refuse_seed(args: argparse.Namespace) -> None:
    given = next((flag for flag in args.flags if flag.partition("=")[0] in (SEED_KEY, *args.seed_keys)), None)
    if given is not None:
        raise UserError(f"{given} and --seeds both set the seed; leave one of them out")


def _checked(args: argparse.Namespace, sweep: Sweep) -> Resolved:
    """The recipe with the first point; all points are checked. Raises: UserError naming a point that is wrong."""
    seeded = {key: seed for key in sweep.seed_keys for seed in sweep.seeds or ()}
    points = [point | seeded for point in _points_to_check(sweep)]
    found = [_resolved(args, point) for point in points]
    require_summary(found[0])
    print_notes(dict.fromkeys(note for one in found for note in one.notes))
    return found[0]


def require_summary(resolved: Resolved) -> None:
    """Raises: UserError for a recipe of whose runs nobody would know that they are done."""
    specs = (resolved.config.get("trainer", {}).get("callbacks") or {}).values()
    if not any(spec.get("class_path") == SUMMARY_CLASS for spec in specs):
        raise UserError(
            f"{resolved.name} has no callback {SUMMARY_CLASS}, from whose file a sweep learns that a run is done; give "
            "it one, for example with base: defaults"
        )


def require_allowed(sweep: Sweep, place: Path, allowed: Sequence[str]) -> None:
    """Raises: UserError for a folder whose runs would load code that this command line does not allow, or write where
    only a command line may say.
    """
    if strange := [name for name in sweep.modules if name not in allowed]:
        raise UserError(
            f"{place / SWEEP} runs code of {', '.join(strange)}; if you trust it, add "
            + shlex.join(allow_options(strange))
        )
    for point in _points_to_check(sweep):
        fit = fit_arguments([sweep.recipe, *sweep.arguments, *flags_of(point)])
        try:
            tree = merged(fit.recipe, fit.overlays, fit.flags)[1]
        except UserError:  # such as a recipe that is gone: a run that reads it says so, and the ranking needs none
            continue
        if outside := places.as_flags(tree, fit.allow_modules):
            raise UserError(
                f"{place / SWEEP} has its runs write outside their folders: {shlex.join(outside)}; if you trust it, "
                f"repeat the command line that began it, with --out {shlex.quote(str(place))}"
            )


def fit_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of `lightspan fit` with these words."""
    from lightspan.cli.main import parse

    fit = verb_of(["fit"])
    assert fit is not None
    return parse(fit, list(words))


def _points_to_check(sweep: Sweep) -> list[Settings]:
    """All points; of those that are suggested later each value of a list and the ends of each range."""
    if sweep.method != "tpe":
        return list({str(trial.values): trial.values for trial in sweep.trials}.values())
    first = {key: axis.ends()[0] for key, axis in sweep.keys.items()}
    return [first, *({**first, key: value} for key, axis in sweep.keys.items() for value in axis.ends()[1:])]


def _resolved(args: argparse.Namespace, point: Settings) -> Resolved:
    one = copy.copy(args)
    one.flags = [*args.flags, *flags_of(point)]
    try:
        return resolved_from(one)
    except UserError as error:
        raise UserError(f"{_said(point)}: {error}" if point else str(error)) from error


def _continued(args: argparse.Namespace, place: Path) -> int:
    """`lightspan sweep DIR`: the sweep that a folder describes."""
    sweep = read(place)
    for option in ("to", "out", "seeds", "trials"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option} belongs to a new sweep; {place} is continued as its {SWEEP} says")
    if args.flags:
        raise UserError(
            f"{args.flags[0]}: {place} is continued as its {SWEEP} says; a changed sweep needs another --out"
        )
    require_allowed(sweep, place, args.allow_modules)
    if args.task is not None:
        return _one_task(args, sweep, place)
    if args.metric is not None:
        if sweep.method == "tpe":
            raise UserError(f"--metric {args.metric}: {place} follows {sweep.metric}, by which tpe chose its points")
        sweep = replace(sweep, metric=args.metric, mode=_mode(args.metric, args.mode))
    return _run(args, sweep, place, sweep.recipe)


def _run(args: argparse.Namespace, sweep: Sweep, given: Path | None, name: str) -> int:
    """Runs what is due in the sweep's folder, and says what came of it."""
    from lightspan.cli.studies.sweeps.outcome import conclude
    from lightspan.cli.studies.sweeps.trials import run_due

    if given is not None:
        _joined(sweep, given)  # refuses before it makes anything
    out = run_folder(given, name, make=not args.dry_run)
    if args.dry_run:
        return _outlook(_joined(sweep, out), out)
    with sole_use(out), exits_on_sigterm():
        sweep = _joined(sweep, out)
        refuse_changed_recipe(sweep, out)
        write(out, sweep)
        done = conclude(run_due(sweep, out, args.workers or 1, args.retry_failed), out)
        return 0 if done else UNFINISHED


def refuse_changed_recipe(sweep: Sweep, out: Path) -> None:
    """Raises: UserError if runs that are due would train something else than those that the folder has, since the
    recipe has changed: the ranking would compare two experiments.
    """
    begun = next((trial for trial in sweep.trials if (out / trial.run / RESOLVED).is_file()), None)
    whole = len(sweep.trials) == sweep.total
    if begun is None or (whole and all(status_of(out / trial.run) is Status.DONE for trial in sweep.trials)):
        return
    from lightspan.cli.config.identity import differences as changes

    now = resolved_from(fit_arguments(sweep.words(begun))).config
    seed = {} if begun.seed is not None else {SEED_KEY: now.get(SEED_KEY)}  # drawn by the run
    if found := changes(recorded(out / begun.run) | seed, now | seed):
        lines = "\n".join(f"  {line}" for line in found[:20]) + ("\n  ..." if len(found) > 20 else "")
        raise UserError(
            f"{sweep.recipe} has changed since {out / begun.run} was trained (then -> now):\n{lines}\n"
            "Restore it, or give another folder with --out"
        )


def _joined(sweep: Sweep, out: Path) -> Sweep:
    """With the trials that the folder has so far. Raises: UserError if it contains another sweep, or something else."""
    others = [path for path in out.iterdir() if not path.name.startswith(".")] if out.is_dir() else []
    if not (out / SWEEP).exists():  # looked for last: another task of an array may write it just now
        if others:
            raise UserError(f"{out} contains {others[0].name} and no sweep; give another folder")
        return sweep
    before = read(out)
    if found := differences(before, sweep):
        lines = "\n".join(f"  {line}" for line in found)
        raise UserError(
            f"{out} contains another sweep (then -> now):\n{lines}\nRestore them, or give another folder with --out"
        )
    return replace(sweep, trials=max(sweep.trials, before.trials, key=len))


def _one_task(args: argparse.Namespace, sweep: Sweep, out: Path | None) -> int:
    """Becomes the fit of one trial: its ranks meet, and signals reach it, as if a launcher had started it."""
    if out is None:
        raise UserError("--task needs the folder that all tasks share; give --out DIR")
    out = out.absolute()
    sweep = _joined(sweep, out)
    number = _task_number(args.task)
    if not number < len(sweep.trials):
        raise UserError(f"--task {number}: this sweep has {len(sweep.trials)} runs, numbered from 0")
    trial = sweep.trials[number]
    refuse_link_out(out / trial.run, out, "its sweep")
    if is_first_rank() and not (out / SWEEP).exists():
        write(out, sweep)
    if status_of(out / trial.run) is Status.DONE:
        print(printable(f"done before: {out / trial.run}"))
        return 0
    command = fit_command([*sweep.words(trial), *args.also], out / trial.run)
    os.environ[TASK_VARIABLE] = str(out / trial.run)
    sys.stdout.flush()
    return os.execv(command[0], command)


def _task_number(text: str) -> int:
    if text == ARRAY:
        found = next((value for name in _ARRAY_VARIABLES if (value := os.environ.get(name))), None)
        if found is None:
            raise UserError(f"--task array: none of {', '.join(_ARRAY_VARIABLES)} is set; give the number of a run")
        text = found
    if not text.isascii() or not text.isdigit():
        raise UserError(f"--task {text!r} must be a whole number from 0 up, or {ARRAY}")
    return int(text)


def _submitted(args: argparse.Namespace, sweep: Sweep, below: Resolved) -> int:
    """Hands the trials over as one array of jobs, each of which derives the same sweep from the same command line."""
    if sweep.method == "tpe":
        raise UserError(
            "--method tpe chooses each point by the results before it, which jobs of one array do not know; use "
            "--method random, or start this sweep inside one job"
        )
    words = [f"{key}={axis.text()}" for key, axis in sweep.keys.items()]
    words += [] if sweep.seeds is None else ["--seeds", ",".join(map(str, sweep.seeds))]
    words += [word for key in sweep.seed_keys for word in ("--seed-key", key)]
    words += ["--method", sweep.method]
    words += [] if sweep.points is None else ["--trials", str(sweep.points), "--draw-seed", str(sweep.draw_seed)]
    words += [] if sweep.metric is None else ["--metric", sweep.metric, "--mode", sweep.mode]
    return hand_over(args, Workload(below, args.out, tuple(words), Array(len(sweep.trials), args.workers)))


def _outlook(sweep: Sweep, out: Path) -> int:
    """How each run stands, without writing anything."""
    standing = [(trial, status_of(out / trial.run)) for trial in sweep.trials]
    for trial, status in standing:
        print(printable(f"{status:<10} {trial.run}  {shlex.join(sweep.flags(trial))}"))
    counts = [f"{count} {status}" for status, count in Counter(status for _, status in standing).items()]
    if later := sweep.total - len(sweep.trials):
        counts.append(f"{later} that {sweep.method} will choose")
    print(printable(f"{sweep.total} runs: {', '.join(counts)}. Nothing was written."))
    return 0


def _said(point: Settings) -> str:
    return ", ".join(redacted(flags_of(point)))


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 10 or not int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 4294967295")
    return int(text)
