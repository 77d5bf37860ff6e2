"""What a class does at the place that a setting names, said by the type of the setting.

A recipe may come from a stranger. It may name any place to read, but a run writes only into its own folder and, what is
kept from run to run, into the user's cache; `lightspan.cli.config.places` reads these types from the sources and
refuses a recipe that names other places. Every setting for a path has one of them, also where nothing is written.
"""

from enum import Enum
from typing import Annotated


class PathUse(Enum):
    """What happens at the place; of a setting that is no text: `Annotated[Path, PathUse.READ]`."""

    READ = "read"
    RUN = "written, in the run folder"
    CACHE = "written and deleted, in the run folder or the user's cache"
    NAME = "a relative path below a folder that is written"
    PART = "a part of a file name"
    SERVER = "sent to a server"
    SETTINGS = "a file of further settings"


ReadPath = Annotated[str, PathUse.READ]
RunPath = Annotated[str, PathUse.RUN]
CachePath = Annotated[str, PathUse.CACHE]
PathName = Annotated[str, PathUse.NAME]
