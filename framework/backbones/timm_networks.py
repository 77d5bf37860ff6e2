"""Networks of timm by name: the one place that calls `timm.create_model` with a name that a recipe gives.

timm also takes addresses for names, `hf-hub:OWNER/MODEL` and `local-dir:FOLDER`, and follows both to settings that
others wrote. Here a name is the name of a network.
"""

import difflib
from collections.abc import Sequence
from typing import Any

import timm
from huggingface_hub.errors import LocalEntryNotFoundError

from lightspan.core.absent import MissingFile
from lightspan.core.errors import UserError, one_line


def timm_network(name: str, pretrained: bool = False, **settings: Any) -> Any:
    """A network of timm with its weights random, or those that timm knows under its name.

    Args:
        name: as in `timm.list_models()`, with or without the tag of its weights.
        settings: as `timm.create_model` takes them.
    Raises: UserError for a name that timm does not have; MissingFile where its weights are not in the cache and cannot
        be fetched; what timm raises for settings.
    """
    require_known(name, timm.list_pretrained() if "." in name else timm.list_models(), "timm")
    try:
        return timm.create_model(name, pretrained=pretrained, **settings)
    except LocalEntryNotFoundError as error:
        raise MissingFile(
            f"the weights of {name} are neither in the cache of Hugging Face nor can they be fetched: "
            f"{one_line(error)[:200]}"
        ) from error


def require_known(name: str, known: Sequence[str], library: str) -> None:
    """Raises: UserError, for a name that is not known, with those of `library` that are nearly the same."""
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"{library}'s list_models() lists all names"
    raise UserError(f"{library} has no network named {one_line(repr(name))[:200]}; {hint}")
