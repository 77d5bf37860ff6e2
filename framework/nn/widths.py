"""Whether two parts of a method fit together, and parts that are made to fit."""

from abc import ABC, abstractmethod

from torch import nn

from lightspan.core.errors import UserError


def require_width(giver: nn.Module, name: str, taken: int | None) -> None:
    """Compares what a part gives, see `given_features`, with what the next one takes. Parts that do not say their width
    are taken on trust.

    Args:
        name: of the setting that says what is taken, such as "projector.in_features".
    Raises: UserError for another width.
    """
    given = given_features(giver)
    if given is not None and taken is not None and given != taken:
        raise UserError(f"{name}={taken}, but {type(giver).__name__} gives {given} features; set it to {given}")


def given_features(giver: nn.Module) -> int | None:
    """How many features a part gives: what it says in `head_hidden_size` (timm's networks without classifier, some of
    which widen what they pooled), `num_features` or `out_features`; None if it does not say.

    Raises: UserError for a network of timm that still has its classifier, behind which are no features.
    """
    classifier = getattr(giver, "get_classifier", lambda: None)()
    if isinstance(classifier, nn.Linear):
        raise UserError(
            f"{type(giver).__name__} still has its classifier of {classifier.out_features} classes, and features are "
            "what comes before it; make it with num_classes=0, or call reset_classifier(0)"
        )
    names = ("head_hidden_size", "num_features", "out_features")
    return next((getattr(giver, name) for name in names if getattr(giver, name, None) is not None), None)


def require_projector(backbone: nn.Module, projector: nn.Module) -> None:
    """Raises: UserError, as `require_width`, for a projector that takes another width than the backbone gives."""
    require_width(backbone, "projector.in_features", getattr(projector, "in_features", None))


def require_split(backbone: nn.Module, **heads: nn.Module | None) -> list[int]:
    """How many features each head takes, of heads that divide a backbone's features among them in their order; a head
    that is None takes none.

    Raises: UserError for a head that does not say what it takes, or heads that take more or fewer than there are.
    """
    taken: list[int] = []
    for name, head in heads.items():
        width = 0 if head is None else getattr(head, "in_features", None)
        if width is None:
            raise UserError(
                f"{name}: {type(head).__name__} has no in_features; use lightspan.nn.heads.projector.Projector or "
                "torch.nn.Linear"
            )
        taken.append(width)
    given = given_features(backbone)
    if given is not None and given != sum(taken):
        shares = " and ".join(f"{name}.in_features={width}" for name, width in zip(heads, taken, strict=True))
        raise UserError(f"{shares} take {sum(taken)} features, but {type(backbone).__name__} gives {given}")
    return taken


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


class LazyHead(nn.Module, ABC):
    """A part whose number of outputs may be left to the method that takes it, which knows what the others need.

    Made with `out_features=None` it has no last layer before `build`; a method calls that in its constructor, so that
    the optimiser gets all weights. A subclass that was given a number calls it at the end of its own constructor.

    Attributes:
        out_features: how many outputs there are; None before `build`.
    """

    out_features: int | None = None

    @abstractmethod
    def make_outputs(self, count: int) -> None:
        """Makes the last layer, and starts the weights that depend on it."""

    def build(self, count: int) -> None:
        """Makes `count` outputs, unless the part has its own number. Raises: UserError for less than 1."""
        if self.out_features is not None:
            return
        if count < 1:
            raise UserError(f"{type(self).__name__}: out_features={count} must be at least 1")
        self.make_outputs(count)
        self.out_features = count

    def require_outputs(self) -> None:
        """Raises: UserError before `build`."""
        if self.out_features is None:
            raise UserError(
                f"{type(self).__name__} has no outputs: it was made without out_features, and this method does not "
                "tell it how many it needs; set out_features"
            )


def build_outputs(part: nn.Module, count: int) -> None:
    """Makes `count` outputs if the part is open, see `LazyHead`; any other stays as it is."""
    if isinstance(part, LazyHead):
        part.build(count)
