"""`lightspan fit`: a run folder, a built configuration, and Lightning's Trainer."""

import argparse
import contextlib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightspan.cli.commands.arguments import (
    REPLACING,
    add_data_arguments,
    add_recipe_arguments,
    add_run_argument,
    add_worker_arguments,
    count,
    folder,
    option_value,
    resolved_from,
)
from lightspan.cli.commands.asking import agreed
from lightspan.cli.commands.verbs import VERBS
from lightspan.cli.config.build import Built, Resolved, build, with_layer
from lightspan.cli.config.flags import allow_options
from lightspan.cli.config.tree import COMMAND_LINE
from lightspan.cli.runs.folder import (
    LAST_CHECKPOINT,
    checkpoint_to_resume,
    clear_mark,
    is_first_rank,
    mark_failed,
    recorded_start,
    refuse_other_experiment,
    run_folder,
    run_ids,
    set_metrics_aside,
    sole_use,
    write_run_files,
)
from lightspan.cli.runs.metrics_csv import write_csv
from lightspan.cli.runs.rank_counts import on_started_ranks
from lightspan.cli.runs.seed import with_seed
from lightspan.cli.runs.train import (
    call,
    check_at_start,
    check_checkpoints,
    has_no_steps,
    meet_under_new_keys,
    obey_signals,
    stop_at_start,
)
from lightspan.core.errors import UserError, print_notes, printable
from lightspan.core.files.runs import METRICS, PROFILE, REPORT
from lightspan.training.checkpoints.manifest import manifest
from lightspan.training.loggers.wandb_key import wandb_key_place

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

ENCODER, REPORT_FOLDER = Path("export") / "encoder", "report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument(
        "--data",
        type=folder,
        action=_InPlaceOfRecipe,
        metavar="FOLDER",
        help="a folder of files of any one kind, or a table: says what is in it, chooses RECIPE unless it is given, "
        "prints the command that does the same, and runs it after a yes",
    )
    parser.add_argument("--yes", action="store_true", help="run what --data chooses without asking")
    add_data_arguments(parser)
    add_run_argument(parser)
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto (default): continue from the last checkpoint in --run DIR, if there is one; never: refuse; "
        "or a checkpoint, or s3://BUCKET/NAME with copies of a run's checkpoints",
    )
    parser.add_argument(
        "--wandb", action="store_true", help="also log to Weights & Biases; offline if there is no API key"
    )
    add_worker_arguments(parser)
    parser.add_argument(
        "--elastic",
        action="store_true",
        help="on as many ranks as the launcher has started, whatever trainer.devices says; the global batch stays",
    )
    parser.add_argument(
        "--most-rows",
        type=count,
        metavar="N",
        help="with --elastic: at most N samples in a rank's micro-batch; a step gets more of them on fewer ranks",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="record where the time and memory of some steps go, in RUN/profile",
    )
    parser.add_argument(
        "--profile-steps",
        type=steps_to_profile,
        metavar="A:B",
        help="the optimiser steps that --profile records, counted from this start (default: 5:8)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build and set up everything, read a batch, say what each parameter gets, write nothing, stop before the "
        "first step",
    )


