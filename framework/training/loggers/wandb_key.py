"""Where a key for Weights & Biases is kept, by wandb's own rules. The key itself is not kept anywhere."""

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit


def wandb_key_place(environment: Mapping[str, str] = os.environ, home: Path | None = None) -> str | None:
    """ "WANDB_API_KEY", or the netrc file that `wandb login` wrote the key into, or None."""
    if environment.get("WANDB_API_KEY"):
        return "WANDB_API_KEY"
    host = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    path = Path(environment.get("NETRC") or (home or Path.home()) / ".netrc")
    try:
        return str(path) if netrc.netrc(path).authenticators(host) else None
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return None  # no such file, or one that wandb could not read either
