"""Whether two parts of a method fit together."""

from torch import nn

from lightspan.errors import UserError


def require_width(giver: nn.Module, name: str, taken: int | None) -> None:
    """Compares what a part gives, its `num_features` or `out_features`, with what the next one takes. Parts that do not
    say their width are taken on trust.

    Args:
        name: of the setting that says what is taken, such as "projector.in_features".
    Raises: UserError for another width.
    """
    given = getattr(giver, "num_features", getattr(giver, "out_features", None))
    if given is not None and taken is not None and given != taken:
        raise UserError(f"{name}={taken}, but {type(giver).__name__} gives {given} features; set it to {given}")


def require_projector(backbone: nn.Module, projector: nn.Module) -> None:
    """Raises: UserError, as `require_width`, for a projector that takes another width than the backbone gives."""
    require_width(backbone, "projector.in_features", getattr(projector, "in_features", None))
