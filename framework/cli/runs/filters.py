"""Which runs of a catalogue are meant: by status, recipe, setting, tag or age."""

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from lightspan.cli.runs.catalogue import Entry
from lightspan.cli.runs.status import Status
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import read_small
from lightspan.core.files.runs import RESOLVED

_UNITS = {"m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_AGO = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)([mhdw])")


@dataclass(frozen=True)
class RunFilter:
    """What a run must have: one of the statuses, a recipe that matches one of the patterns, all of the
    settings, all of the tags, and a start after `since`. An empty one takes all.
    """

    statuses: Sequence[Status] = ()
    recipes: Sequence[str] = ()
    settings: Sequence[tuple[str, str]] = ()
    tags: Sequence[str] = ()
    since: datetime | None = None

    def has(self, entry: Entry) -> bool:
        """Whether a run meets all of it; reads its resolved.yaml only for a setting that no flag named."""
        return (
            (not self.statuses or entry.status in self.statuses)
            and (not self.recipes or any(fnmatch.fnmatchcase(entry.recipe, pattern) for pattern in self.recipes))
            and set(self.tags) <= set(entry.tags)
            and (self.since is None or (entry.started is not None and entry.started >= self.since))
            and all(_equal(setting_of(entry, key), value) for key, value in self.settings)
        )


def parse_setting(text: str) -> tuple[str, str]:
    """`key.path=value` -> its two sides. Raises: UserError for anything else."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise UserError(f"--where {text!r} is not of the form key.path=value")
    return key, value


def parse_since(text: str, now: datetime | None = None) -> datetime:
    """`30m`, `12h`, `7d`, `2w` before now, or a date (with time) in ISO 8601, local if it names no zone.

    Raises: UserError for anything else.
    """
    try:
        if ago := _AGO.fullmatch(text):
            return (now or datetime.now(UTC)) - timedelta(seconds=float(ago[1]) * _UNITS[ago[2]])
        when = datetime.fromisoformat(text)
        return when if when.tzinfo else when.astimezone()
    except (ValueError, OverflowError) as error:
        raise UserError(f"--since {text!r} is no time; write 30m, 12h, 7d, 2w, or a date such as 2026-01-31") from error


def setting_of(entry: Entry, key: str) -> str | None:
    """The text of a setting of a run: from its command line, else from its resolved.yaml; None if it has none."""
    from lightspan.cli.config.tree import plain, read

    if (flag := entry.flags.get(key)) is not None:
        return flag
    path = entry.folder / RESOLVED
    try:
        if key.rpartition(".")[2].encode() not in (read_small(path) or b""):  # saves the parsing
            return None
        value = plain(read(path))
        for part in key.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
    except (OSError, ValueError, LookupError, TypeError):  # a UserError is a ValueError
        return None
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _equal(found: str | None, wanted: str) -> bool:
    if found is None:
        return False
    try:
        return float(found) == float(wanted)
    except ValueError:
        return found == wanted
