"""Each linear layer becomes two thinner ones, cut from its singular value decomposition (PELA).

Source: Guo, Wang, Kankanhalli, "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation", CVPR 2024,
arXiv 2310.10700, section 3.1. W ~ (U_r S_r^1/2) (S_r^1/2 V_r^T); both factors get the square root of the spectrum, so
that both train at the same scale. What trains them afterwards is in `lightspan.methods.compression.pela`.
Shapes: B rows, O outputs, I inputs, R rank.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightspan.adapters.layers import is_open
from lightspan.core.distributed import rank as process_rank
from lightspan.core.errors import UserError, printable
from lightspan.core.patterns import matches, require_matches, require_patterns
from lightspan.core.ranges import require_in
from lightspan.subspaces.svd import thin_svd

# A recipe may name the functions listed here.
__all__ = ["FactorisedLinear", "factorise"]

EXCLUDED = ("*norm*", "*head*", "*patch_embed*", "*downsample*")
"""Patterns of layers that stay whole, as in the authors' code."""
FEWEST_OUTPUTS = 10  # as in the authors' code: a layer this thin has nothing to save


def rank_within(outputs: int, inputs: int, ratio: float) -> int:
    """Largest r with r (O + I) <= O I / ratio: two factors of this rank have at most 1/ratio of the layer's weights."""
    return math.floor(outputs * inputs / (ratio * (outputs + inputs)))


