"""SVFit: train the singular values of a pretrained weight, and keep its singular vectors.

Source: "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values", 2024, arXiv
2409.05926. W = U S V^T; of W' = U_r diag(s) V_r^T + W_e only s trains. Here the trained numbers are the shift s - s0,
and the layer runs with its own weight: y = W x + U_r ((s - s0) * (V_r^T x)) is the same function without a stored W_e,
exact at the start, and weight decay pulls towards the pretrained weight instead of towards zero.
Shapes: O output features, I inputs of one of them (see `lightspan.adapters.layers`), R rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightspan.adapters.adapter import Adapter, AdapterSpec
from lightspan.adapters.layers import LayerShape, fitting_rank, readable_weight, weight_of
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.core.sharded import whole
from lightspan.subspaces.singular import SingularFrame
from lightspan.subspaces.svd import thin_svd


@dataclass(frozen=True)
class SVFit(AdapterSpec):
    """Args:
    rank: number of singular values that train, the largest ones; None is all of them, the limit of the paper's rule.
    energy: instead of `rank`, least share of the squared singular values that the trained ones must have, in (0, 1].
    cap: as in `lightspan.adapters.lora.LoRA`, for `rank`.
    """

    rank: int | None = None
    energy: float | None = None
    cap: bool = False

    def __post_init__(self) -> None:
        if self.rank is not None and self.energy is not None:
            raise UserError(f"SVFit takes rank={self.rank} or energy={self.energy}, not both")
        require_in("[1, inf)", rank=self.rank)
        require_in("(0, 1]", energy=self.energy)

    def build(self, layer: nn.Module, name: str) -> "SVFitUpdate":
        wanted = None if self.rank is None else fitting_rank(self.rank, layer, name, self.cap)
        left_OR, values_R, right_RI = frames(layer)
        rank = wanted or len(values_R)
        if self.energy is not None:
            share_R = values_R.double().square().cumsum(0)
            rank = int((share_R < self.energy * share_R[-1]).sum()) + 1
        return SVFitUpdate(layer, left_OR[:, :rank], values_R[:rank], right_RI[:rank])


def frames(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """U [O R], s [R] and V^T [R I] of the layer's weight, in float32 or wider: half precision has no SVD."""
    return thin_svd(LayerShape.of(layer).matrix(readable_weight(layer).detach()))


class SVFitUpdate(Adapter):
    """left diag(shift) right, with fixed frames.

    For a half-precision layer the frames have the layer's dtype, and so do the products with them: the change is added
    to an output in that dtype, and accelerators form such products several times as fast. Shifts, and their gradients'
    sums over positions, stay float32.

    An adapter file keeps only the shifts, and the frames are recomputed from the layer. They are the same up
    to rounding, except for singular values that (nearly) coincide; so the file also keeps the change of one
    fixed input, and a different result is refused.
    """

    def __init__(self, layer: nn.Module, left_OR: Tensor, values_R: Tensor, right_RI: Tensor) -> None:
        super().__init__(layer)
        dtype = weight_of(layer).dtype
        self.left_OR = _fixed(left_OR.to(dtype))
        self.values_R = _fixed(values_R)
        self.right_RI = _fixed(right_RI.to(dtype))
        self.shift_R = nn.Parameter(torch.zeros_like(values_R))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.layer.down(x.to(self.right_RI.dtype), self.right_RI)
        return self.layer.up(self.layer.scale(z, self.shift_R).to(self.left_OR.dtype), self.left_OR)

    def delta(self) -> Tensor:
        return self.layer.shaped(SingularFrame(self.left_OR, self.right_RI).push(self.shift_R))

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self.left_OR * self.shift_R, self.right_RI.to(self.shift_R.dtype)

    def stored(self) -> dict[str, Tensor]:
        shift_R = whole(self.shift_R).detach()
        return {"shift_R": shift_R, "probe_O": self._probe(shift_R)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        stored, expected = tensors.get("shift_R"), tensors.get("probe_O")
        if stored is None or expected is None or stored.shape != self.shift_R.shape:
            raise UserError(f"not the shifts of {len(self.shift_R)} singular values and what they do to a fixed input")
        if not stored.isfinite().all():
            raise UserError("the shifts are not finite: the run that wrote them has diverged")
        probe_O = self._probe(stored.to(self.shift_R))
        if expected.shape != probe_O.shape:
            raise UserError(f"not the shifts of a layer with {len(probe_O)} outputs")
        apart = (probe_O - expected.to(probe_O)).norm()
        # Files of half-precision layers were once written from frames in float32.
        limit = max(torch.finfo(probe_O.dtype).eps ** 0.5, torch.finfo(self.left_OR.dtype).eps) * probe_O.norm()
        if not apart <= limit:
            raise UserError(
                f"the singular vectors computed here differ (by {apart:.2g} on a fixed input): some singular "
                "values of the layer nearly coincide; keep the whole checkpoint or a PEFT folder instead"
            )
        with torch.no_grad():
            self.shift_R.copy_(stored)

    def _probe(self, shift_R: Tensor) -> Tensor:
        """The effect of these shifts on one fixed input, in their dtype."""
        left_OR, right_RI = (whole(frame).detach().to(shift_R.dtype) for frame in (self.left_OR, self.right_RI))
        x_I = torch.randn(right_RI.shape[1], generator=torch.Generator().manual_seed(0)).to(right_RI)
        return left_OR @ (shift_R * (right_RI @ x_I))


def _fixed(tensor: Tensor) -> nn.Parameter:
    """A parameter that needs no gradient; a copy that does not keep the larger tensor."""
    return nn.Parameter(tensor.clone(memory_format=torch.contiguous_format), requires_grad=False)
