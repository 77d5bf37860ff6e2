"""Where a zoo is: a folder, or a place in an object store. Of both, the index and the weights of a name are read."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from lightspan.cli.zoo.index import INDEX, ZooNetwork, read_index
from lightspan.core.errors import UserError, one_line
from lightspan.core.files.atomic import opened
from lightspan.core.files.attempts import retried
from lightspan.core.files.foreign import SETTINGS_BYTES
from lightspan.core.files.runs import MODEL
from lightspan.core.files.stores import SCHEME, STORES, ObjectStream, in_store, require_object

BLOCK_BYTES = 2**20


def zoo_at(place: str) -> dict[str, ZooNetwork]:
    """The networks of a folder or of a place in a store, by name.

    Raises: UserError for a place that is not there, or has no index, and as `lightspan.cli.zoo.index.read_index`.
    """
    where = _join(place, INDEX)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, INDEX)
        retried(lambda: _copy(where, place, copy, SETTINGS_BYTES.most))
        return read_index(copy, where)


def fetch_weights(place: str, network: ZooNetwork, target: Path) -> None:
    """Copies the weights of a network to a new file, and compares them with the index before anybody reads them.

    Raises: UserError for weights that are not there, are a link, or have another size or SHA-256; what there is of the
        target is then of no use.
    """
    where = _join(place, network.name, MODEL)
    found = retried(lambda: _copy(where, place, target, network.bytes, exactly=True))
    if found != network.sha256:
        raise UserError(
            f"{where} has sha256 {found}, but the index says {network.sha256}: it was damaged or exchanged, and "
            "nothing was read; fetch or train it again"
        )


def _copy(where: str, place: str, target: Path, most: int, exactly: bool = False) -> str:
    """Copies a file, and returns the SHA-256 of what was copied."""
    digest, found = hashlib.sha256(), 0
    with _opened(where, place) as (stream, size):
        if size > most or (exactly and size != most):
            raise UserError(f"{where} has {size:,} bytes{_instead(most, exactly)}")
        with target.open("wb") as file:
            while block := _block(stream, where):
                found += len(block)
                if found > most:
                    raise UserError(f"{where} has more than {most:,} bytes{_instead(most, exactly)}")
                digest.update(block)
                file.write(block)
    if exactly and found != most:
        raise UserError(f"{where} ended after {found:,} bytes{_instead(most, exactly)}")
    return digest.hexdigest()


def _instead(most: int, exactly: bool) -> str:
    if exactly:
        return f", but the index says {most:,}; fetch or train it again"
    return f", and the limit is {most:,}; if you trust it, raise the limit with {SETTINGS_BYTES.setting}"


@contextmanager
def _opened(where: str, place: str) -> Iterator[tuple[BinaryIO, int]]:
    """A stream of the bytes of a file or an object, and how many they are."""
    if in_store(place):
        try:
            stream = ObjectStream(where)
        except OSError as error:
            raise UserError(f"{where} cannot be read: {one_line(error)}") from error
        yield cast(BinaryIO, stream), stream.length
        return
    path = Path(where)
    # The place itself is the user's word; in it, a link would make a file of theirs a part of the zoo.
    if path.is_symlink() or (path.parent != Path(place) and path.parent.is_symlink()):
        raise UserError(f"{path} is behind a link, and a zoo holds files alone; copy what it leads to")
    with opened(path, links=False) as file:
        if file is None:
            raise UserError(f"there is no {path}, or it is no file that can be read; {_way_out(path)}")
        yield file, os.fstat(file.fileno()).st_size


def _way_out(path: Path) -> str:
    if path.name == INDEX:
        return f"--from takes a folder with an {INDEX}, such as build/zoo-weights, which `make zoo-weights` writes"
    return (
        f"in a checkout of lightspan, `make zoo-weights ARGS={path.parent.name}` trains it, and "
        "`--from build/zoo-weights` then has it"
    )


def _block(stream: BinaryIO, where: str) -> bytes:
    try:
        return stream.read(BLOCK_BYTES)
    except OSError as error:
        raise UserError(f"{where} cannot be read: {one_line(error)}") from error


def _join(place: str, *names: str) -> str:
    """The name of a file below a place. Raises: UserError for what is neither a folder nor an address in a store."""
    scheme = SCHEME.match(place)
    if in_store(place):
        address = "/".join((place.rstrip("/"), *names))
        require_object(address, "--from")
        return address
    if scheme and not Path(place).exists():
        raise UserError(
            f"--from {place!r:.80} is neither a folder nor an address in a store ({', '.join(STORES)}); {scheme[1]}: "
            "is not read"
        )
    return str(Path(place, *names))
