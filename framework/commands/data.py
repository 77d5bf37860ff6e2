"""`lightspan data pack FOLDER --out DIR`, `data verify DIR` and `data index DIR`: write and check shards."""

import argparse
import contextlib
import re
import shlex
import sys
from typing import TYPE_CHECKING

from lightspan.commands.arguments import folder
from lightspan.errors import UserError, one_line

if TYPE_CHECKING:
    from lightspan.datamodules.shards.pack_sources import Members

SHARDS = "lightspan.datamodules.shards.stream.Shards"
BATCH, SIDE = 256, 224  # the largest that are proposed
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=("pack", "verify", "index"),
        help="write shards; compare them with their sha256; write an index beside each shard that has none",
    )
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        type=folder,
        help="pack: the files to write; one folder of images for each class becomes labelled images; of other files, "
        "those with the same name form one sample. verify: what `data pack` wrote. index: the folder of the shards",
    )
    parser.add_argument("--out", metavar="DIR", type=folder, help="pack: folder to write; it must not exist")
    parser.add_argument(
        "--shard-size", metavar="BYTES", default="256M", help="pack: size of a shard, with K, M or G (default: 256M)"
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="pack: seed of the order of samples (default: 0)"
    )
    parser.add_argument("--keep-order", action="store_true", help="pack: write the samples in sorted order instead")
    parser.add_argument(
        "--files",
        action="store_true",
        help="pack: files with the same name form a sample, even if folders contain images",
    )
    parser.add_argument("--decode", action="store_true", help="pack: decode each image completely, not only its header")
    parser.add_argument(
        "--skip-damaged", action="store_true", help="pack: leave out what cannot be decoded, and name it"
    )


def run(args: argparse.Namespace) -> int:
    return {"pack": _pack, "verify": _verify, "index": _index}[args.action](args)


def _pack(args: argparse.Namespace) -> int:
    """Packs, then prints how a recipe names the shards. Raises: UserError for a source or size that cannot work."""
    if args.out is None:
        raise UserError("data pack needs a folder to write; name it with --out DIR")
    shard_bytes = parse_size(args.shard_size)
    if args.seed < 0:
        raise UserError(f"--seed {args.seed} is negative; give a whole number from 0 up")
    from rich.progress import track

    from lightspan.datamodules.shards.pack import fields_of, pack, pattern
    from lightspan.datamodules.shards.pack_sources import sources

    samples, classes, remarks = sources(args.folder, args.files)
    left_out: list[str] = []
    packing = pack(
        samples,
        classes,
        args.out,
        shard_bytes,
        None if args.keep_order else args.seed,
        args.decode,
        left_out if args.skip_damaged else None,
    )
    for _ in track(packing, "packing", total=len(samples), transient=True, disable=not sys.stdout.isatty()):
        pass
    for line in (*remarks, *(f"left out: {line}" for line in sorted(left_out))):
        print(one_line(line))
    shards = len(list(args.out.glob("*.tar")))
    shown = f"{', '.join(classes[:5])}{', ...' if classes[5:] else ''}"
    of_classes = f" of {len(classes)} classes ({shown})" if classes else ""
    count = len(samples) - len(left_out)
    print(one_line(f"wrote {args.out}: {count:,} samples{of_classes} in {shards} shards"))
    print(one_line(f"next: {shlex.join(_settings(pattern(args.out), fields_of(samples), count, _side(samples)))}"))
    return 0


def _settings(shards: str, fields: dict[str, str], count: int, side: int | None) -> list[str]:
    """The flags with which any recipe reads what was packed; pictures of `side` pixels, or no pictures."""
    settings = {"shards": f"[{shards}]", "fields": f"{{{', '.join(f'{k}: {v}' for k, v in fields.items())}}}"}
    settings["batch_size"] = str(min(count, BATCH))
    if side is not None:
        settings["image_size"] = str(side)
    return [f"data.class_path={SHARDS}", *(f"data.init_args.{key}={value}" for key, value in settings.items())]


def _side(samples: "list[Members]") -> int | None:
    """The side of the squares that pictures may be cropped to: the shorter side of the first readable picture, at
    most SIDE, which most pretrained networks use; None if there are no pictures.
    """
    from lightspan.datamodules.shards.decoders import IMAGES, UNDECODABLE, open_image

    for sample in samples:
        for name, source in sample.items():
            if name.rpartition(".")[2].lower() in IMAGES:
                with contextlib.suppress(*UNDECODABLE, OSError):
                    return min(*open_image(source if isinstance(source, bytes) else source.read_bytes()).size, SIDE)
    return None


def _verify(args: argparse.Namespace) -> int:
    """Reads every file of a packed folder. Returns 1 if one is missing, damaged or not listed, and names it."""
    from rich.progress import track

    from lightspan.datamodules.shards.verify import listed, problem_of, unlisted

    sums = listed(args.folder)
    checks = track(sums.items(), "verifying", transient=True, disable=not sys.stdout.isatty())
    problems = [problem for name, digest in checks if (problem := problem_of(args.folder / name, digest)) is not None]
    strangers = [f"{args.folder / name}: was not written by `data pack`" for name in unlisted(args.folder, sums)]
    for problem in problems + strangers:
        print(one_line(problem))
    print(f"{args.folder}: {len(sums) - len(problems)} of {len(sums)} files are unchanged")
    return 1 if problems or strangers else 0


def _index(args: argparse.Namespace) -> int:
    from rich.progress import track

    from lightspan.datamodules.shards.verify import without_index, write_index

    shards, samples = without_index(args.folder), 0
    for shard in track(shards, "indexing", transient=True, disable=not sys.stdout.isatty()):
        count, remarks = write_index(shard)
        samples += count
        for remark in remarks:
            print(one_line(remark))
    print(f"{args.folder}: wrote the index of {len(shards)} shards with {samples:,} samples")
    return 0


def parse_size(text: str) -> int:
    """Bytes from `64M` and the like. Raises: UserError for anything else, and below 1 KiB."""
    match = re.fullmatch(r"(\d{1,15})([KMG]?)(?:i?B)?", text)
    size = int(match[1]) * UNITS[match[2]] if match else 0
    if size < 1024:
        raise UserError(f"--shard-size {text} is not a size from 1K up; write for instance 64M or 1G")
    return size
