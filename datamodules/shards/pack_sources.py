"""What can be packed from a folder: images or recordings by class, or files, those of one name a sample."""

import os
from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lightspan.core.errors import UserError
from lightspan.datamodules.shards.decoders import DECODERS, IMAGES, SOUNDS, decodable
from lightspan.datamodules.shards.tars import META, split_name

Members = dict[str, Path | bytes]  # one sample: {name in the shard: its content, or the file that contains it}


class Sources(NamedTuple):
    """samples; classes: their names, none if samples have no label; remarks: lines on what may be unexpected."""

    samples: list[Members]
    classes: list[str]
    remarks: list[str]


def sources(folder: Path, as_files: bool = False) -> Sources:
    """What is to be packed. Hidden files are left out and counted; links are refused, since they can lead elsewhere.

    If each image or recording is in a folder of its class, and nothing else is there, samples are labelled ones:
    members CLASS/NAME.ENDING and CLASS/NAME.cls, the number of the class in sorted order. If no folder contains one,
    the files with the same name up to the first dot form one sample. Anything between the two is refused.

    Args:
        as_files: True treats any folder as the second kind.

    Raises: UserError if there is no such folder or nothing in it, for what is neither kind, and for names that
        readers of shards would skip or take for one sample.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name the folder whose files are to be packed")
    files, hidden = _files_below(folder)
    if not files:
        raise UserError(f"{folder} contains no file to pack; name another folder")
    _check_names(folder, files)
    remarks = [f"{hidden} hidden files and folders are left out"] if hidden else []
    in_classes = [file for file in files if _has_class(file) and len(file.parts) > 1]
    if as_files or not in_classes:
        return _by_name(folder, files, remarks, as_files)
    others = sorted(set(files) - set(in_classes))
    if others:
        more = f", nor are {len(others) - 1} others" if others[1:] else ""
        raise UserError(
            f"{folder / others[0]} is not an image ({', '.join(IMAGES)}) or recording ({', '.join(SOUNDS)}) in a class "
            f"folder{more}, but other files of {folder} are; remove it, or begin its name with a dot, to pack labelled "
            "samples, or pack all files without labels with --files"
        )
    return _by_class(folder, in_classes, remarks)


def text_sources(folder: Path) -> Sources:
    """The texts below a folder as samples of one member, KEY.txt: files, and lines of .jsonl files.

    Texts without anything but white space are left out, and counted in the remarks, as are those that are no text.

    Raises: UserError if there is no such folder, or no text, and for a line without one.
    """
    from lightspan.datamodules.text.documents import Skipped, find_documents
    from lightspan.datamodules.text.endings import SUFFIXES

    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name the folder whose texts are to be packed")
    skipped, samples = Skipped(), list[Members]()
    for number, (name, content) in enumerate(find_documents([str(folder)], SUFFIXES, skipped)):
        if not content.strip():
            skipped.reasons["empty"] += 1
            continue
        # A name in a shard ends at its first dot, and two texts may not have the same.
        key = Path(name.replace(".", "_"))
        samples.append({f"{(key.parent / f'{number:08}_{key.name}').as_posix()}.txt": content})
    if not samples:
        raise UserError(f"{folder} contains no text to pack{skipped}; name another folder")
    return Sources(samples, [], [str(skipped).removeprefix("; ")] if skipped.reasons else [])


def shuffled(samples: list[Members], seed: int) -> list[Members]:
    """The samples in an order drawn from `seed`.

    A training run mixes only the shards that are open together, so samples that are sorted by class should be packed in
    random order.
    """
    return [samples[number] for number in np.random.default_rng(seed).permutation(len(samples)).tolist()]


def _files_below(folder: Path) -> tuple[list[Path], int]:
    """(files relative to `folder` in sorted order, number of hidden files and folders that are left out)."""

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}; change its permissions or remove it")

    files, hidden = [], 0
    for parent, children, names in os.walk(folder, onerror=fail):
        shown = [name for name in children + names if not name.startswith(".")]
        hidden += len(children) + len(names) - len(shown)
        for path in (Path(parent, name) for name in shown):
            if path.is_symlink():
                raise UserError(
                    f"{path} is a link, which can lead out of the folder, so it is not followed; put the file itself "
                    "in its place, or remove it"
                )
            if path.is_file():
                files.append(path.relative_to(folder))
            elif not path.is_dir():
                raise UserError(f"{path} is not a regular file; remove it")
        children[:] = [child for child in children if not child.startswith(".")]
    return sorted(files), hidden


def _check_names(folder: Path, files: Iterable[Path]) -> None:
    for file in files:
        if META.match(file.as_posix()):
            raise UserError(
                f"{folder / file.parts[0]}: names like __THIS__ mark what describes a shard, so every reader of "
                "WebDataset skips what is in it; rename it"
            )
        try:
            file.as_posix().encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the name {str(folder / file)!r} is not UTF-8, which shards need; rename it") from error


def _has_class(file: Path) -> bool:
    """Whether it is of a kind that a folder can give a class."""
    return file.suffix[1:].lower() in (*IMAGES, *SOUNDS)


def _by_class(folder: Path, images: list[Path], remarks: list[str]) -> Sources:
    classes = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    _check_names(folder, map(Path, classes))
    numbers = {name: str(number).encode() for number, name in enumerate(classes)}
    samples: list[Members] = []
    keys = []
    for image in images:
        # A name in a shard ends at its first dot, so that of 12.30.png would be 12.
        key = (image.parent / image.stem.replace(".", "_")).as_posix()
        samples.append({f"{key}{image.suffix.lower()}": folder / image, f"{key}.cls": numbers[image.parts[0]]})
        keys.append(key)
    repeated = [key for key, count in Counter(keys).items() if count > 1]
    if repeated:
        more = f", and {len(repeated) - 1} more names are shared" if repeated[1:] else ""
        raise UserError(
            f"{folder}: {keys.count(repeated[0])} files are named {repeated[0]}, with dots as _, so they would "
            f"form one sample{more}; rename them"
        )
    empty = sorted(set(classes) - {image.parts[0] for image in images})
    if empty:
        remarks = [*remarks, f"{len(empty)} of {len(classes)} classes have no sample: {', '.join(empty[:5])}"]
    return Sources(samples, classes, remarks)


def _by_name(folder: Path, files: list[Path], remarks: list[str], as_files: bool) -> Sources:
    names = [(split_name(file.as_posix()), file) for file in files]
    nameless = [file for parts, file in names if parts is None]
    if nameless:
        more = f", nor have {len(nameless) - 1} others" if nameless[1:] else ""
        raise UserError(
            f"{folder / nameless[0]} has no ending that could say what it contains{more}; rename it or move it away"
        )
    members = sorted((parts[0], parts[1], file) for parts, file in names if parts is not None)
    samples: list[Members] = []
    endings: Counter[str] = Counter()
    for key, group in groupby(members, key=lambda member: member[0]):
        sample: Members = {}
        for _, ending, file in group:
            name = f"{key}.{ending}"
            if name in sample:
                raise UserError(f"{folder / file} and another file would both be the member {name}; rename one of them")
            sample[name] = folder / file
            endings[ending] += 1
        samples.append(sample)
    if not as_files and not {*map(decodable, endings)} & set(DECODERS):
        raise UserError(
            f"{folder} contains no file with an ending that can be decoded ({', '.join(DECODERS)}), but "
            f"{', '.join(sorted(endings)[:5])}, as an ending begins at the first dot of a name; convert or rename the "
            "files, or pack them for other readers with --files"
        )
    if "cls" not in endings:
        remarks = [
            *remarks,
            "samples have no label: no folder contains images or recordings of one class, and no file ends in .cls",
        ]
    lacking = {ending: len(samples) - count for ending, count in endings.items() if count < len(samples)}
    remarks += [f"{count} of {len(samples)} samples have no .{ending}" for ending, count in sorted(lacking.items())[:5]]
    return Sources(samples, [], remarks)
