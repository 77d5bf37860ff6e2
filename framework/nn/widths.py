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


def require_predictor(giver: nn.Module, predictor: nn.Module) -> None:
    """Raises: UserError, as `require_width`, for a predictor that takes or gives another width than the projector or
    backbone whose like it predicts.
    """
    for side in ("in_features", "out_features"):
        require_width(giver, f"predictor.{side}", getattr(predictor, side, None))


def given_width(projector: nn.Module) -> int:
    """The width of a projector's embeddings, as wide as the prototypes that score them.

    Raises: UserError if it does not say its width.
    """
    width: int | None = getattr(projector, "out_features", None)
    if width is None:
        raise UserError(
            f"{type(projector).__name__} has no out_features; use lightspan.nn.heads.projector.Projector or "
            "torch.nn.Linear"
        )
    return width
