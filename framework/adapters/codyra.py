"""CoDyRA: LoRA whose rank-1 components have gates, and sparsity that chooses how many each layer keeps.

Source: "Adaptive Rank, Reduced Forgetting: Knowledge Retention in Continual Learning VLMs with Dynamic Rank-Selective
LoRA", 2024, arXiv 2412.01004: y = W x + B (g * (A x)). After each optimiser step, only the gates take a proximal step
of the L1 norm; components that reach zero are removed when the task ends, and the rest is merged into W.
`lightspan.callbacks.training.rank_selection` does both on its schedule. The paper prints the operator with a plus sign,
which would grow gates; it must shrink them.
Shapes: O output features, I inputs of one of them (see `lightspan.adapters.layers`), R rank.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightspan.adapters.adapter import Adapter, AdapterSpec
from lightspan.adapters.layers import fitting_rank, like
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in


def soft_threshold(gates: Tensor, kappa: float) -> Tensor:
    """sign(g) max(|g| - kappa, 0): the minimiser over z of (z - g)^2 / 2 + kappa |z|, the paper's operator.

    Args:
        kappa: >= 0, subtracted from every gate, not scaled by the learning rate.
    """
    return gates.sign() * (gates.abs() - kappa).clamp_min(0)


def shrink_then_cut(gates: Tensor, kappa: float) -> Tensor:
    """The authors' code: shrinks by kappa, then sets to zero what is below kappa. Its dead zone is 2 kappa wide.

    It is the proximal operator of no convex penalty, and jumps by kappa at the edge of the zone: a gate either stays at
    kappa or above, or becomes zero. Under `soft_threshold` a gate may stay just above zero, kept and useless.
    """
    shrunk = soft_threshold(gates, kappa)
    return torch.where(shrunk.abs() < kappa, torch.zeros_like(shrunk), shrunk)


@dataclass(frozen=True)
class GatedLoRA(AdapterSpec):
    """Args:
    rank: components of every layer before any is removed, from 1 to the rank of the layer's weight.
    gates: how they start. "normal" draws N(0, 1) as the authors' code does, so about half of the components of a run
        vanish by their first draw alone; "ones" starts all equally.
    cap: as in `lightspan.adapters.lora.LoRA`.
    """

    rank: int = 16
    gates: Literal["normal", "ones"] = "normal"
    cap: bool = False

    def __post_init__(self) -> None:
        require_in("[1, inf)", rank=self.rank)
        if self.gates not in ("normal", "ones"):
            raise UserError(f"GatedLoRA gates={self.gates!r} must be 'normal' or 'ones'")

    def build(self, layer: nn.Module, name: str) -> "GatedLoRAUpdate":
        return GatedLoRAUpdate(layer, fitting_rank(self.rank, layer, name, self.cap), self.gates == "normal")


class GatedLoRAUpdate(Adapter):
    """up diag(gate) down, `up` zero at the start."""

    def __init__(self, layer: nn.Module, rank: int, normal_gates: bool) -> None:
        super().__init__(layer)
        options = like(layer)
        self.down_RI = nn.Parameter(torch.empty(rank, self.layer.fan_in, **options))
        self.up_OR = nn.Parameter(torch.empty(self.layer.out_features, rank, **options))
        self.gate_R = nn.Parameter(torch.empty(rank, **options))
        self.normal_gates = normal_gates
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Resets the adapter in place: done at the end of a task, once the change is merged into the weight."""
        nn.init.kaiming_uniform_(self.down_RI, a=math.sqrt(5))
        self.up_OR.zero_()
        self.gate_R.normal_() if self.normal_gates else self.gate_R.fill_(1)

    @property
    def kept_rank(self) -> int:
        """Components whose gate is not zero."""
        return int((self.gate_R != 0).sum())

    @torch.no_grad()
    def prune(self) -> None:
        """Removes components with gate zero; outputs do not change. Optimisers must be rebuilt after it."""
        kept_R = self.gate_R != 0
        self.down_RI = nn.Parameter(self.down_RI[kept_R])
        self.up_OR = nn.Parameter(self.up_OR[:, kept_R])
        self.gate_R = nn.Parameter(self.gate_R[kept_R])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.layer.down(x.to(self.down_RI.dtype), self.down_RI)
        return self.layer.up(self.layer.scale(z, self.gate_R), self.up_OR)

    def delta(self) -> Tensor:
        return self.layer.shaped(self.up_OR * self.gate_R @ self.down_RI)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        kept_R = self.gate_R != 0
        return (self.up_OR * self.gate_R)[:, kept_R], self.down_RI[kept_R]

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """A stored adapter may have been pruned."""
        rank = len(tensors.get("gate_R", self.gate_R))
        options: dict[str, Any] = {"dtype": self.gate_R.dtype, "device": self.gate_R.device}
        self.down_RI = nn.Parameter(torch.empty(rank, self.layer.fan_in, **options))
        self.up_OR = nn.Parameter(torch.empty(self.layer.out_features, rank, **options))
        self.gate_R = nn.Parameter(torch.empty(rank, **options))
        super().restore(tensors)
