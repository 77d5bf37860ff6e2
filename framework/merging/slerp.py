"""SLERP: the shortest way from one model to another on a sphere, tensor by tensor.

Source: Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985; for the weights of models as mergekit has
it (Goddard et al., 2024, arXiv 2403.13257). With a and b the two models' tensors as vectors, cos w = <a, b> / (|a||b|):

    theta = sin((1 - t) w) / sin w  a  +  sin(t w) / sin w  b

Where a tensor is zero in one model, or the two are (anti)parallel, there is no one shortest way: the straight line
(1 - t) a + t b is taken.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.files.tensors import Form
from lightspan.merging.merger import Merger
from lightspan.merging.span import CHUNK, in_pieces, in_span_as, widest

PARALLEL = 0.9995
"""|cos w| from which on the line is taken, as in mergekit."""


class Slerp(Merger):
    """A model between two others, of which the first one named leads.

    Args:
        t: where between them, in [0, 1]; 0 is the first.
    """

    def __init__(self, t: float = 0.5) -> None:
        if not 0 <= t <= 1:
            raise UserError(f"Slerp t={t} must be in [0, 1]: 0 is the first checkpoint, 1 the second")
        self.t = t

    def leading(self, names: Sequence[str]) -> str:
        if len(names) != 2:
            raise UserError(f"Slerp goes from one checkpoint to one other; got {', '.join(names) or 'none'}")
        return names[0]

    def numbers_of(self, names: Sequence[str]) -> dict[str, float]:
        return dict(zip(names, (1 - self.t, self.t), strict=True))

    def tensor(self, name: str, form: Form, weights: Mapping[str, Tensor]) -> Tensor:
        a_S, b_S = weights.values()
        cosine = _cosine(a_S, b_S)
        if abs(cosine) > PARALLEL or not math.isfinite(cosine):
            return in_span_as(form.dtype, a_S, [b_S], torch.tensor([self.t], dtype=torch.float64))
        angle = math.acos(cosine)
        of_a, of_b = (math.sin(share * angle) / math.sin(angle) for share in (1 - self.t, self.t))
        return in_pieces(form.dtype, lambda a, b: of_a * widest(a) + of_b * widest(b), a_S, b_S)


def _cosine(a_S: Tensor, b_S: Tensor) -> float:
    """NaN where one of them is zero or infinite."""
    dot, aa, bb = 0.0, 0.0, 0.0
    for a, b in zip(a_S.reshape(-1).split(CHUNK), b_S.reshape(-1).split(CHUNK), strict=True):
        a, b = widest(a), widest(b)
        dot += float(torch.vdot(a, b).real)
        aa, bb = aa + float(a.abs().square().sum()), bb + float(b.abs().square().sum())
    norms = math.sqrt(aa) * math.sqrt(bb)
    return dot / norms if norms else math.nan
