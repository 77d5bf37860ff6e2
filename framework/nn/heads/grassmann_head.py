"""Grassmann class representation: a class is a subspace, its logit the length of a feature's projection onto it.

Source: Wang et al., "Get the Best of Both Worlds: Improving Accuracy and Transferability by Grassmann Class
Representation", ICCV 2023, arXiv 2308.01547, section 3. Shapes: B rows, F features, K classes, R dimension of a class.
"""

import torch
from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.core.unit_length import unit_length
from lightspan.nn.widths import LazyHead
from lightspan.subspaces.frames import Frames, random_frame


class GrassmannHead(LazyHead):
    """Logits l_k = scale |S_k^T x / |x||, in [0, scale] and float32 or wider, with orthonormal frames S_k [F R].

    They do not change when a frame turns within its span, and not with the sign of x: with R = 1 they are
    scale |cos(s_k, x)|. A feature of zero has no direction, and logits of 0. Frames start uniformly at random, equal on
    all ranks; `lightspan.optim.riemannian.RiemannianSGD` trains them, and other optimisers are refused.

    Args:
        in_features: F, the backbone's `num_features`.
        out_features: K; None leaves it to the method, whose `num_classes` it is.
        rank: R, in [1, F]; the paper has 8. With K R far above F the subspaces of classes overlap.
        scale: gamma, > 0. It limits confidence: no probability is above 1 / (1 + (K - 1) exp(-scale)).
        seed: of the frames.
    """

    parameter_kinds = {"frame_KFR": "frames"}  # noqa: RUF012 - read by lightspan.optim.groups
    frame_KFR: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        rank: int = 8,
        scale: float = 25.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= in_features:
            raise UserError(f"GrassmannHead rank={rank} must be in [1, in_features={in_features}]")
        require_in("(0, inf)", scale=scale)
        self.in_features, self.rank, self.scale, self.seed = in_features, rank, scale, seed
        if out_features is not None:
            self.build(out_features)

    def make_outputs(self, count: int) -> None:
        seeds = [int(s) for s in torch.randint(2**31, (count,), generator=torch.Generator().manual_seed(self.seed))]
        dtype, device = torch.get_default_dtype(), torch.device("cpu")
        frames = random_frame(seeds, self.in_features, self.rank, dtype=dtype, device=device)
        self.frame_KFR = nn.Parameter(frames.contiguous())  # QR gives columns in a row, which FSDP2 refuses

    def forward(self, x_BF: Tensor) -> Tensor:
        self.require_outputs()
        with torch.autocast(x_BF.device.type, enabled=False):
            direction_BF = unit_length(wide(x_BF))
            coordinates_KBR = Frames(wide(self.frame_KFR)).pull(direction_BF)
            return self.scale * torch.linalg.vector_norm(coordinates_KBR, dim=2).T
