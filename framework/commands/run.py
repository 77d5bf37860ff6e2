"""`lightspan fit`, `validate`, `test` and `predict`: a run folder, a built configuration, and Lightning's Trainer."""

import argparse
import contextlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightspan.commands.arguments import add_recipe_arguments, folder
from lightspan.commands.catalogue import print_notes
from lightspan.commands.metrics_csv import METRICS_FILE, write_csv
from lightspan.commands.run_folder import (
    LAST_CHECKPOINT,
    PROVENANCE_FILE,
    checkpoint_to_resume,
    is_first_rank,
    refuse_other_experiment,
    run_folder,
    run_ids,
    write_run_files,
)
from lightspan.config.build import Built, Resolved, build, resolve, with_layer
from lightspan.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

INTERRUPTED = 130


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    _add_run_argument(parser)
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto (default): go on from the last checkpoint in --run DIR, if any; or a checkpoint file",
    )
    parser.add_argument(
        "--wandb", action="store_true", help="also log to Weights & Biases; offline without WANDB_API_KEY"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build and set up everything, read a batch, write nothing, stop before the first step",
    )


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    _add_run_argument(parser)
    parser.add_argument("--ckpt", type=Path, required=True, metavar="PATH", help="the checkpoint to use")


def _add_run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=folder, metavar="DIR", help="run folder (default: runs/RECIPE/TIME)")


def run_fit(args: argparse.Namespace) -> int:
    resolved = _resolve(args)
    if args.dry_run:
        from lightspan.commands.rehearsal import rehearse

        print_notes(resolved.notes)
        print("\n".join(rehearse(resolved)))
        return 0
    run_dir = run_folder(args.run, resolved.name)
    checkpoint = checkpoint_to_resume(args, run_dir)
    if checkpoint is not None:
        refuse_other_experiment(resolved, checkpoint)
    if args.wandb:
        resolved = with_layer(resolved, _wandb_layer(checkpoint))
    if is_first_rank():  # said before torch is loaded, which takes seconds
        print_notes(resolved.notes)
        print(f"{resolved.name} -> {run_dir}" + (f", resumed from {checkpoint}" if checkpoint else ""), flush=True)
    built = build(resolved, run_dir)
    _obey_signals(built)
    _meet_after_restart(built)
    if is_first_rank():
        write_run_files(resolved, run_dir, args, checkpoint)
        if checkpoint is None:
            (run_dir / METRICS_FILE).unlink(missing_ok=True)  # of a start that never reached a checkpoint

    def fit() -> Any:
        return built.trainer.fit(
            built.model, datamodule=built.datamodule, ckpt_path=checkpoint and str(checkpoint), weights_only=True
        )

    try:
        status = call(fit, built, run_dir, checkpoint)[0]
    except BaseException:
        if is_first_rank():
            with contextlib.suppress(UserError):  # a disk that is full now hides nothing of what came first
                write_csv(run_dir)
        raise
    if is_first_rank():
        write_csv(run_dir)
    if status == 0 and is_first_rank():
        print(f"done: {run_dir}\nnext: lightspan report {run_dir}")
        if (run_dir / LAST_CHECKPOINT).exists():
            print(f"      lightspan export {run_dir / LAST_CHECKPOINT} --to safetensors")
    return status


def run_validate(args: argparse.Namespace) -> int:
    return _evaluate(args, "validate")


def run_test(args: argparse.Namespace) -> int:
    return _evaluate(args, "test")


def run_predict(args: argparse.Namespace) -> int:
    return _evaluate(args, "predict")


def _evaluate(args: argparse.Namespace, verb: str) -> int:
    resolved = _resolve(args)
    if not args.ckpt.exists():
        raise UserError(f"--ckpt {args.ckpt}: no such file; a run keeps its checkpoints in RUN/checkpoints")
    if args.run is not None and (args.run / LAST_CHECKPOINT).exists():
        raise UserError(f"--run {args.run} holds a training run; give {verb} a folder of its own or leave --run out")
    run_dir = run_folder(args.run, f"{resolved.name}-{verb}")
    resolved = with_layer(resolved, {"trainer": {"logger": False}})  # the metrics go into one JSON file
    built = build(resolved, run_dir)
    if is_first_rank():
        print_notes(resolved.notes)
        write_run_files(resolved, run_dir, args, args.ckpt)
    call_arguments: dict[str, Any] = {"datamodule": built.datamodule, "ckpt_path": str(args.ckpt), "weights_only": True}
    if verb != "predict":
        call_arguments["verbose"] = False
    function = getattr(built.trainer, verb)
    status, result = call(lambda: function(built.model, **call_arguments), built, run_dir, args.ckpt)
    if status == 0 and is_first_rank():
        if verb == "predict":
            _write_predictions(result, run_dir / "predictions.pt")
        else:
            _print_metrics(result, run_dir / f"{verb}.json")
    return status


