"""Writes folders of files as tar shards with an index, and checks shards against what was written."""

import hashlib
import io
import json
import secrets
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

from lightspan.datamodules.shard_index import SUFFIX, from_json, read_sample, scan
from lightspan.datamodules.tars import DECODERS, sample_key
from lightspan.errors import UserError
from lightspan.files import explained_os_errors, remove, replace_folder, temporary_path

SUMS_FILE = "SHA256SUMS"  # in the format of sha256sum, which can check it too
CLASSES_FILE = "classes.json"
IMAGES = ("jpg", "jpeg", "png", "webp")


Members = dict[str, Path | bytes]  # one sample: {name in the shard: its content, or the file that holds it}


def image_folder(folder: Path) -> tuple[list[Members], list[str]] | None:
    """(samples, names of the classes) of a folder with one folder of images for each class; None for any other folder.

    A sample has the members CLASS/NAME.ENDING and CLASS/NAME.cls, the number of its class in sorted order.
    """
    children = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if not children or not all(child.is_dir() for child in children):
        return None
    samples: list[Members] = []
    for number, child in enumerate(children):
        for path in files_below(child):
            if path.suffix[1:].lower() not in IMAGES:
                return None
            name = path.relative_to(folder).as_posix()
            samples.append({name: path, f"{sample_key(name)}.cls": str(number).encode()})
    return samples, [child.name for child in children]


def file_folder(folder: Path) -> list[Members]:
    """The files below a folder; those of one name up to the first dot form one sample."""
    names = [(sample_key(name), name) for path in files_below(folder) if (name := path.relative_to(folder).as_posix())]
    nameless = [name for key, name in names if key is None]
    if nameless:
        raise UserError(
            f"{folder / nameless[0]} has no ending that could say what it holds, nor have {len(nameless) - 1} others; "
            "rename it, or move it elsewhere"
        )
    grouped = groupby(sorted(names, key=lambda pair: (str(pair[0]), pair[1])), key=lambda pair: pair[0])
    return [{name: folder / name for _, name in pairs} for _, pairs in grouped]


def files_below(folder: Path) -> list[Path]:
    """Regular files in sorted order, without hidden ones. Links are not followed out of the folder."""
    found = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not path.is_symlink() and not hidden:
            found.append(path)
    return found


