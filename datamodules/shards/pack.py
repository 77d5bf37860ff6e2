"""Writes samples as tar shards with an index."""

import contextlib
import io
import json
import secrets
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import explained_os_errors, remove, replace_folder, temporary_path
from lightspan.core.files.foreign import content_of
from lightspan.datamodules.shards.decoders import DECODERS, IMAGES, MASK, SOUNDS, damage_of
from lightspan.datamodules.shards.headers import UNDECODABLE, open_image
from lightspan.datamodules.shards.index import SUFFIX, scan, sha256_of
from lightspan.datamodules.shards.pack_sources import Members
from lightspan.datamodules.shards.tars import split_name

SUMS_FILE = "SHA256SUMS"  # in the format of sha256sum, which can check it too
CLASSES_FILE = "classes.json"


def pack(
    samples: Iterable[Members],
    classes: list[str],
    out: Path,
    shard_bytes: int,
    decode: bool = False,
    left_out: list[str] | None = None,
) -> Iterator[int]:
    """Writes `out`, a new folder: shards, their indices, SHA256SUMS, and classes.json if there are classes.

    The folder appears only once everything in it is complete. The same input gives the same bytes. What
    has a decoder must decode; of images and recordings, only the header is read.

    Args:
        samples: in the order in which they are written; each is held no longer than it takes to write it.
        shard_bytes: a shard ends when it has reached this many bytes.
        decode: True decodes images and recordings to the end.
        left_out: a list that gets a line for each sample that cannot be read or decoded, and is left out; None refuses
            to pack where there is any, once all have been read.

    Yields: after each sample, how many have been read.
    Raises: UserError if `out` exists, or cannot be written, or samples are damaged.
    """
    if out.exists():
        raise UserError(f"{out} already exists; name a new folder with --out, or remove that one")
    temporary = temporary_path(out, secrets.token_hex(4))
    damaged: list[str] = [] if left_out is None else left_out
    count = 0
    try:
        with explained_os_errors(out, setting="--out"):
            try:
                temporary.mkdir(parents=True)
            except FileNotFoundError as error:  # /proc and the like
                raise UserError(f"cannot make the folder {out}: {error.strerror}; name another with --out") from error
            with contextlib.closing(_Writer(temporary, shard_bytes)) as writer:
                for sample in samples:
                    count += 1
                    contents = _contents(sample, decode, damaged)
                    if contents is not None and (left_out is not None or not damaged):
                        writer.add(contents)
                    yield count
            if damaged and left_out is None:
                raise UserError(_refusal(damaged, count, decode))
            if not count:
                raise UserError("there is no sample to pack; look at what was to be read")
            if not writer.shards:
                raise UserError(f"no sample is left: {_refusal(damaged, count, decode)}")
            for shard in writer.shards:
                _write_index(shard)
            if classes:
                (temporary / CLASSES_FILE).write_text(json.dumps(classes, ensure_ascii=False) + "\n", encoding="utf-8")
            sums = [f"{sha256_of(path)}  {path.name}\n" for path in sorted(temporary.iterdir())]
            (temporary / SUMS_FILE).write_text("".join(sums), encoding="utf-8")
            replace_folder(temporary, out)
    finally:
        if temporary.exists():
            remove(temporary)


def _contents(sample: Members, decode: bool, damaged: list[str]) -> dict[str, bytes] | None:
    """The members of a sample; None, with a new line in `damaged`, if one cannot be read or decoded."""
    contents = {}
    for name, source in sample.items():
        try:
            contents[name] = source if isinstance(source, bytes) else content_of(source)
            parts = split_name(name)
            damage = damage_of(parts[1], contents[name], decode) if parts else None
        except ValueError as error:
            damage = str(error)
        if damage is not None:
            damaged.append(f"{source if isinstance(source, Path) else name}: {damage}")
            return None
    return contents


