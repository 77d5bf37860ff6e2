"""SIE: one half of the features is to be the same in both views, the other to change as the views do.

Source: Garrido, Najman, LeCun, "Self-supervised learning of Split Invariant Equivariant representations", ICML 2023,
arXiv 2302.10283. Variance and covariance are VICReg's (arXiv 2105.04906), of both halves side by side, so that the
halves share nothing. What both views know of how they were made becomes the weights of the predictor, which therefore
cannot pass by it and fall back to invariance.
As in the authors' code: the variance term also holds the prediction, no gradient is stopped, and only the second view
is predicted from the first. Its covariance is divided by a batch size that was set, here by the rows there are. Its
probes, trained in the same backward pass, are the callback `OnlineProbes`. Unlike there, quaternions have a fixed sign
(`lightspan.nn.relations.SpaceTurn`). Assumed, not checked with the paper's text: the weight 0.45 of the
equivariance, from the authors' README, whose code has 4.5 as its default.
Shapes: B samples of this rank, C H W image, P parameters of a view, K numbers of a relation, I and E embedding widths.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_weights
from lightspan.nn.relations import Relation, parameters_of
from lightspan.nn.views import views_of
from lightspan.nn.widths import require_predictor, require_split, require_width
from lightspan.objectives.vicreg import invariance, variance, vicreg_terms
from lightspan.training.method import Method


class SIETerms(NamedTuple):
    """Scalars >= 0, the same on all ranks."""

    invariance: Tensor
    equivariance: Tensor
    variance: Tensor
    covariance: Tensor


def sie_terms(inv_2BI: Tensor, eq_2BE: Tensor | None = None, predicted_BE: Tensor | None = None) -> SIETerms:
    """The terms before their weights: VICReg's on the invariant half, and those of what is predicted.

    `variance` is V(z1) + V(z2) + V(prediction) and `covariance` C(z1) + C(z2), where z is both halves side by side and
    V half the mean of max(0, 1 - std). Without an equivariant half they are the three terms of VICReg.

    Args:
        inv_2BI, eq_2BE: embeddings of the halves in both views.
        predicted_BE: of the equivariant half in the second view.
    """
    if eq_2BE is None or predicted_BE is None:
        terms = vicreg_terms(*inv_2BI)
        return SIETerms(terms.invariance, terms.invariance.new_zeros(()), terms.variance, terms.covariance)
    both = vicreg_terms(*torch.cat([inv_2BI, eq_2BE], dim=2))
    spread = both.variance + variance(predicted_BE) / 2
    return SIETerms(invariance(*inv_2BI), invariance(predicted_BE, eq_2BE[1]), spread, both.covariance)


class SIE(Method):
    """After training, keep `backbone`. Its last features are equivariant: `equivariant` and `predictor` tell how they
    change.

    Args:
        backbone: [B C H W] -> [B num_features]; its first features are the invariant half, the others the equivariant.
        invariant: [B in_features] -> [B I], the expander of as many first features as it takes.
        equivariant: [B in_features] -> [B E], that of the others. Without it and the next two there are no others, and
            the loss is VICReg's.
        predictor: (embedding [B E], relation [B K]) -> [B E]; `lightspan.nn.heads.hyper_linear.HyperLinear` in the
            paper.
        relation: what of the views' parameters the predictor gets.
        invariance_weight, variance_weight, covariance_weight: s, sd and c, >= 0.
        equivariance_factor: of the equivariance, times s; >= 0.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    keeps_apart = "variance_weight is as large as invariance_weight, and covariance_weight above 0"

    def __init__(
        self,
        backbone: nn.Module,
        invariant: nn.Module,
        equivariant: nn.Module | None = None,
        predictor: nn.Module | None = None,
        relation: Relation | None = None,
        invariance_weight: float = 10.0,
        variance_weight: float = 10.0,
        covariance_weight: float = 1.0,
        equivariance_factor: float = 0.45,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_weights(invariance_weight=invariance_weight, variance_weight=variance_weight)
        require_weights(covariance_weight=covariance_weight, equivariance_factor=equivariance_factor)
        equivariance_weight = equivariance_factor * invariance_weight
        self.weights = invariance_weight, equivariance_weight, variance_weight, covariance_weight
        if (equivariant is None) != (predictor is None) or (equivariant is None) != (relation is None):
            raise UserError("SIE takes equivariant, predictor and relation together, or none of them; one is missing")
        self.invariant_features = require_split(backbone, invariant=invariant, equivariant=equivariant)[0]
        self.backbone, self.invariant, self.equivariant = backbone, invariant, equivariant
        self.predictor, self.relation = predictor, relation
        if equivariant is not None and predictor is not None and relation is not None:
            require_predictor(equivariant, predictor)
            require_width(relation, "predictor.condition_features", getattr(predictor, "condition_features", None))

    def embeddings(self, batch: Any) -> Tensor:
        """Of both halves, side by side."""
        return torch.cat(self._embedded(self.features(batch)), dim=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        of_views = [self._embedded(self.backbone(view)) for view in views_of(batch, "SIE", 2)]
        inv_2BI, *others = (torch.stack(half) for half in zip(*of_views, strict=True))
        if self.predictor is None or self.relation is None:
            terms = sie_terms(inv_2BI)
        else:
            (eq_2BE,) = others
            terms = sie_terms(inv_2BI, eq_2BE, self.predictor(eq_2BE[0], self.relation(parameters_of(batch, "SIE"))))
        s, eq, sd, c = self.weights
        loss = s * terms.invariance + eq * terms.equivariance + sd * terms.variance + c * terms.covariance
        self.log_training({"train/loss": loss} | {f"train/{name}": term for name, term in terms._asdict().items()})
        return loss

    def _embedded(self, features_BF: Tensor) -> list[Tensor]:
        """Of the halves that there are."""
        inv_BF, eq_BF = features_BF[:, : self.invariant_features], features_BF[:, self.invariant_features :]
        return [self.invariant(inv_BF)] + ([] if self.equivariant is None else [self.equivariant(eq_BF)])