class _InPlaceOfRecipe(argparse.Action):
    """An option with which RECIPE may be left out."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        setattr(namespace, self.dest, values)
        next(action for action in parser._actions if action.dest == "recipe").required = False


def run(args: argparse.Namespace) -> int:
    if args.data is None and args.yes:
        raise UserError("--yes answers what --data FOLDER asks, which is not given")
    with recorded_start(args.run):
        chosen = args if args.data is None else _chosen(args)
        if chosen is None:
            return 0
        args = chosen
        resolved = resolved_from(args)
        if args.elastic:
            resolved = with_layer(resolved, on_started_ranks(resolved, args.most_rows))
            if args.seeds is not None:
                raise UserError("--elastic is for the ranks of one run, and --seeds starts several; give one of them")
        elif args.most_rows is not None:
            raise UserError("--most-rows divides the steps of --elastic, which is not given")
    if args.dry_run:
        from lightspan.cli.planning.rehearsal import rehearse

        print_notes(resolved.notes)
        print(printable("\n".join(rehearse(resolved))))
        return 0
    if args.seeds is not None:
        from lightspan.cli.commands.sweep import run_seeds

        return run_seeds(args)
    run_dir = run_folder(args.run, resolved.name)
    with sole_use(run_dir):
        return _fit(args, resolved, run_dir)


def _chosen(args: argparse.Namespace) -> argparse.Namespace | None:
    """What the command line means whose data are any folder: that of a recipe and of an option for its kind of data;
    None without a yes.

    Raises: UserError for a folder that cannot be trained on, for two kinds of data, and where nobody can be asked.
    """
    from lightspan.cli.any_folder.answer import answer, command
    from lightspan.cli.main import parse

    if given := [option for option in REPLACING if option_value(args, option) is not None]:
        raise UserError(f"--data finds out what {given[0]} says; give one of them")
    found = answer(args.data, args.target, args.recipe)
    if args.target is not None and "--target" not in found.words:
        raise UserError(f"--target is a column of a table, and {args.data} is none")
    words = [*found.words, *_others(args)]
    if is_first_rank():
        print(printable("\n".join([*found.lines, "", command(words), ""])), flush=True)
        if found.needs:
            raise UserError(f"{found.words[0]} also needs {found.needs}; run the command above once that is there")
        if not (args.yes or args.dry_run or agreed("run it?")):
            print("nothing was started")
            return None
    return parse(next(verb for verb in VERBS if verb.name == "fit"), words)


def _others(args: argparse.Namespace) -> list[str]:
    """The words of the command line without RECIPE, --data, --target and --yes. A value that is called like the recipe,
    such as that of --run, stays.
    """
    from lightspan.cli.main import parser_of, valued_options

    valued = valued_options(parser_of(next(verb for verb in VERBS if verb.name == "fit")))
    words, left = list[str](), iter(args.command_line[2:])
    for word in left:
        value = [next(left, "")] if word in valued else []
        if word.partition("=")[0] not in ("--data", "--target", "--yes", "--debug") and word != args.recipe:
            words += [word, *value]
    return words


def _started(args: argparse.Namespace, resolved: Resolved, run_dir: Path) -> tuple[Resolved, "Built", Path | None]:
    """Everything before the first step: what is trained, built, and the checkpoint from which it continues."""
    checkpoint = checkpoint_to_resume(args.resume, run_dir, given=args.run is not None)
    untrained = has_no_steps(resolved)
    if untrained and checkpoint is not None:
        raise UserError(
            f"a run that writes the weights before the first step has no step, but {run_dir} contains "
            f"{checkpoint.name} of step {(manifest(checkpoint) or {}).get('step')}; give another --run DIR"
        )
    resolved = with_seed(resolved, run_dir, checkpoint)
    if checkpoint is not None:
        refuse_other_experiment(resolved, checkpoint)
    if args.wandb:
        resolved = with_wandb(resolved, checkpoint)
    if args.profile or args.profile_steps:
        resolved = with_layer(resolved, _profile_layer(args.profile_steps))
    if is_first_rank():  # printed before torch is loaded, which takes seconds
        print_notes(resolved.notes)
        print(
            printable(f"{resolved.name} -> {run_dir}" + (f", resumed from {checkpoint}" if checkpoint else "")),
            flush=True,
        )
    built = build(resolved, run_dir)
    check_at_start(built)
    check_checkpoints(built)
    if untrained:
        stop_at_start(built, run_dir / LAST_CHECKPOINT)
    obey_signals(built)
    meet_under_new_keys(built)
    if is_first_rank():
        clear_mark(run_dir)
        write_run_files(resolved, run_dir, args.command_line, args.overlays, checkpoint)
        if checkpoint is None or run_dir not in checkpoint.parents:
            set_metrics_aside(run_dir)
        if args.wandb:
            _tell_wandb(resolved, built)
    return resolved, built, checkpoint


def _fit(args: argparse.Namespace, resolved: Resolved, run_dir: Path) -> int:
    from lightspan.datamodules.loading.ranks import each_line_once

    with recorded_start(args.run):
        resolved, built, checkpoint = _started(args, resolved, run_dir)
    step = (manifest(checkpoint) or {}).get("step") if checkpoint else None  # now: the file may be written anew

    def fit() -> Any:
        with each_line_once():  # of training data that a callback reads too
            return built.trainer.fit(
                built.model, datamodule=built.datamodule, ckpt_path=checkpoint and str(checkpoint), weights_only=True
            )

    try:
        status = call(fit, built, run_dir, checkpoint)[0]
    except BaseException as error:
        if is_first_rank():
            with contextlib.suppress(UserError, OSError):  # a full disk must not hide the first error
                mark_failed(run_dir, error, built.trainer.global_step)
                write_csv(run_dir)
        raise
    if is_first_rank():
        write_csv(run_dir)
    form = _format_for(built.model) if status == 0 else ""  # of every rank: a sharded adapter is asked together
    if status == 0 and is_first_rank():
        if checkpoint is not None and step == built.trainer.global_step:
            print_notes([_nothing_left(checkpoint, step, built.trainer)])
        if args.images is not None:
            _write_encoder(resolved, built, run_dir)
        if any(option_value(args, option) is not None for option in REPLACING if option != "--table"):
            _write_report(run_dir)
        follows = [["report", str(run_dir)]] if _has_logged(run_dir) else []
        if (run_dir / LAST_CHECKPOINT).exists():
            words = [str(run_dir / LAST_CHECKPOINT), "--to", form, *allow_options(resolved.allow_modules)]
            follows.append(["export", *words])
        print(printable(f"done: {run_dir}"))
        for number, words in enumerate(follows):
            print(printable(f"{'      ' if number else 'next: '}lightspan {shlex.join(words)}"))
    return status


def _has_logged(run_dir: Path) -> bool:
    """Whether there is anything to report; a short run may have logged nothing."""
    metrics = run_dir / METRICS
    return not metrics.exists() or metrics.stat().st_size > 0


def _format_for(model: Any) -> str:
    """The format of `lightspan export` that other libraries load: adapters for PEFT, causal language models of
    transformers as its folder, and the weights of all others.
    """
    from lightspan.adapters.inject import adapted_layers

    if adapters := [adapter for layer in adapted_layers(model).values() for adapter in layer.adapters.values()]:
        return "peft" if all(adapter.mergeable for adapter in adapters) else "safetensors"
    backbone: Any = getattr(model, "backbone", None)
    if callable(getattr(backbone, "save_pretrained", None)):
        from lightspan.cli.exports.huggingface import is_causal

        return "huggingface" if is_causal(backbone) else "safetensors"
    return "safetensors"


def _write_encoder(resolved: Resolved, built: Built, run_dir: Path) -> None:
    """The encoder as files for other programs, if the method has one, after training on --images."""
    from lightspan.cli.exports.encoder import WrittenEncoder, write_encoder
    from lightspan.cli.exports.model_card import CardFacts, model_card
    from lightspan.core.sharded import ranks_of
    from lightspan.datamodules.image.data import PictureData

    data = built.datamodule
    if not (isinstance(data, PictureData) and data.train is not None):  # a flag has named other data
        return
    encodes = callable(getattr(built.model, "features", None))
    if encodes and any(ranks_of(parameter) is not None for parameter in built.model.parameters()):
        print_notes(["each rank has a part of the weights only, so the encoder was not written; use lightspan export"])
    elif encodes:

        def card(written: WrittenEncoder) -> str:
            check = f"When it was written, features read back differed by at most {written.difference:.3g}."
            facts = CardFacts("the encoder", written.loading, check, inputs=written.inputs)
            return model_card(resolved, run_dir, facts)

        written = write_encoder(built.model, data.train.mean, data.train.std, data.size, run_dir / ENCODER, card)
        print_notes(written.remarks)
        print(
            printable(
                f"encoder: {run_dir / ENCODER}: {', '.join(written.files)}; features read back differ by at most "
                f"{written.difference:.3g}"
            )
        )


def _write_report(run_dir: Path) -> None:
    from lightspan.cli.report.page import render
    from lightspan.cli.report.runs import load_runs
    from lightspan.core.files.atomic import write_atomic

    page = run_dir / REPORT_FOLDER / REPORT
    try:
        runs = load_runs([run_dir])
    except UserError as error:  # a short run that has logged nothing is a sound run
        print_notes([f"no report was written: {error}"])
        return
    write_atomic(page, render(runs, runs[0].name))
    print(printable(f"report: {page}"))


def _nothing_left(checkpoint: Path, step: int, trainer: "Trainer") -> str:
    """What to say of a run that took no step, since its checkpoint is at its end or beyond."""
    steps, epochs = trainer.max_steps, trainer.max_epochs
    if 0 <= steps <= step:
        end = f"trainer.max_steps={steps}; a larger number of steps"
    elif epochs is not None and 0 <= epochs <= trainer.current_epoch:
        end = f"trainer.max_epochs={epochs}; a larger number of epochs"
    else:
        return f"no step was taken: {checkpoint} is at step {step}, and the run stopped immediately"
    return f"nothing was left to do: {checkpoint} is at step {step}, and the run ends at {end} trains longer"


def with_wandb(resolved: Resolved, checkpoint: Path | None) -> Resolved:
    """The configuration with the tracker. Raises: UserError for the id of a checkpoint that leaves the run folder."""
    # The id is the word of whoever wrote the checkpoint, and judged as a recipe's.
    where = COMMAND_LINE if checkpoint is None else f"{checkpoint}:"
    return with_layer(resolved, _wandb_layer(checkpoint), where)


def _wandb_layer(checkpoint: Path | None) -> dict[str, Any]:
    """The tracker, offline without a key; a resumed run keeps its id there."""
    offline = wandb_key_place() is None
    settings: dict[str, Any] = {"project": "lightspan", "save_dir": "${run}", "offline": offline}
    if checkpoint is not None and (run_id := run_ids(checkpoint).get("lightning.pytorch.loggers.wandb.WandbLogger")):
        settings |= {"id": run_id, "resume": "allow"}
    spec = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": settings}
    return {"trainer": {"logger": {"wandb": spec}}}


def steps_to_profile(text: str) -> tuple[int, int]:
    """The type of --profile-steps."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not A:B with whole numbers 0 <= A < B, such as 5:8")
    return int(first), int(last)


def _profile_layer(steps: tuple[int, int] | None) -> dict[str, Any]:
    settings: dict[str, Any] = {"folder": f"${{run}}/{PROFILE}"}
    if steps is not None:
        settings |= {"first": steps[0], "last": steps[1]}
    spec = {"class_path": "lightspan.callbacks.watching.profile.Profile", "init_args": settings}
    return {"trainer": {"callbacks": {"profile": spec}}}


def _tell_wandb(resolved: Resolved, built: Built) -> None:
    """The tracker gets the recipe as resolved, which contains no secrets: they were refused before."""
    from lightning.pytorch.loggers import WandbLogger

    for logger in built.trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_hyperparams(resolved.config)
