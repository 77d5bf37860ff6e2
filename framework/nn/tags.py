"""The tags that a batch gives its samples, of which any number may hold, as methods read them.

Shapes: B samples, G tags.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightspan.errors import UserError


class Tags(NamedTuple):
    """Which tags hold and which are known, both bool [B G]."""

    hold_BG: Tensor
    known_BG: Tensor


def tags_of(batch: Mapping[str, Any], method: str, count: int) -> Tags:
    """`tags` of a batch, numbers that are 0 or not, and `tags_known`; without the second all are known.

    Args:
        method: its name, for messages.
        count: G, of the method's head.
    Raises: UserError for a batch without tags, or with another number of them.
    """
    if "tags" not in batch:
        raise UserError(
            f"{method} needs the tags of each sample, and this batch has none (it holds {', '.join(sorted(batch))}); "
            "take data that have them, such as lightspan.datamodules.shards.tagged.TaggedShards"
        )
    tags, known = batch["tags"], batch.get("tags_known")
    known = torch.ones_like(tags) if known is None else known
    for name, given in (("tags", tags), ("tags_known", known)):
        if given.ndim != 2 or given.shape[1] != count:
            raise UserError(
                f"{method} has a head of {count} tags, and {name} of this batch are {list(given.shape)}; set "
                "tagger.out_features to as many as the data have"
            )
    return Tags(tags.bool(), known.bool())
