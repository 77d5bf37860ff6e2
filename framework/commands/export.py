"""`lightspan export CKPT --to FORMAT`: weights for other programs, written only if their loader reads them back."""

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightspan.checkpoints.manifest import COMPLETE, WEIGHTS_ALONE
from lightspan.commands.arguments import add_allow_module_argument, file, folder
from lightspan.errors import UserError
from lightspan.exports.folder import refuse_occupied, whole_folder
from lightspan.planning.one_process import in_one_process
from lightspan.run_files import EXPORT, RESOLVED
from lightspan.runs.folder import newest_checkpoint, weights_alone

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from lightspan.config.build import Resolved
    from lightspan.nn.subnets import Size

LARGEST_DIFFERENCE = 1e-6  # of float32 outputs; an exact export has none, another attention kernel less


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        type=file,
        help="RUN/checkpoints/NAME.ckpt, a file or the folder of a sharded run, or RUN for its newest complete one; "
        "of a merge its folder or safetensors file, with --recipe and --out",
    )
    parser.add_argument(
        "--to", required=True, choices=("safetensors", "huggingface", "peft", "timm"), help="format to write"
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        metavar="WIDTHxDEPTH",
        help="networks to cut out of an elastic one, each into a folder of its name, or all (timm; default: the whole)",
    )
    parser.add_argument("--out", type=folder, metavar="DIR", help="folder to write (default: RUN/export/FORMAT)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in --out")
    parser.add_argument("--run", type=folder, metavar="DIR", help="run folder, if the checkpoint is not inside it")
    parser.add_argument("--recipe", metavar="RECIPE", help="recipe to build the model from, if there is no run folder")
    add_allow_module_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Writes the export, or nothing: the folder appears once it was read back and found equal. 1 if it was not."""
    from lightspan.adapters.inject import fold
    from lightspan.callbacks.training.adaptation import Adaptation
    from lightspan.config.build import build
    from lightspan.runs.train import put_weights

    if args.sizes and args.to != "timm":
        raise UserError(f"--sizes cuts networks for --to timm, and this is --to {args.to}; leave one of them out")
    checkpoint = find_checkpoint(args.checkpoint)
    if alone := checkpoint.suffix == ".safetensors":
        _require_whole_task(args, checkpoint)
    resolved = _resolved(args, checkpoint)
    out = args.out or _run_folder(args, checkpoint) / "export" / args.to
    built = build(in_one_process(resolved))
    model = built.model
    Adaptation.act(built.trainer, model)
    model.configure_model()
    sizes = _sizes(model, args.sizes) if args.to == "timm" else []
    refuse_occupied(out, args.overwrite)
    (put_weights if alone else load_weights)(model, checkpoint)
    if args.to == "huggingface":
        from lightspan.exports.huggingface import require_pretrained

        require_pretrained(model)
        fold(model)
    with whole_folder(out) as folder:
        writers: dict[str, Callable[[Any, Path, str], float]] = {
            "safetensors": _to_safetensors,
            "huggingface": _to_huggingface,
            "peft": _to_peft,
            "timm": partial(_to_timm, sizes=sizes),
        }
        difference = writers[args.to](model, folder, resolved.name)
        what = "tensor" if args.to == "safetensors" else "output"
        print(f"read back with {args.to}: largest {what} difference {difference:.3g}")
        limit = 0.0 if args.to == "safetensors" else LARGEST_DIFFERENCE
        if not difference <= limit:
            print(f"this is more than {limit:g}: nothing was written")
            return 1
        record = {"format": args.to, "recipe": resolved.name, "checkpoint": str(checkpoint), **_version()}
        (folder / EXPORT).write_text(json.dumps({**record, "largest_difference": difference}, indent=2) + "\n")
    files = sorted(path.name for path in out.iterdir())
    print(f"wrote {out}: {', '.join(files)}")
    return 0


def find_checkpoint(given: Path) -> Path:
    """The checkpoint that CKPT names: itself, a run folder's newest, or the safetensors file of a merge.

    Raises: UserError where there is none.
    """
    if alone := weights_alone(given):
        return alone
    is_run = given.is_dir() and given.suffix != ".ckpt" and not (given / COMPLETE).exists()
    if not is_run and os.path.lexists(given):  # what is neither a file nor a folder is refused when it is read
        return given
    found = newest_checkpoint(given) if given.is_dir() else None
    if found is None:
        raise UserError(f"checkpoint {str(given)!r} does not exist; name RUN/checkpoints/NAME.ckpt or a run folder")
    return found


def _require_whole_task(args: argparse.Namespace, weights: Path) -> None:
    """Raises: UserError for weights alone without what makes a model of them, or that are there already."""
    if args.to == "safetensors":
        raise UserError(f"{weights} {WEIGHTS_ALONE}; there is nothing left to export")
    if not ((args.recipe or args.run) and args.out):
        raise UserError(
            f"{weights} holds weights alone; name the recipe whose runs were merged with --recipe, and the folder to "
            "write with --out"
        )


def load_weights(model: "LightningModule", checkpoint: Path) -> None:
    """Puts the checkpoint's weights into `model`, all of them and nothing else.

    Raises: UserError for a file that is not a checkpoint, is truncated, or belongs to another model.
    """
    from lightspan.checkpoints.fit import check_fits
    from lightspan.checkpoints.io import read_checkpoint

    content = read_checkpoint(checkpoint, optimizers=False)
    stamp, state = content.get("lightspan", {}), content["state_dict"]
    way_out = "name the run folder that it comes from with --run"
    check_fits(state, model, str(checkpoint), stamp.get("model"), way_out=way_out)
    model.load_state_dict(state, strict=True)


def _to_safetensors(model: "LightningModule", folder: Path, recipe: str) -> float:
    from lightspan.exports.safetensors import write_safetensors

    return write_safetensors(model, folder, {"recipe": recipe, **_version()})


def _to_huggingface(model: "LightningModule", folder: Path, recipe: str) -> float:
    from lightspan.exports.huggingface import largest_output_difference

    backbone: Any = model.backbone
    backbone.save_pretrained(folder)
    return largest_output_difference(backbone, folder)


def _to_peft(model: "LightningModule", folder: Path, recipe: str) -> float:
    from lightspan.adapters.peft import save_peft
    from lightspan.exports.peft_check import adapted_part, largest_difference, require_changes

    part = adapted_part(model)
    save_peft(part, folder)
    require_changes(part)
    return largest_difference(part, folder)


def _sizes(model: "LightningModule", asked: list[str] | None) -> "list[Size]":
    from lightspan.exports.timm_folder import elastic_backbone, sizes_of

    return sizes_of(elastic_backbone(model), asked)


def _to_timm(model: "LightningModule", folder: Path, recipe: str, sizes: "list[Size]") -> float:
    from lightspan.exports.timm_folder import elastic_backbone, write_networks

    return write_networks(elastic_backbone(model), sizes, folder)


def _resolved(args: argparse.Namespace, checkpoint: Path) -> "Resolved":
    from lightspan.config.build import load_resolved, resolve

    if args.recipe:
        return resolve(args.recipe, (), (), args.allow_modules)
    return load_resolved(_run_folder(args, checkpoint), args.allow_modules)


def _run_folder(args: argparse.Namespace, checkpoint: Path) -> Path:
    if args.run:
        return args.run
    folder = checkpoint.absolute().parent.parent
    if args.recipe or (folder / RESOLVED).is_file():
        return folder
    raise UserError(
        f"{str(folder)!r} has no resolved.yaml, so the model of {checkpoint.name} is not known; "
        "name its run folder with --run, or its recipe with --recipe"
    )


def _version() -> dict[str, str]:
    from lightspan import __version__

    return {"lightspan": __version__}
