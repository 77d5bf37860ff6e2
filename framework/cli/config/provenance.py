"""Where a run comes from: versions, command line without secrets, commit, start time."""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightspan import __version__
from lightspan.cli.config.resolve import Resolved
from lightspan.cli.config.secrets import redacted

PACKAGES = (
    "torch",
    "lightning",
    "jsonargparse",
    "torchmetrics",
    "torchvision",
    "transformers",
    "timm",
    "webdataset",
    "safetensors",
    "triton",
    "numpy",
)


def provenance(resolved: Resolved, arguments: Sequence[str], overlays: Sequence[str]) -> dict[str, Any]:
    """The content of provenance.json.

    Args:
        resolved: the configuration of the run.
        arguments: the command line; secrets in it are hidden here.
        overlays: as given with -c.
    """
    return {
        "lightspan": __version__,
        "recipe": resolved.name,
        "overlays": list(overlays),
        "allow_modules": list(resolved.allow_modules),
        "argv": redacted(arguments),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(Path.cwd()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "notes": resolved.notes,
        "sources": resolved.sources,
    }


def commit(folder: Path) -> str | None:
    """The git commit of a folder, with `+changes` if files differ from it; None outside a repository.

    The folder may be a stranger's, and git runs hooks, monitors and filters that the settings of a repository name: the
    files are compared by a repository without settings, which borrows index and objects.
    """
    said = "rev-parse", "--path-format=absolute", "--git-path", "index", "--git-path", "objects", "--show-toplevel"
    try:
        index, objects, top, head = _git(folder, os.environ, *said, "HEAD").splitlines()
        with TemporaryDirectory() as empty:
            for name in ("objects", "refs"):
                Path(empty, name).mkdir()
            Path(empty, "HEAD").write_text(f"{head}\n")
            borrowed = {"GIT_DIR": empty, "GIT_WORK_TREE": top, "GIT_INDEX_FILE": index}
            borrowed |= {"GIT_OBJECT_DIRECTORY": objects, "GIT_OPTIONAL_LOCKS": "0"}
            files = "status", "--porcelain", "--untracked-files=no", "--ignore-submodules=dirty"
            changed = _git(folder, os.environ | borrowed, *files)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if changed else "")


def _git(folder: Path, variables: Mapping[str, str], *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=5, env=variables)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    loaded = getattr(sys.modules.get(package), "__version__", None)
    try:
        return str(loaded) if loaded else metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