def balanced_factors(weight_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U_r S_r^1/2 [O R] and S_r^1/2 V_r^T [R I], whose product is the nearest matrix of this rank, in its dtype.

    A direction with singular value zero (a matrix of zeros has no other) is only in the second factor, at the
    scale of the largest one: zero in both, it would never get a gradient.

    Raises: UserError for a rank outside [1, min(O, I)], or a weight that is not finite.
    """
    if not 1 <= rank <= min(weight_OI.shape):
        raise UserError(f"rank={rank} is outside [1, {min(weight_OI.shape)}], the shorter side of {[*weight_OI.shape]}")
    if not weight_OI.isfinite().all():
        raise UserError(f"a weight of shape {[*weight_OI.shape]} has NaN or infinite values, so it has no SVD")
    u_OK, s_K, v_KI = thin_svd(weight_OI.detach())
    s_R, largest = s_K[:rank], s_K[0]
    none_R = s_R <= torch.finfo(s_K.dtype).eps * max(weight_OI.shape) * largest
    root_R = torch.where(none_R, largest if largest > 0 else torch.ones_like(largest), s_R).sqrt()
    factors = u_OK[:, :rank] * (s_R / root_R), root_R[:, None] * v_KI[:rank]
    up_OR, down_RI = (factor.to(weight_OI.dtype).contiguous() for factor in factors)  # the SVD's are strided
    return up_OR, down_RI


class FactorisedLinear(nn.Module):
    """y = (x A) B + bias: [B I] -> [B O] through R numbers, with A = down.weight^T and B = up.weight^T.

    Starts as the truncated SVD of `layer`, whose bias it keeps. `weight` is the product, computed on request.
    """

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = layer.in_features, layer.out_features, rank
        up_OR, down_RI = balanced_factors(layer.weight, rank)
        # On meta, to avoid drawing a Linear's random start weights for nothing.
        self.down = nn.Linear(layer.in_features, rank, bias=False, device="meta")
        self.up = nn.Linear(rank, layer.out_features, bias=False, device="meta")
        self.down.weight, self.up.weight = nn.Parameter(down_RI), nn.Parameter(up_OR)
        self.up.bias = layer.bias

    @property
    def weight(self) -> Tensor:
        return self.up.weight @ self.down.weight

    @property
    def bias(self) -> nn.Parameter | None:
        return self.up.bias

    def forward(self, x_BI: Tensor) -> Tensor:
        return self.up(self.down(x_BI))


@dataclass(frozen=True)
class Cut:
    """What happens to one linear layer of shape [outputs, inputs]; `rank` is None for one that stays whole."""

    name: str
    outputs: int
    inputs: int
    rank: int | None

    @property
    def weights(self) -> int:
        """Remaining weights, without biases."""
        return self.outputs * self.inputs if self.rank is None else self.rank * (self.outputs + self.inputs)


def plan(model: nn.Module, ratio: float, exclude: list[str]) -> list[Cut]:
    """One entry for each linear layer below `model`.

    Raises: UserError for a ratio below 1, a pattern that matches nothing but the defaults, or a plan that factorises
    nothing.
    """
    require_in("[1, inf)", ratio=ratio)
    linear = {name: layer for name, layer in model.named_modules() if name and isinstance(layer, nn.Linear)}
    require_patterns(exclude, "exclude")
    require_matches([p for p in exclude if p not in EXCLUDED], list(linear), f"linear layer of {type(model).__name__}")
    cuts = []
    for name, layer in linear.items():
        if not matches(name, exclude) and not is_open(layer):
            raise UserError(
                f"{name} is a {type(layer).__name__} whose weight is packed or recomputed each time, so it cannot "
                "be factorised; add it to exclude, or start from a layer with a plain weight"
            )
        rank: int | None = rank_within(layer.out_features, layer.in_features, ratio)
        whole = matches(name, exclude) or layer.out_features < FEWEST_OUTPUTS
        cuts.append(Cut(name, layer.out_features, layer.in_features, None if whole or not rank else rank))
    if not any(cut.rank for cut in cuts):
        raise UserError(
            f"no linear layer of {type(model).__name__} can be factorised at ratio={ratio} with exclude={exclude}: "
            f"{len(cuts)} found; lower the ratio or exclude fewer"
        )
    _refuse_shared(model, [cut.name for cut in cuts if cut.rank])
    return cuts


def factorise(model: nn.Module, ratio: float = 2.0, exclude: list[str] | None = None) -> nn.Module:
    """Replaces linear layers of `model` by `FactorisedLinear` in place, prints the result for each, returns `model`.

    Args:
        ratio: c >= 1; a replaced layer keeps at most 1/c of its weights.
        exclude: shell-style patterns of layer names that stay whole; None is `EXCLUDED`.
    Raises: UserError as `plan` does, and for a layer whose weight is shared with another one.
    """
    cuts = plan(model, ratio, list(EXCLUDED) if exclude is None else exclude)
    for cut in cuts:
        if cut.rank:
            layer = model.get_submodule(cut.name)
            assert isinstance(layer, nn.Linear)
            _put(model, cut.name, FactorisedLinear(layer, cut.rank).train(layer.training))
    if process_rank() == 0:
        print(printable("\n".join(table(cuts))), flush=True)
    return model


def factorised(model: nn.Module) -> Iterator[tuple[str, FactorisedLinear]]:
    """Name and layer of every `FactorisedLinear` below `model`."""
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, FactorisedLinear))


def table(cuts: list[Cut]) -> list[str]:
    """Lines to print: one per layer, then the total."""
    width = max(len(cut.name) for cut in cuts)
    lines = [
        f"{cut.name:{width}}  {cut.outputs:>6} x {cut.inputs:<6} "
        + (f"rank {cut.rank:<5} {cut.weights / (cut.outputs * cut.inputs):6.1%}" if cut.rank else "whole")
        for cut in cuts
    ]
    before, after = sum(cut.outputs * cut.inputs for cut in cuts), sum(cut.weights for cut in cuts)
    return [*lines, f"{'weights of linear layers':{width}}  {before:,} -> {after:,}, {after / before:.1%}"]


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _refuse_shared(model: nn.Module, names: list[str]) -> None:
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    for name in names:
        sharing = holders[id(model.get_submodule(name).weight)]
        if len(sharing) > 1:
            raise UserError(
                f"{' and '.join(sharing)} are one tensor, which factorising {name} would split; add {name} to exclude"
            )
