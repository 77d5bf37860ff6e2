"""Small tar shards for tests."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lightspan.datamodules.shards.index import SUFFIX, scan


def write_shard(path: Path, numbers: Iterable[int], width: int = 6, index: bool = True) -> str:
    """One sample for each number, labelled with it: a picture of `width` x 4 pixels whose red is the number."""
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            picture = io.BytesIO()
            Image.new("RGB", (width, 4), (number, 0, 255)).save(picture, "PNG")
            for ending, content in (("png", picture.getvalue()), ("cls", str(number).encode())):
                member = tarfile.TarInfo(f"{number:04}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    if index:
        Path(f"{path}{SUFFIX}").write_text(scan(path, str(path), 2**20)[0].to_json())
    return str(path)


def write_shards(folder: Path, sizes: Iterable[int]) -> list[str]:
    """Shards of these sizes whose samples are labelled 0, 1, ... through all of them."""
    shards, first = [], 0
    for number, size in enumerate(sizes):
        shards.append(write_shard(folder / f"part-{number}.tar", range(first, first + size)))
        first += size
    return shards


def pair_shard(path: Path, ending: str) -> str:
    """Four pictures, each with a text, "picture number N", or a class, N, by the ending of their member."""
    with tarfile.open(path, "w") as archive:
        for number in range(4):
            picture = io.BytesIO()
            Image.new("RGB", (6, 4), (number, 0, 255)).save(picture, "PNG")
            said = {"txt": f"picture number {number}", "cls": str(number)}[ending]
            for name, content in (("png", picture.getvalue()), (ending, said.encode())):
                member = tarfile.TarInfo(f"{number:04}.{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return str(path)


def sound_shard(path: Path, samples: list[dict[str, bytes]]) -> str:
    """Samples of these members, {ending: content}."""
    with tarfile.open(path, "w") as archive:
        for number, members in enumerate(samples):
            for ending, content in members.items():
                member = tarfile.TarInfo(f"{number:04}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return str(path)


def lit_clip(
    number: int, shape: tuple[int, int, int, int], pixels: tuple[int, int], embedding: int
) -> dict[str, np.ndarray]:
    """The arrays of one sample of `LitClipShards`, by name: floats, and bytes of pictures and masks."""
    draws, (C, T, *sides) = np.random.default_rng(number), shape
    return {
        "clip": draws.normal(size=(T, C, *sides)).astype(np.float16),
        "reference": draws.normal(size=(C, *sides)).astype(np.float16),
        "face": draws.integers(2, size=(T, *sides)).astype(np.uint8) * 255,
        "reference_face": draws.integers(2, size=sides).astype(np.uint8) * 255,
        "portrait": draws.integers(256, size=(3, *pixels)).astype(np.uint8),
        "shading": draws.integers(256, size=(T, 3, *pixels)).astype(np.uint8),
        "embedding": draws.normal(size=embedding).astype(np.float32),
    }


def npy_members(arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
    """Name -> array as ending -> content."""
    members = {}
    for name, array in arrays.items():
        content = io.BytesIO()
        np.save(content, array)
        members[f"{name}.npy"] = content.getvalue()
    return members


def lit_clip_shard(path: Path, count: int, **sizes: Any) -> str:
    """Samples of `LitClipShards` of these sizes."""
    return sound_shard(path, [npy_members(lit_clip(number, **sizes)) for number in range(count)])


def partial_shard(path: Path, said: list[dict[str, str]]) -> str:
    """A picture for each of these, with the members {ending: content} beside it."""
    with tarfile.open(path, "w") as archive:
        for number, members in enumerate(said):
            picture = io.BytesIO()
            Image.new("RGB", (6, 6), (number, 0, 255)).save(picture, "PNG")
            for ending, content in {"png": picture.getvalue(), **{k: v.encode() for k, v in members.items()}}.items():
                member = tarfile.TarInfo(f"{number:04}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return str(path)


def posed_shard(path: Path, objects: int = 4, renders: int = 3) -> str:
    """Objects whose render r of object n has red 10 n + r and the parameters (n, r), and whose class is n."""
    with tarfile.open(path, "w") as archive:
        for number in range(objects):
            table = io.BytesIO()
            np.save(table, np.array([[number, render] for render in range(renders)], np.float32))
            parts = {"npy": table.getvalue(), "cls": str(number).encode()}
            for render in range(renders):
                picture = io.BytesIO()
                Image.new("RGB", (6, 6), (10 * number + render, 0, 255)).save(picture, "PNG")
                parts[f"{render:03}.png"] = picture.getvalue()
            for ending, content in parts.items():
                member = tarfile.TarInfo(f"{number:04}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return str(path)


def damage(shard: str, at: int) -> None:
    """Turns one byte of a shard into another."""
    content = bytearray(Path(shard).read_bytes())
    content[at] ^= 0xFF
    Path(shard).write_bytes(content)


def masked_shard(path: Path, numbers: Iterable[int], sides: tuple[int, int] = (12, 16), masks: bool = True) -> str:
    """A picture for each number, whose green is that, and whose red is 10 for each class of `mask_of`; KEY.mask.png."""
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            mask = mask_of(number, sides)
            image = np.stack([10 * mask, np.full_like(mask, number), np.zeros_like(mask)], axis=-1)
            image[mask == 255] = 0, number, 255
            add_members(archive, f"{number:04}", {"png": png_of(image)} | ({"mask.png": png_of(mask)} if masks else {}))
    return str(path)


def mask_of(number: int, sides: tuple[int, int] = (12, 16)) -> np.ndarray:
    """Classes 0 to 4 of the pixels of a picture, and 255 for some."""
    classes = np.random.default_rng(number).integers(0, 6, sides).astype(np.uint8)
    return np.where(classes == 5, 255, classes).astype(np.uint8)


def png_of(image: np.ndarray) -> bytes:
    picture = io.BytesIO()
    Image.fromarray(image).save(picture, "PNG")
    return picture.getvalue()


def add_members(archive: tarfile.TarFile, key: str, members: dict[str, bytes]) -> None:
    for ending, content in members.items():
        member = tarfile.TarInfo(f"{key}.{ending}")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))


def array_shard(path: Path, arrays: list[np.ndarray], **others: list[bytes]) -> str:
    """KEY.npy for each array; `others` are further members, ending -> content for each sample."""
    with tarfile.open(path, "w") as archive:
        for number, array in enumerate(arrays):
            content = io.BytesIO()
            np.save(content, array)
            members = {"npy": content.getvalue(), **{ending: contents[number] for ending, contents in others.items()}}
            for ending, data in members.items():
                member = tarfile.TarInfo(f"{number:04}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return str(path)
