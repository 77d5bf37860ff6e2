"""Compares packed shards with what was written, and writes an index for shards that have none."""

from pathlib import Path

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import irregular, write_atomic
from lightspan.core.files.foreign import content_of, whole_text
from lightspan.datamodules.shards.index import SUFFIX, from_json, read_sample, scan, sha256_of
from lightspan.datamodules.shards.pack import SUMS_FILE

NO_LIMIT = 2**63  # of a member's size: these are the user's own shards


def listed(folder: Path) -> dict[str, str]:
    """{name of a file: its sha256} as written by `pack`. Raises: UserError if there is no such list."""
    path = folder / SUMS_FILE
    if reason := irregular(path):
        raise UserError(f"{path} {reason}; only folders that `data pack` wrote can be verified")
    try:
        lines = whole_text(path).splitlines()
    except ValueError as error:
        raise UserError(
            f"{path} cannot be read ({error}); only folders that `data pack` wrote can be verified"
        ) from error
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    wrong = [name for name in sums if not name or Path(name).name != name or "\0" in name]
    if wrong or not sums:
        raise UserError(f"{path} is not a list of sha256 sums of files beside it; pack the folder again")
    return sums


def unlisted(folder: Path, sums: dict[str, str]) -> list[str]:
    """Names of what is in `folder` but was not written by `pack`. Hidden files do not count."""
    names = (path.name for path in folder.iterdir())
    return sorted(name for name in names if not name.startswith(".") and name not in {SUMS_FILE, *sums})


def problem_of(path: Path, sha256: str) -> str | None:
    """What is wrong with a packed file, for a shard down to its first damaged samples; None if nothing is."""
    if reason := irregular(path):
        return f"{path} {reason}"
    try:
        if sha256_of(path) == sha256:
            return None
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    found = f"{path}: its sha256 is not the recorded one"
    index_path = Path(f"{path}{SUFFIX}")
    if path.suffix != ".tar" or not index_path.is_file():
        return found
    damaged = []
    try:
        index = from_json(content_of(index_path), str(path))
    except ValueError:
        return found
    for number in range(len(index)):
        try:
            read_sample(index, number, path, NO_LIMIT)
        except UserError:
            damaged.append(f"{number} (byte {index.starts[number]})")
    shown = ", ".join(damaged[:10]) + (", ..." if damaged[10:] else "")
    return f"{found}; {len(damaged)} of {len(index)} samples are damaged{': ' + shown if damaged else ''}"


def without_index(folder: Path) -> list[Path]:
    """The shards, NAME.tar, in `folder` that have no index. Raises: UserError if there is no shard."""
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise UserError(f"{folder} contains no .tar file; name the folder of the shards")
    return [shard for shard in shards if not Path(f"{shard}{SUFFIX}").exists()]


def write_index(shard: Path) -> tuple[int, tuple[str, ...]]:
    """Writes the index of `shard` beside it; returns (its samples, remarks). Raises: UserError if it is damaged."""
    index, damage = scan(shard, str(shard), NO_LIMIT)
    if damage is not None:
        raise UserError(f"{damage}; it gets no index")
    write_atomic(f"{shard}{SUFFIX}", index.to_json())
    return len(index), tuple(f"{shard}: {remark}" for remark in index.remarks)
