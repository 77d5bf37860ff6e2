"""`lightspan data pack SOURCE --out DIR`, `data verify DIR` and `data index DIR`: write shards and look after them;
`data tokenizer FOLDER --out DIR` trains a tokenizer on texts.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from lightspan.cli.commands.arguments import folder
from lightspan.core.errors import UserError, one_line, printable

if TYPE_CHECKING:
    from lightspan.datamodules.shards.pack_sources import Members
    from lightspan.datamodules.shards.shelves import Shelf

SHARDS = "lightspan.datamodules.shards.stream.Shards"
PAIRED = "lightspan.datamodules.shards.paired.PairedShards"
TEXTS = "lightspan.datamodules.text.shards.TextShards"
STORED_TOKENIZER = "lightspan.backbones.tokenizers.stored_tokenizer"
KINDS = ("bpe", "unigram")
RECORDINGS = "lightspan.datamodules.shards.recordings.RecordingShards"
BATCH, SIDE = 256, 224  # the largest that are proposed
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=("pack", "verify", "index", "tokenizer"),
        help="write shards; compare them with their sha256; write an index beside each shard that has none; train a "
        "tokenizer",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=_source,
        help="pack: a folder of the files to write; one folder of images or recordings for each class becomes labelled "
        "ones; other files with the same name form one sample. Or a tar that is read once: - for standard input, or an "
        "address of https or an object store. verify: what `data pack` wrote. index: the folder of the shards; both "
        "also s3://BUCKET/FOLDER. tokenizer: a folder of texts",
    )
    parser.add_argument("--out", metavar="DIR", type=folder, help="pack, tokenizer: folder to write; it must not exist")
    parser.add_argument(
        "--shard-size", metavar="BYTES", default="256M", help="pack: size of a shard, with K, M or G (default: 256M)"
    )
    parser.add_argument("--seed", metavar="N", type=int, help="pack: seed of the order of samples (default: 0)")
    parser.add_argument("--keep-order", action="store_true", help="pack: write the samples in sorted order instead")
    parser.add_argument(
        "--files",
        action="store_true",
        help="pack: files with the same name form a sample, even if folders contain images",
    )
    parser.add_argument(
        "--text",
        action="store_true",
        help="pack: each text below the folder is a sample: a .txt, .md or .py file, or a line of a .jsonl file",
    )
    parser.add_argument("--size", metavar="N", type=int, default=8192, help="tokenizer: its numbers (default: 8192)")
    parser.add_argument(
        "--kind", choices=KINDS, default=KINDS[0], help="tokenizer: pairs of bytes, or pieces of SentencePiece"
    )
    parser.add_argument(
        "--decode", action="store_true", help="pack: decode each image and recording completely, not only its header"
    )
    parser.add_argument(
        "--skip-damaged", action="store_true", help="pack: leave out what cannot be decoded, and name it"
    )
    parser.add_argument(
        "--max-member",
        metavar="BYTES",
        default="256M",
        help="pack: the largest member that is read from a tar (default: 256M, as when training)",
    )


def _source(text: str) -> Path | str:
    """A folder, or - or an address, which stay text."""
    from lightspan.core.files.stores import SCHEME
    from lightspan.datamodules.shards.pack_stream import STANDARD_INPUT

    return text if text == STANDARD_INPUT or SCHEME.match(text) else folder(text)


def run(args: argparse.Namespace) -> int:
    if args.action == "pack":
        return _pack(args)
    if args.action == "tokenizer" and isinstance(args.source, Path):
        return _tokenizer(args.source, args)
    with _shelf(args) as shelf:
        return {"verify": _verify, "index": _index}[args.action](args.source, shelf)


@contextmanager
def _shelf(args: argparse.Namespace) -> "Iterator[Shelf]":
    """Raises: UserError for an address that is not of an object store, and for any at which the action cannot look."""
    from lightspan.core.files.stores import in_store
    from lightspan.datamodules.shards.shelves import FolderShelf, StoreShelf

    if isinstance(args.source, Path):
        yield FolderShelf(args.source)
    elif args.action != "tokenizer" and in_store(args.source):
        with TemporaryDirectory(prefix="lightspan-") as room:
            yield StoreShelf(args.source, Path(room))
    else:
        raise UserError(f"data {args.action} looks at a folder, not at {args.source}; name the folder of the shards")


def _pack(args: argparse.Namespace) -> int:
    """Packs, then prints how a recipe names the shards. Raises: UserError for a source or size that cannot work."""
    if args.out is None:
        raise UserError("data pack needs a folder to write; name it with --out DIR")
    shard_bytes = parse_size(args.shard_size, "--shard-size")
    if args.seed is not None and args.seed < 0:
        raise UserError(f"--seed {args.seed} is negative; give a whole number from 0 up")
    from rich.progress import track

    from lightspan.datamodules.shards.pack import SeenSamples, pack, pattern

    seen, remarks = SeenSamples(), list[str]()
    left_out: list[str] = []
    with ExitStack() as stack:
        samples, classes, total = _samples(args, stack, remarks)
        packing = pack(
            seen.through(samples), classes, args.out, shard_bytes, args.decode, left_out if args.skip_damaged else None
        )
        for _ in track(packing, "packing", total=total, transient=True, disable=not sys.stdout.isatty()):
            pass
    for line in (*remarks, *(f"left out: {line}" for line in sorted(left_out))):
        print(one_line(line))
    shards = len(list(args.out.glob("*.tar")))
    shown = f"{', '.join(classes[:5])}{', ...' if classes[5:] else ''}"
    of_classes = f" of {len(classes)} classes ({shown})" if classes else ""
    count = seen.count - len(left_out)
    print(one_line(f"wrote {args.out}: {count:,} samples{of_classes} in {shards} shards"))
    side = None if seen.side is None else min(seen.side, SIDE)
    reader = PAIRED if seen.are_pairs() else RECORDINGS if seen.are_recordings() else SHARDS
    reader = TEXTS if args.text else reader
    fields = seen.fields() if reader == SHARDS else None
    print(one_line(f"next: {shlex.join(_settings(reader, pattern(args.out), fields, count, side))}"))
    return 0


def _samples(
    args: argparse.Namespace, stack: ExitStack, remarks: list[str]
) -> "tuple[Iterator[Members], list[str], int | None]":
    """(samples in the order of writing, names of classes, how many samples or None where nobody knows)."""
    if isinstance(args.source, Path):
        from lightspan.datamodules.shards.pack_sources import shuffled, sources, text_sources

        if args.text and args.files:
            raise UserError("--text and --files say two things of the same folder; leave one of them out")
        found = text_sources(args.source) if args.text else sources(args.source, args.files)
        remarks += found.remarks
        ordered = found.samples if args.keep_order else shuffled(found.samples, args.seed or 0)
        return iter(ordered), found.classes, len(ordered)
    from lightspan.datamodules.shards.pack_stream import LIMIT, opened, samples_of

    if args.seed is not None or args.files or args.text:
        flag = "--files" if args.files else "--text" if args.text else "--seed"
        raise UserError(f"{flag} is for folders: a tar that is read once keeps its order and its members; leave it out")
    limit = parse_size(args.max_member, LIMIT)
    stream = stack.enter_context(opened(args.source))
    return samples_of(stream, args.source, limit, remarks), [], None


def _settings(reader: str, shards: str, fields: dict[str, str] | None, count: int, side: int | None) -> list[str]:
    """The flags with which a recipe reads what was packed; pictures of `side` pixels, or none where None."""
    settings = {"shards": f"[{shards}]"}
    if fields is not None:
        settings["fields"] = f"{{{', '.join(f'{k}: {v}' for k, v in fields.items())}}}"
    settings["batch_size"] = str(min(count, BATCH))
    if side is not None:
        settings["image_size"] = str(side)
    return [f"data.class_path={reader}", *(f"data.init_args.{key}={value}" for key, value in settings.items())]


def _verify(source: Path | str, shelf: "Shelf") -> int:
    """Reads every packed file. Returns 1 where one is missing, damaged or not listed, and names it."""
    from rich.progress import track

    from lightspan.datamodules.shards.verify import listed, problem_of, unlisted

    sums = listed(shelf)
    checks = track(sums.items(), "verifying", transient=True, disable=not sys.stdout.isatty())
    problems = [problem for name, digest in checks if (problem := problem_of(shelf, name, digest)) is not None]
    strangers = [f"{shelf.shown(name)}: was not written by `data pack`" for name in unlisted(shelf, sums)]
    for problem in problems + strangers:
        print(one_line(problem))
    print(printable(f"{source}: {len(sums) - len(problems)} of {len(sums)} files are unchanged"))
    return 1 if problems or strangers else 0


def _index(source: Path | str, shelf: "Shelf") -> int:
    from rich.progress import track

    from lightspan.datamodules.shards.verify import without_index, write_index

    shards, samples = without_index(shelf), 0
    for shard in track(shards, "indexing", transient=True, disable=not sys.stdout.isatty()):
        count, remarks = write_index(shelf, shard)
        samples += count
        for remark in remarks:
            print(one_line(remark))
    print(printable(f"{source}: wrote the index of {len(shards)} shards with {samples:,} samples"))
    return 0


def _tokenizer(source: Path, args: argparse.Namespace) -> int:
    """Trains on the documents that no run with the usual split holds out, and says how a recipe names the result.

    Raises: UserError for a folder that is there, and as `trained_tokenizer` and `find_documents`.
    """
    if args.out is None:
        raise UserError("data tokenizer needs a folder to write; name it with --out DIR")
    if args.out.exists():
        raise UserError(f"{args.out} already exists; name a new folder with --out, or remove that one")
    from lightspan.backbones.trained_tokenizers import trained_tokenizer
    from lightspan.core.files.atomic import atomic_path
    from lightspan.datamodules.text.documents import VAL_FRACTION, Skipped, find_documents
    from lightspan.datamodules.text.endings import SUFFIXES
    from lightspan.datamodules.text.windows import in_validation

    skipped = Skipped()
    texts = (
        document.content.decode()
        for document in find_documents([str(source)], SUFFIXES, skipped)
        if not in_validation(document.name, VAL_FRACTION)
    )
    tokenizer = trained_tokenizer(texts, args.size, args.kind)
    with atomic_path(args.out, setting="--out") as temporary:
        tokenizer.save_pretrained(temporary)
    print(one_line(f"wrote {args.out}: a tokenizer of {len(tokenizer):,} numbers{skipped}"))
    settings = [
        f"data.init_args.tokenizer.class_path={STORED_TOKENIZER}",
        f"data.init_args.tokenizer.init_args.folder={args.out}",
    ]
    print(one_line(f"next: {shlex.join(settings)}"))
    return 0


def parse_size(text: str, option: str) -> int:
    """Bytes from `64M` and the like, as `option` gives them. Raises: UserError for anything else, and below 1 KiB."""
    match = re.fullmatch(r"(\d{1,15})([KMG]?)(?:i?B)?", text)
    size = int(match[1]) * UNITS[match[2]] if match else 0
    if size < 1024:
        raise UserError(f"{option} {text} is not a size from 1K up; write for instance 64M or 1G")
    return size