def sources(folder: Path) -> tuple[list[Members], list[str]]:
    """(samples, class names) of a folder; no names where the folder is no image folder.

    Raises: UserError where there is no such folder, nothing in it, or two files that would be the same member.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name the folder whose files are to be packed")
    samples, classes = image_folder(folder) or (file_folder(folder), [])
    if not samples:
        raise UserError(f"{folder} holds no file to pack; name another folder")
    counts = Counter(sample_key(next(iter(sample))) for sample in samples)
    repeated = [key for key, count in counts.items() if count > 1]
    if repeated:
        raise UserError(
            f"{folder}: {counts[repeated[0]]} images are named {repeated[0]} up to the first dot, so they would form "
            f"one sample, and {len(repeated) - 1} more names are shared; rename them"
        )
    return samples, classes


def pack(samples: list[Members], classes: list[str], out: Path, shard_bytes: int, seed: int | None) -> Iterator[int]:
    """Writes `out`, a new folder: shards, their indices, SHA256SUMS, and classes.json where there are classes.

    The folder appears when everything in it is whole, and never otherwise. The same input gives the same bytes.

    Args:
        shard_bytes: a shard ends when it has reached this many bytes.
        seed: of the order in which the samples are written; None keeps them as they are. A training run mixes only the
            shards that are open together, so samples that are sorted by class should be written in random order.

    Yields: after each sample, how many are written.
    Raises: UserError where `out` exists, or cannot be written.
    """
    if out.exists():
        raise UserError(f"{out} exists already; name a new folder with --out, or remove that one")
    order = range(len(samples)) if seed is None else np.random.default_rng(seed).permutation(len(samples)).tolist()
    temporary = temporary_path(out, secrets.token_hex(4))
    try:
        with explained_os_errors(out):
            temporary.mkdir(parents=True)
            written = 0
            shards: list[Path] = []
            remaining = iter(order)
            for first in remaining:
                shards.append(temporary / f"{len(shards):05}.tar")
                with tarfile.open(shards[-1], "w") as archive:
                    for number in _starting_with(first, remaining):
                        _add(archive, samples[number])
                        written += 1
                        yield written
                        if archive.offset >= shard_bytes:
                            break
            for shard in shards:
                _write_index(shard)
            if classes:
                (temporary / CLASSES_FILE).write_text(json.dumps(classes, ensure_ascii=False) + "\n", encoding="utf-8")
            sums = [f"{_sha256(path)}  {path.name}\n" for path in sorted(temporary.iterdir())]
            (temporary / SUMS_FILE).write_text("".join(sums), encoding="utf-8")
            replace_folder(temporary, out)
    finally:
        if temporary.exists():
            remove(temporary)


def _starting_with(first: int, rest: Iterable[int]) -> Iterator[int]:
    yield first
    yield from rest


def _add(archive: tarfile.TarFile, sample: Members) -> None:
    for name, source in sample.items():
        try:
            content = source if isinstance(source, bytes) else source.read_bytes()
        except OSError as error:
            raise UserError(f"{source!s} cannot be read: {error.strerror}; mend or remove it") from error
        member = tarfile.TarInfo(name)  # without times and owners, so that the same files give the same shard
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))


def _write_index(shard: Path) -> None:
    index, damage = scan(shard, shard.name, max_member_bytes=2**63)
    if damage is not None:
        raise UserError(f"what was just written does not read back: {damage}; look for a fault of the disk")
    Path(f"{shard}{SUFFIX}").write_text(index.to_json(), encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def pattern(folder: Path) -> str:
    """What data.init_args.shards must name to read the shards of a packed folder."""
    names = sorted(path.stem for path in folder.glob("*.tar"))
    return str(folder / (f"{{{names[0]}..{names[-1]}}}.tar" if len(names) > 1 else f"{names[0]}.tar"))


def listed(folder: Path) -> dict[str, str]:
    """{name of a file: its sha256} as written by `pack`. Raises: UserError where there is no such list."""
    path = folder / SUMS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); only folders that `data pack` wrote can be verified"
        ) from error
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    wrong = [name for name in sums if not name or Path(name).name != name]
    if wrong or not sums:
        raise UserError(f"{path} is not a list of sha256 sums of files beside it; pack the folder again")
    return sums


def problem_of(path: Path, sha256: str) -> str | None:
    """What is wrong with a packed file, for a shard down to its first damaged samples; None where nothing is."""
    try:
        if _sha256(path) == sha256:
            return None
    except OSError as error:
        return f"{path}: missing or unreadable ({error.strerror})"
    found = f"{path}: its sha256 is not the one that was written"
    index_path = Path(f"{path}{SUFFIX}")
    if path.suffix != ".tar" or not index_path.is_file():
        return found
    damaged = []
    try:
        index = from_json(index_path.read_text(encoding="utf-8"), str(path))
    except (UserError, OSError, UnicodeDecodeError):
        return found
    for number in range(len(index)):
        try:
            read_sample(index, number, path, max_member_bytes=2**63)
        except UserError:
            damaged.append(f"{number} (byte {index.starts[number]})")
    shown = ", ".join(damaged[:10]) + (", ..." if damaged[10:] else "")
    return f"{found}; {len(damaged)} of {len(index)} samples are damaged{': ' + shown if damaged else ''}"


def fields_of(samples: list[Members]) -> list[str]:
    """Endings of the first sample's members that have a decoder."""
    endings = [name[len(str(sample_key(name))) + 1 :].lower() for name in samples[0]]
    return [ending for ending in endings if ending in DECODERS]
