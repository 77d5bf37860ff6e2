"""Networks of timm by name: the one place that calls `timm.create_model` with a name that a recipe gives.

timm also takes addresses for names, `hf-hub:OWNER/MODEL` and `local-dir:FOLDER`, and follows both to settings that
others wrote. Here a name is the name of a network.
"""

import difflib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import timm
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn

from lightspan.core.absent import MissingFile
from lightspan.core.errors import UserError, one_line
from lightspan.core.files.foreign import bounded_program


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


def under_timm_names(tensors: Mapping[str, Tensor], network: nn.Module, path: str) -> dict[str, Tensor]:
    """The tensors of a file as the network's module of timm renames them, positions resampled to the network's size.

    Raises: UserError for tensors that it cannot rename, or resamples with more than the limits of memory and time: from
        a kernel of patches, with the square of its places.
    """
    rename = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    try:
        with bounded_program():
            return dict(tensors) if rename is None else rename(dict(tensors), network)
    except Exception as error:  # whatever timm and torch raise
        raise UserError(
            f"timm cannot take the tensors of {path} for a {type(network).__name__}: {one_line(error)[:400]}"
        ) from error


def require_known(name: str, known: Sequence[str], library: str) -> None:
    """Raises: UserError, for a name that is not known, with those of `library` that are nearly the same."""
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"{library}'s list_models() lists all names"
    raise UserError(f"{library} has no network named {one_line(repr(name))[:200]}; {hint}")