def _refusal(damaged: list[str], count: int, decode: bool) -> str:
    shown = "; ".join(sorted(damaged)[:5]) + ("; ..." if damaged[5:] else "")
    further = (
        ""
        if decode
        else ". Only the headers of images and sound were read; --decode also finds those that are cut short"
    )
    return (
        f"{len(damaged)} of {count} samples cannot be decoded, so training could not read them: {shown}. Correct or "
        f"remove these files, or leave them out with --skip-damaged{further}"
    )


class _Writer:
    """Writes samples to shards NUMBER.tar of a folder; one ends when it has reached `shard_bytes`, and before a sample
    of the key of its last one: side by side the two would be read as one.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.shards: list[Path] = []
        self._archive: tarfile.TarFile | None = None
        self._last: str | None = None

    def add(self, contents: dict[str, bytes]) -> None:
        key = next((parts[0] for name in contents if (parts := split_name(name))), None)
        if key == self._last:
            self.close()
        self._last = key
        if self._archive is None:
            self.shards.append(self.folder / f"{len(self.shards):05}.tar")
            self._archive = tarfile.open(self.shards[-1], "w")  # noqa: SIM115  # `close` closes it
        for name, content in contents.items():
            member = tarfile.TarInfo(name)  # without times and owners, so that the same files give the same shard
            member.size = len(content)
            self._archive.addfile(member, io.BytesIO(content))
        if self._archive.offset >= self.shard_bytes:
            self.close()

    def close(self) -> None:
        if self._archive is not None:
            self._archive.close()
            self._archive = None


def _write_index(shard: Path) -> None:
    index, damage = scan(shard, shard.name, max_member_bytes=2**63)
    if damage is not None:
        raise UserError(f"reading back what was just written failed: {damage}; check the disk")
    Path(f"{shard}{SUFFIX}").write_text(index.to_json(), encoding="utf-8")


def pattern(folder: Path) -> str:
    """What data.init_args.shards must name to read the shards of a packed folder."""
    names = sorted(path.stem for path in folder.glob("*.tar"))
    return str(folder / (f"{{{names[0]}..{names[-1]}}}.tar" if len(names) > 1 else f"{names[0]}.tar"))


@dataclass
class SeenSamples:
    """What a recipe has to know of samples, noted while they pass.

    endings: of the members of a sample, each combination that occurred. side: the shorter one of the first picture that
    can be read, in pixels.
    """

    count: int = 0
    endings: set[frozenset[str]] = field(default_factory=set)
    side: int | None = None

    def through(self, samples: Iterable[Members]) -> Iterator[Members]:
        for sample in samples:
            self.count += 1
            self.endings.add(frozenset(parts[1] for name in sample if (parts := split_name(name)) is not None))
            if self.side is None:
                self.side = _side(sample)
            yield sample

    def fields(self) -> dict[str, str]:
        """{field: endings} that read what every sample has, as data.init_args.fields; other tools may read the rest."""
        present = frozenset().union(*self.endings)
        images = "|".join(ending for ending in IMAGES if ending in present)
        has = [{"image" if ending in IMAGES else ending for ending in endings} for endings in self.endings]
        common = set.intersection(*has) if has else set()
        fields = {name: {"image": images}.get(name, name) for name in ("image", *DECODERS) if name in common}
        names = {"cls": "label", MASK: "semantic"}
        return {names.get(name, name): endings for name, endings in fields.items()}

    def are_recordings(self) -> bool:
        """Whether each sample has sound and no picture, as `RecordingShards` read them."""
        return bool(self.endings) and all(
            {*ending} & {*SOUNDS} and not {*ending} & {*IMAGES} for ending in self.endings
        )

    def are_pairs(self) -> bool:
        """Whether each sample has two pictures, such as KEY.1.jpg and KEY.2.jpg, as `PairedShards` reads them."""
        pictures = [sum(ending.rpartition(".")[2] in IMAGES for ending in endings) for endings in self.endings]
        return {*pictures} == {2} and "image" not in self.fields()


def _side(sample: Members) -> int | None:
    for name, source in sample.items():
        if name.rpartition(".")[2].lower() in IMAGES:
            with contextlib.suppress(*UNDECODABLE, OSError):
                return min(*open_image(source if isinstance(source, bytes) else content_of(source)).size)
    return None
