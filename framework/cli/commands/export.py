"""`lightspan export CKPT --to FORMAT`: weights for other programs, written only if their loader reads them back."""

import argparse
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lightspan.cli.commands.arguments import add_allow_module_argument, file, folder
from lightspan.cli.exports.folder import refuse_occupied, whole_folder
from lightspan.cli.planning.one_process import in_one_process
from lightspan.cli.runs.folder import newest_checkpoint, weights_alone
from lightspan.core.cards import CARD
from lightspan.core.errors import UserError, printable
from lightspan.core.files.atomic import refuse_link_out
from lightspan.core.files.runs import EXPORT, RESOLVED
from lightspan.training.checkpoints.manifest import COMPLETE, WEIGHTS_ALONE

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from lightspan.cli.config.build import Resolved
    from lightspan.cli.exports.products import Product

FORMATS = ("safetensors", "huggingface", "peft", "timm", "torch-export", "onnx")
FUNCTIONS = ("torch-export", "onnx")  # formats that hold a function, not weights alone
_ONLY = {
    "sizes": ("timm",),
    "what": FUNCTIONS,
    "precision": ("onnx",),
    "shape": ("timm", "huggingface", *FUNCTIONS),
    "fold": ("safetensors",),
}
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,39}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        type=file,
        help="RUN/checkpoints/NAME.ckpt, a file or the folder of a sharded run, or RUN for its newest complete one; "
        "of a merge its folder or safetensors file, with --recipe and --out",
    )
    parser.add_argument("--to", required=True, choices=FORMATS, help="format to write")
    parser.add_argument(
        "--what",
        choices=("features", "predict"),
        help="what torch-export and onnx hold: features(batch), the default, or predict_step(batch, 0)",
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "float16", "bfloat16"),
        help="how onnx stores weights, which are widened for use (default: as the model has them)",
    )
    parser.add_argument(
        "--fold",
        action="store_true",
        default=None,
        help="write the changes of adapters into the weights (safetensors; other formats but peft always do)",
    )
    parser.add_argument(
        "--shape",
        type=_shape,
        metavar="C,H,W",
        help="of a picture (C,D,H,W of a volume, C,T,H,W of a clip), for another size than the run's, or where its "
        "data are not on this machine",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        metavar="WIDTHxDEPTH",
        help="networks to cut out of an elastic one, each into a folder of its name, or all (timm; default: the whole)",
    )
    parser.add_argument(
        "--licence", type=_licence, metavar="NAME", help="of the weights, for the model card, such as apache-2.0"
    )
    parser.add_argument("--out", type=folder, metavar="DIR", help="folder to write (default: RUN/export/FORMAT)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in --out")
    parser.add_argument("--run", type=folder, metavar="DIR", help="run folder, if the checkpoint is not inside it")
    parser.add_argument("--recipe", metavar="RECIPE", help="recipe to build the model from, if there is no run folder")
    add_allow_module_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Writes the export, or nothing: the folder appears once it was read back and found equal. 1 if it was not."""
    from lightspan.callbacks.training.adaptation import Adaptation
    from lightspan.cli.config.build import build
    from lightspan.cli.exports import formats
    from lightspan.cli.exports.onnx_file import require_packages
    from lightspan.cli.runs.train import load_merged_weights

    _require_options_of(args)
    if args.to == "onnx":
        require_packages()
    checkpoint = find_checkpoint(args.checkpoint)
    if alone := checkpoint.suffix == ".safetensors":
        _require_whole_task(args, checkpoint)
    resolved = _resolved(args, checkpoint)
    out = args.out or _own_place(_run_folder(args, checkpoint), args.to)
    built = build(in_one_process(resolved))
    Adaptation.act(built.trainer, built.model)
    built.model.configure_model()
    formats.require_sizes(built.model, args.sizes)
    refuse_occupied(out, args.overwrite)
    (load_merged_weights if alone else load_weights)(built.model, checkpoint)
    request = formats.Request(
        built,
        {"recipe": resolved.name, **_version()},
        what=args.what or "features",
        precision=args.precision,
        shape=args.shape,
        sizes=args.sizes,
        fold=bool(args.fold),
    )
    write = {
        "safetensors": formats.to_safetensors,
        "huggingface": formats.to_huggingface,
        "peft": formats.to_peft,
        "timm": formats.to_timm,
        "torch-export": formats.to_torch_export,
        "onnx": formats.to_onnx,
    }[args.to]
    with whole_folder(out) as folder:
        product = write(request, folder)
        print(printable(_said(product)))
        if not product.difference <= product.limit:
            print(f"this is more than {product.limit:.3g}: nothing was written")
            return 1
        _write_cards(args, resolved, checkpoint, product, folder)
        record = {"format": args.to, "recipe": resolved.name, "checkpoint": str(checkpoint), **_version()}
        record |= {**product.record, "largest_difference": product.difference, "limit": product.limit}
        (folder / EXPORT).write_text(json.dumps(record, indent=2) + "\n")
    files = sorted(path.name for path in out.iterdir())
    print(printable(f"wrote {out}: {', '.join(files)}"))
    return 0


def _require_options_of(args: argparse.Namespace) -> None:
    """Raises: UserError for an option of another format."""
    for name, formats in _ONLY.items():
        if getattr(args, name) is not None and args.to not in formats:
            raise UserError(
                f"--{name} is an option of --to {' and --to '.join(formats)}, and this is --to {args.to}; leave one of "
                "them out"
            )


def _said(product: "Product") -> str:
    what = "tensor" if product.reader == "safetensors" else "output"
    return f"read back with {product.reader}: largest {what} difference {product.difference:.3g}"


def _write_cards(
    args: argparse.Namespace, resolved: "Resolved", checkpoint: Path, product: "Product", folder: Path
) -> None:
    """A model card in each folder that others may publish."""
    from lightspan.cli.exports.model_card import CardFacts, model_card

    wrote = "the adapters" if args.to == "peft" else "the weights"
    if args.to in FUNCTIONS:
        wrote = "the predictions, as a program," if args.what == "predict" else "the features, as a program,"
    check = f"When it was written it was {_said(product)} (accepted: {product.limit:.3g})."
    facts = CardFacts(wrote, product.loading, check, product.library, product.record, args.licence, product.task)
    run = None if args.recipe else _run_folder(args, checkpoint)
    card = model_card(resolved, run, facts)
    for name in product.cards:
        (folder / name / CARD).write_text(card, encoding="utf-8")


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
        what = "is a folder without a checkpoint" if given.is_dir() else "does not exist"
        raise UserError(f"checkpoint {str(given)!r} {what}; name RUN/checkpoints/NAME.ckpt or a run folder")
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
    from lightspan.training.checkpoints.fit import check_fits
    from lightspan.training.checkpoints.io import read_checkpoint

    content = read_checkpoint(checkpoint, optimizers=False)
    stamp, state = content.get("lightspan", {}), content["state_dict"]
    way_out = "name the run folder that it comes from with --run"
    check_fits(state, model, str(checkpoint), stamp.get("model"), way_out=way_out)
    model.load_state_dict(state, strict=True)


def _resolved(args: argparse.Namespace, checkpoint: Path) -> "Resolved":
    from lightspan.cli.config.build import load_resolved, resolve

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


def _own_place(run: Path, to: str) -> Path:
    """In the run folder, which another may have written. Raises: UserError if its exports are a link that leads out."""
    refuse_link_out(run / "export", run, "its run folder")
    return run / "export" / to


def _shape(text: str) -> tuple[int, ...]:
    """Of a picture, a volume or a clip. Raises: argparse.ArgumentTypeError."""
    numbers = text.split(",")
    if len(numbers) not in (3, 4) or not all(x.strip().isdecimal() and 0 < int(x) < 2**16 for x in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not three or four numbers from 1 to 65535, such as 3,224,224")
    return tuple(map(int, numbers))


def _licence(text: str) -> str:
    """An identifier as the Hub lists them. Raises: argparse.ArgumentTypeError."""
    if not _LICENCE.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not the identifier of a licence: lower-case letters, digits and .+-, such as apache-2.0"
        )
    return text


def _version() -> dict[str, str]:
    from lightspan import __version__

    return {"lightspan": __version__}
