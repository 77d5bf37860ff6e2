"""The largest scores: index sets of an exact size, of one tensor or of all together.

Ties go to the entry that comes first, so the same scores give the same set on every device. A score that is NaN counts
as the lowest there is. Scores are compared as they are, infinite ones too.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightspan.core.devices import wide
from lightspan.core.errors import UserError


def top_k(scores_S: Tensor, count: int) -> Tensor:
    """Mask [S], bool, of the `count` largest scores: exactly as many are true.

    Args:
        count: in [0, number of scores].
    """
    flat = _comparable(scores_S).reshape(-1)
    assert 0 <= count <= flat.numel(), f"{count} of {flat.numel()} scores"
    if count in (0, flat.numel()):
        return torch.full(scores_S.shape, bool(count), device=scores_S.device)
    lowest = flat.kthvalue(flat.numel() - count + 1).values
    chosen, level = flat > lowest, flat == lowest
    # Of those at the level of the last one as many as are still missing, the first ones first; nothing synchronises.
    chosen |= level & (level.cumsum(0) <= count - chosen.sum())
    return chosen.view(scores_S.shape)


def top_k_of_all(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Masks of the `count` largest scores of all tensors together, compared in one dtype; ties go to the first tensor
    first. A tensor may lose every entry.
    """
    if not scores:
        return {}
    chosen = top_k(torch.cat([_comparable(one).reshape(-1) for one in scores.values()]), count)
    parts = chosen.split([one.numel() for one in scores.values()])
    return {name: part.view(one.shape) for (name, one), part in zip(scores.items(), parts, strict=True)}


def count_at(density: float, numbers: int) -> int:
    """How many of `numbers` entries a density leaves: rounded to the nearest, half up, and at least one of any.

    Raises: UserError for a density outside (0, 1].
    """
    require_density(density)
    return max(1, int(density * numbers + 0.5)) if numbers else 0


def require_density(density: float, what: str = "density") -> None:
    """Raises: UserError for a density outside (0, 1]."""
    if not 0 < density <= 1:
        raise UserError(f"{what}={density} must be above 0 and at most 1: the share of entries that a mask leaves open")


def _comparable(scores: Tensor) -> Tensor:
    return wide(scores.detach()).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
