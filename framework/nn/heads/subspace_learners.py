"""A linear embedding whose coordinates belong to learners, of which the last can be split.

Source: Adiga, Dolz, Lombaert, "Attention-based Dynamic Subspace Learners for Medical Image Analysis" (ADSL), IEEE JBHI
2022, arXiv 2206.09068, section 3, and the authors' code. That moves the kept rows to the front, one after the other in
one tensor, so that a row may be overwritten before it is read; here a coordinate keeps its place and changes owner.
Shapes: B rows, F features, D coordinates, K learners.
"""

import math

import torch
from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.ranges import require_in
from lightspan.core.unit_length import LEAST_LENGTH, unit_length


class SubspaceLearners(nn.Linear):
    """[B F] -> [B D]. Each coordinate has one owner, `owner_D` in [0, K), and every learner owns at least one: learners
    are a partition of the coordinates. It starts with one learner, weights Xavier-normal.

    Args:
        in_features: F, the backbone's `num_features`.
        out_features: D, at least 1.
        seed: of the rows that `split` draws anew.
    """

    owner_D: Tensor

    def __init__(self, in_features: int, out_features: int = 128, seed: int = 0) -> None:
        require_in("[1, inf)", in_features=in_features, out_features=out_features)
        require_in("[0, inf)", seed=seed)
        super().__init__(in_features, out_features)
        nn.init.xavier_normal_(self.weight)
        self.register_buffer("owner_D", torch.zeros(out_features, dtype=torch.int64))
        self.seed = seed

    @property
    def learners(self) -> int:
        """K; asks the device."""
        return int(self.owner_D.max()) + 1

    def slices(self, a_BD: Tensor) -> Tensor:
        """All slices side by side, [B D], each of unit length; a slice of zeros stays zero, without a gradient."""
        a_BD = wide(a_BD)
        square_BD = a_BD.square()
        total_BK = square_BD.new_zeros(len(a_BD), a_BD.shape[1]).index_add(1, self.owner_D, square_BD)
        square_BD = total_BK[:, self.owner_D]
        return a_BD * square_BD.masked_fill(square_BD < LEAST_LENGTH**2, torch.inf).rsqrt()

    def slice_of(self, a_BD: Tensor, learner_B: Tensor, whole: Tensor) -> Tensor:
        """Each row's slice of its learner, [B D] of unit length, with zeros at the coordinates of others.

        Args:
            whole: bool, 0-d; whether a row is compared in all coordinates instead.
        """
        return unit_length(wide(a_BD).where((self.owner_D == learner_B[:, None]) | whole, 0))

    def taylor(self) -> Tensor:
        """sum_n a_nj dL/da_nj of each coordinate j, [D]: minus the first-order change of the loss if j becomes 0.

        With a = W h + b this is <W_j, dL/dW_j> + b_j dL/db_j, so that no activation has to be kept. The loss compares
        slices at unit length, and the sum is the same for the coordinates before and after that. Without gradients: 0.
        """
        score_D = self.weight.new_zeros(len(self.weight))
        for parameter in (self.weight, self.bias):
            if parameter.grad is not None:
                score_D = score_D + (parameter.detach() * parameter.grad).view(len(score_D), -1).sum(dim=1)
        return wide(score_D)

    @torch.no_grad()
    def split(self, score_D: Tensor, threshold: float = 0.5, least: int = 5) -> Tensor | None:
        """Gives the coordinates of the last learner that matter least to a new one, and draws their rows anew.

        |score| is scaled to [0, 1] over the coordinates of the last learner; those above the threshold stay, and keep
        their rows. Nothing happens if fewer than `least` stay, or if all score alike, which tells nothing.

        Returns: bool [D], the coordinates of the new learner; None if nothing happened.
        """
        last = self.learners - 1
        own_D, score_D = self.owner_D == last, score_D.abs()
        lowest, highest = score_D[own_D].aminmax()
        kept_D = own_D & (score_D - lowest > threshold * (highest - lowest))
        freed_D = own_D & ~kept_D
        if not highest > lowest or int(kept_D.sum()) < least:
            return None
        generator = torch.Generator().manual_seed(self.seed + last)
        rows, reach = int(freed_D.sum()), 1 / math.sqrt(self.in_features)
        weight_dF = torch.randn(rows, self.in_features, generator=generator) * math.sqrt(2 / (rows + self.in_features))
        self.weight[freed_D] = weight_dF.to(self.weight)
        self.bias[freed_D] = ((2 * torch.rand(rows, generator=generator) - 1) * reach).to(self.bias)
        self.owner_D[freed_D] = last + 1
        return freed_D
