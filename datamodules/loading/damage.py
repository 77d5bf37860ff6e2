"""What is said of a user's files that cannot be read, before anything trains."""

from collections.abc import Sequence
from pathlib import Path

from lightspan.core.errors import UserError, one_line
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.loading.workers import Damaged

MOST_NAMED = 1000


def report_damage(damage: Sequence[tuple[Path, str]], total: int, what: str, skips: bool) -> None:
    """Says which files are left out.

    Args:
        damage: the damaged files, and what is wrong with each.
        total: how many files there are, sound ones included.
        what: they are called, such as "pictures".
        skips: whether the user allows to train without them.
    Raises: UserError for damaged files that may not be skipped, or if there are no others.
    """
    if not damage:
        return
    lines = [f"  {one_line(file)}: {one_line(why)}" for file, why in damage[:MOST_NAMED]]
    lines += [f"  and {len(damage) - MOST_NAMED:,} more"] if len(damage) > MOST_NAMED else []
    listed = "\n".join(lines)
    if len(damage) == total:
        raise UserError(f"none of the {total:,} {what} can be read:\n{listed}\nName another folder")
    counted = f"{len(damage):,} of {total:,} {what} cannot be read"
    if not skips:
        raise UserError(
            f"{counted}:\n{listed}\nRepair or remove them, or train without them with data.init_args.skip_damaged=true"
        )
    say(f"{counted} and are left out:\n{listed}")


def unreadable(file: Path, why: Exception, skips: bool) -> Damaged | UserError:
    """What to raise where a sample of a file cannot be read after training has begun: a loader passes over `Damaged`.

    Args:
        skips: whether the user allows to train without it.
    """
    message = f"{one_line(str(file))}: {one_line(str(why))}"
    if skips:
        return Damaged(message)
    return UserError(f"{message}; repair or remove it, or train without it with data.init_args.skip_damaged=true")
