"""Where packed shards lie side by side: a folder of this machine, or what is below an address of an object store."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Protocol, TypeVar

from lightspan.core.errors import UserError, one_line
from lightspan.core.files import stores
from lightspan.core.files.atomic import write_atomic
from lightspan.core.files.attempts import retried
from lightspan.core.files.places import PathUse
from lightspan.datamodules.shards.fetch import open_shard

T = TypeVar("T")


class Shelf(Protocol):
    """`shown` is what a file is called in messages."""

    def names(self) -> list[str]:
        """Of the files, and in a folder of whatever else is there."""

    def shown(self, name: str) -> str: ...

    def at_hand(self, name: str) -> Path:
        """Where a file is on this machine, at least until the next is asked for; it need not be there, or be a file."""

    def write(self, name: str, text: str) -> None: ...


class FolderShelf:
    def __init__(self, folder: Annotated[Path, PathUse.RUN]) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def shown(self, name: str) -> str:
        return str(self.folder / name)

    def at_hand(self, name: str) -> Path:
        return self.folder / name

    def write(self, name: str, text: str) -> None:
        write_atomic(self.folder / name, text)


class StoreShelf:
    """Files are copied to where they can be read, one at a time.

    Args:
        address: SCHEME://BUCKET or one below it.
        room: an empty folder for the copy.

    Raises: UserError, in each method, where the store or the network fails; `at_hand` not for an object that is absent.
    """

    def __init__(self, address: Annotated[str, PathUse.SERVER], room: Annotated[Path, PathUse.RUN]) -> None:
        self.address, self.room = address.rstrip("/"), room
        stores.require_object(self.shown("any"), "SOURCE")

    def names(self) -> list[str]:
        return self._told("listed", lambda: stores.names_in(self.address))

    def shown(self, name: str) -> str:
        return f"{self.address}/{name}"

    def at_hand(self, name: str) -> Path:
        copy = self.room / "copy"
        copy.unlink(missing_ok=True)

        def fetch() -> None:
            with open_shard(self.shown(name), "SOURCE") as stream, copy.open("wb") as file:
                try:
                    shutil.copyfileobj(stream, file, stores.BLOCK_BYTES)
                except OSError as error:
                    raise UserError(f"{self.shown(name)} cannot be copied to {self.room}: {one_line(error)}") from error

        try:
            retried(fetch)
        except UserError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
        return copy

    def write(self, name: str, text: str) -> None:
        self._told(f"written to ({name})", lambda: stores.write(self.shown(name), text.encode()))

    def _told(self, what: str, ask: Callable[[], T]) -> T:
        def asked() -> T:
            try:
                return ask()
            except OSError as error:
                raise UserError(f"{self.address} cannot be {what}: {one_line(error)}") from error

        return retried(asked)
