"""`lightspan data pack FOLDER --out DIR` and `lightspan data verify DIR`: write shards, see if they are whole."""

import argparse
import re
import sys
from pathlib import Path

from lightspan.errors import UserError

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("pack", "verify"), help="write shards, or compare them with their sha256")
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        type=Path,
        help="pack: the files to write; one folder of images for each class becomes labelled images, of other files "
        "those of one name form one sample. verify: what `data pack` wrote",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="pack: folder to write; it must not exist")
    parser.add_argument(
        "--shard-size", metavar="BYTES", default="256M", help="pack: size of a shard, with K, M or G (default: 256M)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="pack: of the order of samples (default: 0)")
    parser.add_argument("--keep-order", action="store_true", help="pack: write the samples in sorted order instead")


def run(args: argparse.Namespace) -> int:
    return _pack(args) if args.action == "pack" else _verify(args)


def _pack(args: argparse.Namespace) -> int:
    """Packs, then says how a recipe names the shards. Raises: UserError for a source or size that cannot work."""
    if args.out is None:
        raise UserError("data pack needs a folder to write; name it with --out DIR")
    shard_bytes = parse_size(args.shard_size)
    if args.seed < 0:
        raise UserError(f"--seed {args.seed} is negative; give a whole number from 0 up")
    from rich.progress import track

    from lightspan.datamodules.pack import fields_of, pack, pattern, sources

    samples, classes = sources(args.folder)
    packing = pack(samples, classes, args.out, shard_bytes, None if args.keep_order else args.seed)
    for _ in track(packing, "packing", total=len(samples), transient=True, disable=not sys.stdout.isatty()):
        pass
    shards = len(list(args.out.glob("*.tar")))
    of_classes = f" of {len(classes)} classes" if classes else ""
    print(f"wrote {args.out}: {len(samples):,} samples{of_classes} in {shards} shards, members {fields_of(samples)}")
    print(f"next: data.init_args.shards=[{pattern(args.out)}]")
    return 0


def _verify(args: argparse.Namespace) -> int:
    """Reads every file of a packed folder. Returns 1 where one is missing or damaged, and names it."""
    from rich.progress import track

    from lightspan.datamodules.pack import listed, problem_of

    sums = listed(args.folder)
    checks = track(sums.items(), "verifying", transient=True, disable=not sys.stdout.isatty())
    problems = [problem for name, digest in checks if (problem := problem_of(args.folder / name, digest)) is not None]
    for problem in problems:
        print(problem)
    print(f"{args.folder}: {len(sums) - len(problems)} of {len(sums)} files are as they were written")
    return 1 if problems else 0


def parse_size(text: str) -> int:
    """Bytes from `64M` and the like. Raises: UserError for anything else, and below 1 KiB."""
    match = re.fullmatch(r"(\d{1,15})([KMG]?)(?:i?B)?", text)
    size = int(match[1]) * UNITS[match[2]] if match else 0
    if size < 1024:
        raise UserError(f"--shard-size {text} is not a size from 1K up; write for instance 64M or 1G")
    return size
