"""A rank for each matrix from its first gradient: as much energy as requested, within a budget of bytes."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightspan.devices import widest_float
from lightspan.distributed import agreed
from lightspan.errors import UserError
from lightspan.optim.layout import canonical_gradient, is_matrix, matrix_shape
from lightspan.sharded import splits_of


@dataclass(frozen=True)
class RankByEnergy:
    """The smallest rank that captures a share of the energy of a matrix' first gradient, within a budget.

    Early gradients of most networks have a few strong directions and a long tail; matrices differ in both. If the
    ranks of the energy target would cost more than `budget_mib`, directions are taken in order of the share of energy
    that they bring per byte, over all matrices, until the budget is spent. Spectra are descending, so no other choice
    within the budget captures more in total. Among several processes rank 0's spectra decide.

        loss.backward()
        optimizer = LowRank(RankByEnergy(0.9).groups(list(model.parameters())), lr=1e-3)

    Args:
        energy: share in (0, 1].
        least, most: bounds on every rank, 1 <= least <= most.
        budget_mib: of float32 moments and frames of all projected matrices together; None for no bound.
    """

    energy: float = 0.9
    least: int = 4
    most: int = 256
    budget_mib: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise UserError(f"RankByEnergy energy={self.energy} must be in (0, 1]")
        if not 1 <= self.least <= self.most:
            raise UserError(f"RankByEnergy needs 1 <= least <= most, got least={self.least}, most={self.most}")

    def choose(self, parameters: Sequence[Tensor]) -> list[int]:
        """One rank for each parameter, from its `grad`.

        Raises: UserError if `least` everywhere exceeds the budget, and for sharded parameters.
        """
        if splits_of(parameters):
            raise UserError(
                "RankByEnergy needs whole gradients, but this model is sharded; set rank to a number, or train with DDP"
            )
        gradients = [canonical_gradient(p.grad, p) for p in parameters if p.grad is not None]
        shares = [_energy_shares(gradient) for gradient in gradients]
        costs = [bytes_per_rank(parameter) for parameter in parameters if parameter.grad is not None]
        wanted = [self._wanted(share_N) for share_N in shares]
        if self.budget_mib is None:
            return wanted
        left = self.budget_mib * 2**20
        left -= sum(min(self.least, rank) * size for rank, size in zip(wanted, costs, strict=True))
        if left < 0:
            raise UserError(
                f"RankByEnergy budget_mib={self.budget_mib} is too small even for rank {self.least} of all "
                f"{len(gradients)} matrices; raise it by {-left / 2**20:.2f} MiB or lower `least`"
            )
        offers = sorted(
            (-float(share) / size, number)
            for number, (share_N, size) in enumerate(zip(shares, costs, strict=True))
            for share in share_N[self.least : wanted[number]]
        )
        ranks = [min(self.least, rank) for rank in wanted]
        for _, number in offers:
            if costs[number] <= left:
                left -= costs[number]
                ranks[number] += 1
        return ranks

    def groups(self, parameters: Sequence[Tensor]) -> list[dict[str, Any]]:
        """Parameter groups for `LowRank`, one a rank, after a backward pass; what is no matrix or has no gradient is in
        a last group with project=False.

        Raises: UserError as `choose` does.
        """
        chosen = [p for p in parameters if p.grad is not None and is_matrix(p)]
        alike: dict[int, list[Tensor]] = defaultdict(list)
        for parameter, rank in zip(chosen, self.choose(chosen), strict=True):
            alike[rank].append(parameter)
        groups: list[dict[str, Any]] = [{"params": alike[rank], "rank": rank} for rank in sorted(alike)]
        held = set(chosen)
        rest = [p for p in parameters if p not in held]
        return groups + ([{"params": rest, "project": False}] if rest else [])

    def _wanted(self, share_N: Tensor) -> int:
        reached = int((share_N.cumsum(0) < self.energy).sum()) + 1
        return min(max(reached, self.least), self.most, len(share_N))


def bytes_per_rank(parameter: Tensor) -> int:
    """Bytes of one more direction of a parameter, in float32 moments and frame."""
    rows, columns = matrix_shape(parameter)
    return 4 * (2 * rows + columns)


def _energy_shares(gradient_MN: Tensor) -> Tensor:
    """Squared singular values over their sum [N], descending; on the CPU. A zero gradient has no strong direction."""
    wide_MN = gradient_MN.to(widest_float(gradient_MN.device))
    values_N = agreed(torch.linalg.eigvalsh(wide_MN.mT @ wide_MN).flip(0).clamp_min_(0)).cpu()
    total = values_N.sum()
    return values_N / total if total > 0 else torch.full_like(values_N, 1 / len(values_N))
