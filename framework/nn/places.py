"""Where pictures were taken, as batches tell it, and which of them show one place. Shapes: B, N pictures."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightspan.core.batches import described, require_fields
from lightspan.core.devices import wide
from lightspan.core.errors import UserError


def places_of(batch: Mapping[str, Any], field: str, shape: tuple[int, ...], method: str) -> Tensor:
    """`place` [B 2] or `places` [B V 2] of a batch, as floating-point numbers.

    Args:
        shape: what it has to be.
        method: its name, for messages.
    Raises: UserError for a batch without them, or with others.
    """
    require_fields(batch, method)
    given = batch.get(field)
    if not isinstance(given, Tensor) or not given.is_floating_point() or given.shape != shape:
        found = "has none" if given is None else f"gives {described(given)}"
        raise UserError(
            f"{method} needs where each picture was taken as {field}, floating-point {[*shape]}, and this batch "
            f"{found}; take data of places, such as lightspan.datamodules.image.places.PlaceFolder"
        )
    return given


def apart(place_B2: Tensor, region_B: Tensor, place_N2: Tensor, region_N: Tensor) -> Tensor:
    """Distances [B N] in the unit of the places, infinite between two regions."""
    # Not by a product of matrices, whose rounding is metres in coordinates of kilometres.
    distance_BN = torch.linalg.vector_norm(wide(place_B2)[:, None] - wide(place_N2), dim=2)
    return distance_BN.masked_fill(region_B[:, None] != region_N, torch.inf)
