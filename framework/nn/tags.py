"""The tags that a batch gives its samples, of which any number may hold, as methods read them.

Shapes: B samples, G tags.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightspan.core.batches import require_fields, require_rows
from lightspan.core.errors import UserError


class Tags(NamedTuple):
    """Which tags hold and which are known, both bool [B G]."""

    hold_BG: Tensor
    known_BG: Tensor


def tags_of(batch: Mapping[str, Any], method: str, count: int | None = None) -> Tags:
    """`tags` of a batch, numbers that are 0 or not, and `tags_known`; without the second all are known.

    Args:
        method: its name, for messages.
        count: G, of the method's head; None, of a method without one, takes any number.
    Raises: UserError for a batch without tags, or with another number of them or of rows.
    """
    require_fields(batch, method)
    if "tags" not in batch:
        raise UserError(
            f"{method} needs the tags of each sample, and this batch has none (it holds {', '.join(sorted(batch))}); "
            "take data that have them, such as lightspan.datamodules.shards.tagged.TaggedShards"
        )
    tags, known = batch["tags"], batch.get("tags_known")
    for name, given in (("tags", tags), ("tags_known", tags if known is None else known)):
        found = list(given.shape) if isinstance(given, Tensor) else f"a {type(given).__name__}"
        if not isinstance(given, Tensor) or given.ndim != 2:
            raise UserError(f"{method} reads {name} as whole numbers [B, G], and those of this batch are {found}")
        if count is not None and given.shape[1] != count:
            raise UserError(
                f"{method} has a head of {count} tags, and {name} of this batch are {found}; set "
                "tagger.out_features to as many as the data have"
            )
        require_rows(batch, name if name in batch else "tags", method)
    known = torch.ones_like(tags) if known is None else known
    return Tags(tags.bool(), known.bool())
