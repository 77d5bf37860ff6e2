"""`lightspan fit`, `validate`, `test` and `predict`: a run folder, a built configuration, and Lightning's Trainer."""

import argparse
import contextlib
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightspan.checkpoints.manifest import manifest
from lightspan.commands.arguments import add_recipe_arguments, file, folder
from lightspan.config.build import Built, Resolved, build, resolve, with_layer
from lightspan.config.flags import allow_options
from lightspan.errors import UserError, print_notes
from lightspan.loggers.wandb_key import wandb_key_place
from lightspan.run_files import PREDICTIONS
from lightspan.runs.folder import (
    LAST_CHECKPOINT,
    checkpoint_to_resume,
    clear_mark,
    is_first_rank,
    mark_failed,
    refuse_other_experiment,
    run_folder,
    run_ids,
    set_metrics_aside,
    sole_use,
    weights_to_evaluate,
    write_run_files,
)
from lightspan.runs.metrics_csv import write_csv
from lightspan.runs.seed import with_seed
from lightspan.runs.train import call, check_at_start, meet_after_restart, obey_signals, put_weights

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    _add_run_argument(parser)
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto (default): continue from the last checkpoint in --run DIR, if there is one; never: refuse; "
        "or a checkpoint file",
    )
    parser.add_argument(
        "--wandb", action="store_true", help="also log to Weights & Biases; offline if there is no API key"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build and set up everything, read a batch, say what each parameter gets, write nothing, stop before the "
        "first step",
    )


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    _add_run_argument(parser)
    parser.add_argument(
        "--ckpt",
        type=file,
        required=True,
        metavar="PATH",
        help="a checkpoint, a run folder for its newest one, or a merge or an export for its weights",
    )


def _add_run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=folder, metavar="DIR", help="run folder (default: runs/RECIPE/TIME)")


def run_fit(args: argparse.Namespace) -> int:
    resolved = _resolve(args)
    if args.dry_run:
        from lightspan.planning.rehearsal import rehearse

        print_notes(resolved.notes)
        print("\n".join(rehearse(resolved)))
        return 0
    run_dir = run_folder(args.run, resolved.name)
    with sole_use(run_dir):
        return _fit(args, resolved, run_dir)


def _fit(args: argparse.Namespace, resolved: Resolved, run_dir: Path) -> int:
    checkpoint = checkpoint_to_resume(args.resume, run_dir, given=args.run is not None)
    resolved = with_seed(resolved, run_dir, checkpoint)
    if checkpoint is not None:
        refuse_other_experiment(resolved, checkpoint)
    if args.wandb:
        resolved = with_layer(resolved, _wandb_layer(checkpoint))
    if is_first_rank():  # printed before torch is loaded, which takes seconds
        print_notes(resolved.notes)
        print(f"{resolved.name} -> {run_dir}" + (f", resumed from {checkpoint}" if checkpoint else ""), flush=True)
    built = build(resolved, run_dir)
    check_at_start(built)
    obey_signals(built)
    meet_after_restart(built)
    if is_first_rank():
        clear_mark(run_dir)
        write_run_files(resolved, run_dir, args.command_line, args.overlays, checkpoint)
        if checkpoint is None or run_dir not in checkpoint.parents:
            set_metrics_aside(run_dir)
        if args.wandb:
            _tell_wandb(resolved, built)

    step = (manifest(checkpoint) or {}).get("step") if checkpoint else None  # now: the file may be written anew

    def fit() -> Any:
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
    if status == 0 and is_first_rank():
        if checkpoint is not None and step == built.trainer.global_step:
            print_notes([_nothing_left(checkpoint, step, built.trainer)])
        print(f"done: {run_dir}\nnext: lightspan report {shlex.quote(str(run_dir))}")
        if (run_dir / LAST_CHECKPOINT).exists():
            words = [str(run_dir / LAST_CHECKPOINT), "--to", "safetensors", *allow_options(resolved.allow_modules)]
            print(f"      lightspan export {shlex.join(words)}")
    return status


def run_validate(args: argparse.Namespace) -> int:
    return _evaluate(args, "validate")


def run_test(args: argparse.Namespace) -> int:
    return _evaluate(args, "test")


def run_predict(args: argparse.Namespace) -> int:
    return _evaluate(args, "predict")


def _evaluate(args: argparse.Namespace, verb: str) -> int:
    resolved = _resolve(args)
    source = weights_to_evaluate(args.ckpt)
    if args.run is not None and (args.run / LAST_CHECKPOINT).exists():
        raise UserError(f"--run {args.run} contains a training run; give {verb} its own folder or leave --run out")
    run_dir = run_folder(args.run, f"{resolved.name}-{verb}")
    resolved = with_seed(resolved, run_dir, source)
    resolved = with_layer(resolved, {"trainer": {"logger": False}})  # the metrics go to one JSON file
    built = build(resolved, run_dir)
    alone = source.suffix == ".safetensors"
    if alone:
        put_weights(built, source)
    if is_first_rank():
        print_notes(resolved.notes)
        if source != args.ckpt:
            print(f"{verb}: {source}", flush=True)
        write_run_files(resolved, run_dir, args.command_line, args.overlays, source)
    call_arguments: dict[str, Any] = {"datamodule": built.datamodule, "ckpt_path": None if alone else str(source)}
    call_arguments["weights_only"] = True
    if verb != "predict":
        call_arguments["verbose"] = False
    function = getattr(built.trainer, verb)
    status, result = call(lambda: function(built.model, **call_arguments), built, run_dir, source)
    if status == 0 and is_first_rank():
        if verb == "predict":
            _write_predictions(result, run_dir / PREDICTIONS)
        else:
            _print_metrics(result, run_dir / f"{verb}.json")
    return status


def _resolve(args: argparse.Namespace) -> Resolved:
    return resolve(args.recipe, args.overlays, args.flags, args.allow_modules)


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


def _wandb_layer(checkpoint: Path | None) -> dict[str, Any]:
    """The tracker, offline without a key; a resumed run keeps its id there."""
    offline = wandb_key_place() is None
    settings: dict[str, Any] = {"project": "lightspan", "save_dir": "${run}", "offline": offline}
    if checkpoint is not None and (run_id := run_ids(checkpoint).get("lightning.pytorch.loggers.wandb.WandbLogger")):
        settings |= {"id": run_id, "resume": "allow"}
    spec = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": settings}
    return {"trainer": {"logger": {"wandb": spec}}}


def _tell_wandb(resolved: Resolved, built: Built) -> None:
    """The tracker gets the recipe as resolved, which contains no secrets: they were refused before."""
    from lightning.pytorch.loggers import WandbLogger

    for logger in built.trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_hyperparams(resolved.config)


def _write_predictions(predictions: Any, path: Path) -> None:
    import torch

    from lightspan.files import atomic_path

    with atomic_path(path) as temporary:
        torch.save(predictions, temporary)
    print(f"wrote {path}: one entry per batch")


def _print_metrics(results: list[dict[str, float]], path: Path) -> None:
    from lightspan.files import write_atomic

    metrics = {name: value for result in results for name, value in result.items()}
    write_atomic(path, json.dumps(metrics, indent=2) + "\n")
    for name, value in metrics.items():
        print(f"{name:<32} {value:.6g}")
    print(f"wrote {path}")
