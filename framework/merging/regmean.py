"""RegMean: the linear layer whose outputs are nearest to those of all models, each on its own inputs.

Source: Jin, Ren, Preotiuc-Pietro, Cheng, "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023,
arXiv 2212.09849. With G_i = X_i' X_i of a layer's inputs, and its off-diagonal times alpha,

    W = (sum_i W_i G_i) (sum_i G_i)^-1,     W [O I], G [I I]        (its equation 2, transposed)

`lightspan.evaluation.weights.merging_statistics.InputGrams` writes the G_i. It is computed as the average W_a plus the
least
change: W = W_a + (sum_i (W_i - W_a) G_i) (sum_i G_i)^+, which is the same where the sum has an inverse, and in
directions that no input has leaves the average. Those are the eigenvectors of sum_i G_i whose eigenvalue is at most I
times the precision of the stored G's of the largest one, since rounding alone makes as much. Tensors without G, such as
biases and convolutions, are averaged.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.core.files.tensors import Form
from lightspan.merging.merger import Merger
from lightspan.merging.span import difference, in_span, in_span_as
from lightspan.merging.weights import StatisticsFiles, Weights


class RegMean(Merger):
    """The first checkpoint named leads.

    Args:
        grams: of each checkpoint by its name, a safetensors file of G [I I] by the name of the weight [O I].
        alpha: factor of what is off the diagonal of G, in [0, 1]; the paper takes 0.9, and 0.1 for T5.
    """

    def __init__(self, grams: dict[str, ReadPath], alpha: float = 0.9) -> None:
        if not 0 <= alpha <= 1:
            raise UserError(f"RegMean alpha={alpha} must be in [0, 1]")
        self.alpha = alpha
        self._grams = StatisticsFiles("RegMean", grams)

    def leading(self, names: Sequence[str]) -> str:
        self._grams.require(names)
        return names[0]

    def prepared(self, checkpoints: Mapping[str, Weights], forms: Mapping[str, Form]) -> Self:
        self._grams.require_tensors(forms)
        return self

    @torch.no_grad()
    def tensor(self, name: str, form: Form, weights: Mapping[str, Tensor]) -> Tensor:
        models, grams = list(weights.values()), self._grams.of(name, list(weights))
        shares = torch.full((len(models),), 1 / len(models), dtype=torch.float64)
        if grams is None:
            return in_span_as(form.dtype, models[0], models, shares)
        if len(form.shape) != 2 or any(gram.shape != (form.shape[1],) * 2 for gram in grams):
            raise UserError(
                f"RegMean: G of {name} is {list(grams[0].shape)} for a weight {list(form.shape)}, not inputs x inputs; "
                "compute it anew with InputGrams"
            )
        average_OI = in_span(models[0], models, shares)
        total_II = torch.zeros(form.shape[1], form.shape[1], dtype=torch.float64)
        apart_OI = torch.zeros_like(average_OI)
        floats = [gram_II.dtype for gram_II in grams if gram_II.is_floating_point()]
        precision = max(torch.finfo(dtype).eps for dtype in (*floats, torch.float64))
        for model_OI, gram_II in zip(models, grams, strict=True):
            gram_II = gram_II.double()
            gram_II = self.alpha * gram_II + (1 - self.alpha) * gram_II.diag().diag()
            total_II += gram_II
            apart_OI += difference(model_OI.double(), average_OI) @ gram_II
        if not (total_II.isfinite().all() and apart_OI.isfinite().all()):
            raise UserError(
                f"RegMean: G of {name} and the weights give infinite products; merge checkpoints from before the run "
                "diverged, and compute G of them anew"
            )
        inverse_II = torch.linalg.pinv(total_II, rtol=form.shape[1] * precision, hermitian=True)
        return (average_OI + apart_OI @ inverse_II).to(form.dtype)
