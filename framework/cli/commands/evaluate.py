"""`lightspan validate`, `test` and `predict`: a checkpoint, evaluated in a run folder of its own."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from lightspan.cli.commands.arguments import (
    add_data_arguments,
    add_recipe_arguments,
    add_run_argument,
    file,
    resolved_from,
)
from lightspan.cli.config.build import build, with_layer
from lightspan.cli.runs.folder import LAST_CHECKPOINT, is_first_rank, run_folder, weights_to_evaluate, write_run_files
from lightspan.cli.runs.seed import with_seed
from lightspan.cli.runs.train import call, check_checkpoints, load_merged_weights
from lightspan.core.errors import UserError, print_notes, printable
from lightspan.core.files.runs import PREDICTIONS, TESTED, VALIDATED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_data_arguments(parser)
    add_run_argument(parser)
    parser.add_argument(
        "--ckpt",
        type=file,
        required=True,
        metavar="PATH",
        help="a checkpoint, a run folder for its newest one, or a merge or an export for its weights",
    )


def run_validate(args: argparse.Namespace) -> int:
    return _evaluate(args, "validate")


def run_test(args: argparse.Namespace) -> int:
    return _evaluate(args, "test")


def run_predict(args: argparse.Namespace) -> int:
    return _evaluate(args, "predict")


def _evaluate(args: argparse.Namespace, verb: str) -> int:
    from lightspan.callbacks.training.adaptation import Adaptation

    resolved = resolved_from(args)
    source = weights_to_evaluate(args.ckpt)
    if args.run is not None and (args.run / LAST_CHECKPOINT).exists():
        raise UserError(f"--run {args.run} contains a training run; give {verb} its own folder or leave --run out")
    run_dir = run_folder(args.run, f"{resolved.name}-{verb}")
    resolved = with_seed(resolved, run_dir, source)
    resolved = with_layer(resolved, {"trainer": {"logger": False}})  # the metrics go to one JSON file
    built = build(resolved, run_dir)
    check_checkpoints(built)
    alone = source.suffix == ".safetensors"
    if alone:
        Adaptation.act(built.trainer, built.model)  # a callback adds what it adds before weights are loaded
        load_merged_weights(built.model, source)
    if is_first_rank():
        print_notes(resolved.notes)
        if source != args.ckpt:
            print(printable(f"{verb}: {source}"), flush=True)
        write_run_files(resolved, run_dir, args.command_line, args.overlays, source)
    call_arguments: dict[str, Any] = {"datamodule": built.datamodule, "ckpt_path": None if alone else str(source)}
    call_arguments["weights_only"] = True
    if verb != "predict":
        call_arguments["verbose"] = False
    else:
        let_predict(built.model, built.datamodule)
    function = getattr(built.trainer, verb)
    status, result = call(lambda: function(built.model, **call_arguments), built, run_dir, source)
    if status == 0 and is_first_rank():
        if verb == "predict":
            _write_predictions(result, run_dir / PREDICTIONS)
        else:
            _print_metrics(result, run_dir / {"validate": VALIDATED, "test": TESTED}[verb])
    return status


def let_predict(model: Any, data: Any) -> None:
    """Lets a data module that does not say what to predict for give its test samples, or without these those of
    validation. Raises: UserError for a method without predictions.
    """
    from lightning.pytorch.utilities.model_helpers import is_overridden

    if not (is_overridden("predict_step", model) or is_overridden("forward", model)):
        raise UserError(
            f"{type(model).__name__} has no predict_step, so it predicts nothing; classifiers do, and of other methods "
            "an estimator reads the features (docs/estimators.md)"
        )
    if data is not None and not is_overridden("predict_dataloader", data):
        given = [name for name in ("test_dataloader", "val_dataloader") if is_overridden(name, data)]
        if given:
            data.predict_dataloader = partial(_one_after_the_other, getattr(data, given[0]))


def _one_after_the_other(loaders: Callable[[], Any]) -> Any:
    """The loader, or several as one, which `predict_step` need not tell apart."""
    found = loaders()
    return _Chain(found) if isinstance(found, list | tuple) else found


class _Chain:
    def __init__(self, loaders: Sequence[Any]) -> None:
        self.loaders = loaders

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(self.loaders)

    def __len__(self) -> int:
        return sum(map(len, self.loaders))


def _write_predictions(predictions: Any, path: Path) -> None:
    from lightspan.core.files.atomic import atomic_path
    from lightspan.training.checkpoints.bytes import torch_save

    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch_save(predictions, file)
    print(printable(f"wrote {path}: one entry per batch"))


def _print_metrics(results: list[dict[str, float]], path: Path) -> None:
    from lightspan.core.files.atomic import write_atomic

    metrics = {name: value for result in results for name, value in result.items()}
    write_atomic(path, json.dumps(metrics, indent=2) + "\n")
    for name, value in metrics.items():
        print(printable(f"{name:<32} {value:.6g}"))
    print(printable(f"wrote {path}"))
