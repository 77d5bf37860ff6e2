"""`lightspan run RECIPE`: recipes that compute without training. An estimator gives a result, a merger a checkpoint."""

import argparse
import csv
import io
import json
import os
import shlex
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lightspan.cli.commands.arguments import IMAGE_SIZE, add_recipe_arguments, folder
from lightspan.cli.config.resolve import Resolved, resolve
from lightspan.cli.config.tree import dump
from lightspan.cli.runs.folder import is_first_rank, run_folder, sole_use, write_run_files
from lightspan.core.errors import UserError, first_lines, print_notes, printable
from lightspan.core.files.runs import CHECKPOINTS, MERGED, MERGED_FOLDER, METRICS, PICTURE, RESULT, TABLE, TENSORS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightspan.core.results import Result
    from lightspan.evaluation.features.store import FeatureStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument(
        "--encoder",
        type=folder,
        metavar="PLACE",
        help="a run folder, a folder for timm or a name of timm's instead of the encoder of an estimator's inputs",
    )
    parser.add_argument(
        "--images", type=folder, metavar="FOLDER", help="the pictures in this folder instead of the data of its inputs"
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help=f"height and width at which --images are read (default: {IMAGE_SIZE})",
    )
    parser.add_argument("--run", type=folder, metavar="DIR", help="run folder (default: runs/RECIPE/TIME)")
    parser.add_argument(
        "--features", type=folder, metavar="DIR", help="the feature store (default: ~/.cache/lightspan/features)"
    )
    parser.add_argument(
        "--features-limit", type=float, default=64.0, metavar="GIB", help="largest entry of the store (default 64)"
    )
    parser.add_argument(
        "--device",
        default="auto",
        metavar="auto|cpu|cuda",
        help="where encoders compute (default: a GPU, if there is one; each rank takes its own)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="build everything and say what would be computed; write nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Raises: UserError for whatever the user can fix, before the run folder contains a result."""
    resolved = _resolved(args)
    if args.dry_run:
        print_notes(resolved.notes)
        print(printable("\n".join(_outlook(args, resolved))))
        return 0
    from lightspan.core.distributed import raise_on_all_ranks

    with _ranks(), ExitStack() as held:
        with raise_on_all_ranks("take the run folder"):
            run_dir = run_folder(args.run, resolved.name)
            held.enter_context(sole_use(run_dir))
            _refuse_used(run_dir)
        if is_first_rank():
            print_notes(resolved.notes)
            print(printable(f"{resolved.name} -> {run_dir}"), flush=True)
        result = (_estimate if resolved.kind == "estimator" else _merge)(args, resolved, run_dir)
        if is_first_rank():
            _write(result, resolved, run_dir, args)
    return 0


def _resolved(args: argparse.Namespace) -> Resolved:
    """The recipe with the user's encoder and pictures, if they are given."""
    if args.images is None and args.image_size is not None:
        raise UserError("--image-size is the size of the pictures of --images FOLDER, which is not given")
    if args.images is None and args.encoder is None:
        return resolve(args.recipe, args.overlays, args.flags, args.allow_modules, ("estimator", "merger"))
    from lightspan.cli.config.user_encoder import with_encoder

    size = IMAGE_SIZE if args.image_size is None else args.image_size
    return with_encoder(args.recipe, args.overlays, args.encoder, args.images, size, args.flags, args.allow_modules)


def _estimate(args: argparse.Namespace, resolved: Resolved, run_dir: Path) -> "Result":
    from lightspan.cli.config.build import build_parts
    from lightspan.datamodules.loading.ranks import each_line_once
    from lightspan.evaluation.estimator import require_inputs

    parts = build_parts(resolved, run_dir)
    inputs, store = parts.get("inputs") or {}, _store(args)
    require_inputs(parts["estimator"], inputs)
    with each_line_once():
        loaded = {name: one.load(store) for name, one in inputs.items()}
        result: Result = parts["estimator"].fit(**loaded)
    return result


def _merge(args: argparse.Namespace, resolved: Resolved, run_dir: Path) -> "Result":
    from lightspan.cli.config.build import build_parts
    from lightspan.merging.adapted import open_checkpoints
    from lightspan.merging.merger import merge
    from lightspan.merging.product import write_product

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a merger works in one process; start it without a launcher")
    parts = build_parts(resolved, run_dir)
    record = {"recipe": resolved.name, "configuration": dump(resolved.config)}
    merger, checkpoints = parts["merger"], open_checkpoints(parts["merger"], parts["checkpoints"])
    if checkpoints[merger.leading(list(checkpoints))].is_huggingface:
        return write_product(
            merger, checkpoints, run_dir / MERGED_FOLDER, record, resolved.name, resolved.config["merger"]
        )
    return merge(merger, checkpoints, run_dir / MERGED, record)


def _outlook(args: argparse.Namespace, resolved: Resolved) -> list[str]:
    """What a run would do, line by line."""
    from lightspan.cli.config.build import build_parts
    from lightspan.datamodules.loading.ranks import each_line_once
    from lightspan.evaluation.estimator import require_inputs
    from lightspan.merging.adapted import open_checkpoints
    from lightspan.merging.merger import outlook

    parts = build_parts(resolved)
    if resolved.kind == "merger":
        checkpoints = open_checkpoints(parts["merger"], parts["checkpoints"])
        lines = [
            f"  {figure.name:<28} {_text(figure.value)} {figure.unit}".rstrip()
            for figure in outlook(parts["merger"], checkpoints).figures()
        ]
    else:
        inputs, store = parts.get("inputs") or {}, _store(args)
        require_inputs(parts["estimator"], inputs)
        with each_line_once():
            lines = [f"  {name}: {one.outlook(store)}" for name, one in inputs.items()]
    return [f"{resolved.name}: builds. Nothing was written.", *lines]


def _store(args: argparse.Namespace) -> "FeatureStore":
    import torch

    from lightspan.evaluation.features.store import FeatureStore

    device = _device(args.device)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {first_lines(error)}; use cpu or auto") from error
    return FeatureStore(args.features, args.features_limit, device)


def _device(wanted: str) -> str:
    """The device that --device means: of several GPUs the one that the launcher gave to this rank."""
    import torch

    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if wanted == "cuda" else wanted


@contextmanager
def _ranks() -> "Iterator[None]":
    """A process group, if a launcher started several ranks. What they exchange is on the CPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    import torch.distributed as dist

    from lightspan.core.distributed import end_process_group

    dist.init_process_group("gloo")
    yield
    end_process_group()


def _refuse_used(run_dir: Path) -> None:
    used = next((name for name in (RESULT, METRICS, CHECKPOINTS) if (run_dir / name).exists()), None)
    if used:
        raise UserError(f"{run_dir} already contains a run ({used}); give another --run DIR or delete that folder")


def _write(result: "Result", resolved: Resolved, run_dir: Path, args: argparse.Namespace) -> None:
    """Writes all files of the run, result.json last: if it exists, the rest is complete."""
    from lightspan.core.files.atomic import atomic_path, write_atomic
    from lightspan.core.files.tensors import Form, write_tensors

    write_run_files(resolved, run_dir, args.command_line, args.overlays)
    written = [name for name in (MERGED, MERGED_FOLDER) if (run_dir / name).exists()]
    if result.tensors:
        forms = {name: Form(tuple(tensor.shape), tensor.dtype) for name, tensor in result.tensors.items()}
        with atomic_path(run_dir / TENSORS) as temporary:
            facts = {"format": "pt", "recipe": resolved.name, **result.metadata()}
            write_tensors(temporary, forms, result.tensors.items(), facts)
        written.append(TENSORS)
    if (picture := result.picture(str(resolved.about.get("title", resolved.name)))) is not None:
        write_atomic(run_dir / PICTURE, picture)
        written.append(PICTURE)
    if rows := result.table():
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(run_dir / TABLE, text.getvalue())
        written.append(TABLE)
    document = json.dumps({"recipe": resolved.name, **result.document()}, indent=1, allow_nan=False)
    write_atomic(run_dir / RESULT, document + "\n")
    for figure in result.figures():
        print(printable(f"{figure.name:<32} {_text(figure.value)} {figure.unit}".rstrip()))
    print(printable(f"wrote {run_dir}: {', '.join([*written, RESULT])}"))
    if MERGED in written:
        print(
            printable(
                "next: to load these weights in a recipe, use class_path: lightspan.backbones.weights.with_weights, "
                f"init_args: {{module: NETWORK, path: {run_dir / MERGED}}}\n"
                f"      to evaluate the whole method: lightspan validate RECIPE --ckpt {shlex.quote(str(run_dir))}"
            )
        )


def _text(value: int | float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