def _resolve(args: argparse.Namespace) -> Resolved:
    return resolve(args.recipe, args.overlays, args.flags, args.allow_modules)


def call(function: "Callable[[], Any]", built: Built, run_dir: Path, checkpoint: Path | None) -> tuple[int, Any]:
    """Runs a Trainer function; returns (exit status, its result) and turns what a user can mend into a UserError."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from lightspan.callbacks.preemption import Preempted
    from lightspan.distributed import leave
    from lightspan.files import explained_os_errors

    before = signal.getsignal(signal.SIGINT)
    try:
        with explained_os_errors(run_dir / PROVENANCE_FILE):
            result = function()
        leave()
        return 0, result
    except Preempted as leaving:
        leave()
        if is_first_rank():
            print(f"lightspan: {leaving}; {_way_on(run_dir)}", file=sys.stderr, flush=True)
        return int(leaving.code or 0), None
    except (KeyboardInterrupt, SystemExit):
        # Lightning ends a run that was stopped by Ctrl-C with sys.exit(1), its teardown done.
        if not built.trainer.interrupted:
            raise
        print(f"\nlightspan: stopped at step {built.trainer.global_step}; {_way_on(run_dir)}", file=sys.stderr)
        return INTERRUPTED, None
    except MisconfigurationException as error:
        raise UserError(f"the Trainer refuses this run: {error}") from error
    except (RuntimeError, ValueError) as error:
        text = str(error)
        if isinstance(error, UserError):
            raise
        if isinstance(error, ValueError) and "configure_optimizers" in _functions(error):
            raise UserError(f"the optimiser or its schedule refuses its settings: {error}") from error
        if checkpoint is None:
            raise
        if "loading state_dict" in text or "loaded state dict" in text or "state_dict" in text.split("\n")[0]:
            raise UserError(f"{checkpoint} is a checkpoint of another model: {_few_lines(text)}") from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def _obey_signals(built: Built) -> None:
    """Gives signals back their usual meaning where no callback of the run obeys them."""
    from lightspan.callbacks.preemption import Preemption
    from lightspan.callbacks.signal_flag import installed

    flag = installed()
    callbacks = built.trainer.callbacks  # type: ignore[attr-defined]  # a connector of the trainer sets it
    if flag is not None and not any(isinstance(callback, Preemption) for callback in callbacks):
        flag.release()


def _meet_after_restart(built: Built) -> None:
    """Ranks that torchrun starts again meet under keys of their own.

    torchrun keeps its store over a restart (torch 2.13), and by its default keys a rank can find the address of one
    that was killed and wait for it in vain. Lightning takes a process group that is there as it is.
    """
    start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if start == 0 or ranks == 1:
        return
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.PrefixStore(f"start-{start}", dist.TCPStore(address, port, ranks, is_master=False))
    on_cpu = built.trainer.strategy.root_device.type == "cpu"
    dist.init_process_group("gloo" if on_cpu else "nccl", store=store, rank=int(os.environ["RANK"]), world_size=ranks)


def _functions(error: BaseException) -> set[str]:
    """Names of the functions that an error passed through."""
    return {frame.name for frame in traceback.extract_tb(error.__traceback__)}


def _way_on(run_dir: Path) -> str:
    last = run_dir / LAST_CHECKPOINT
    if not last.exists():
        return "no checkpoint was written yet"
    return f"{last} is whole; the same command with --run {run_dir} goes on from it"


def _few_lines(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(line if len(line) < 300 else line[:297] + "..." for line in lines[:4])


def _wandb_layer(checkpoint: Path | None) -> dict[str, Any]:
    """The tracker, offline without a key; a run that goes on keeps its id there."""
    offline = not os.environ.get("WANDB_API_KEY")
    settings: dict[str, Any] = {"project": "lightspan", "save_dir": "${run}", "offline": offline}
    if checkpoint is not None and (run_id := run_ids(checkpoint).get("lightning.pytorch.loggers.wandb.WandbLogger")):
        settings |= {"id": run_id, "resume": "allow"}
    spec = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": settings}
    return {"trainer": {"logger": {"wandb": spec}}}


def _write_predictions(predictions: Any, path: Path) -> None:
    import torch

    from lightspan.files import atomic_path

    with atomic_path(path) as temporary:
        torch.save(predictions, temporary)
    print(f"wrote {path}: one entry a batch")


def _print_metrics(results: list[dict[str, float]], path: Path) -> None:
    from lightspan.files import write_atomic

    metrics = {name: value for result in results for name, value in result.items()}
    write_atomic(path, json.dumps(metrics, indent=2) + "\n")
    for name, value in metrics.items():
        print(f"{name:<32} {value:.6g}")
    print(f"wrote {path}")
