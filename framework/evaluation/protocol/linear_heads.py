"""Linear heads on a frozen encoder under augmentation, one for each learning rate, trained side by side.

Source: the linear evaluations of DINO (Caron et al., 2021, arXiv 2104.14294: SGD with momentum 0.9 and no decay, a
cosine, random resized crops and flips, 100 epochs) and of DINOv2 (Oquab et al., 2023, arXiv 2304.07193: the rates of
`RATES`, all trained at once on the same features). MAE (He et al., 2021, arXiv 2111.06377, appendix A.1) puts a batch
norm without weights before the head. Rates are those of 256 samples, and grow with the batch (Goyal et al., 2017, arXiv
1706.02677). Heads start at zero, where these papers have noise of 0.01: without a hidden layer it changes nothing that
is found.
Shapes: B samples of a batch, D features, K classes, R rates.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightspan.optim.schedules import WarmupCosine

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
"""DINOv2's grid, for a batch of 256."""
REFERENCE_BATCH = 256
NORM_EPSILON = 1e-6
"""Of MAE's batch norm."""


class LinearHeads(nn.Module):
    """R linear maps of the same features, [B D] -> [R B K].

    Args:
        normalised: whether a batch norm without weights is before them.
    """

    def __init__(self, heads: int, width: int, classes: int, normalised: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, NORM_EPSILON, affine=False) if normalised else nn.Identity()
        self.weight = nn.Parameter(torch.zeros(heads, width, classes))
        self.bias = nn.Parameter(torch.zeros(heads, 1, classes))

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.norm(x_BD) @ self.weight + self.bias


def fit_linear_heads(
    features: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    batch_size: int,
    rates: Sequence[float],
    classes: int,
    momentum: float = 0.9,
    normalised: bool = False,
) -> LinearHeads:
    """Heads in evaluation mode, each trained by SGD at its own rate on the same batches.

    Each head's loss is its own mean cross entropy, so none changes another one. A rate that is too large may end in
    weights that are not finite.

    Args:
        features: of a frozen network, images -> [B D].
        batches: (images, labels [B]), `steps` of them, at least one.
        batch_size: by which the rates are scaled, at least 1.
        rates: for 256 samples, at least one.
        momentum: in [0, 1).
    """
    heads: LinearHeads | None = None
    for x, label_B in batches:
        with torch.no_grad():
            x_BD = features(x)
        if heads is None:
            heads = LinearHeads(len(rates), x_BD.shape[1], classes, normalised).to(x_BD.device)
            optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=momentum)
            schedule = WarmupCosine(optimizer, steps, warmup=0.0, final=0.0)
            scale_R11 = torch.tensor(rates, device=x_BD.device).view(-1, 1, 1) * batch_size / REFERENCE_BATCH
        logits_RBK = heads(x_BD)
        loss = cross_entropy(logits_RBK.flatten(0, 1), label_B.repeat(len(rates))) * len(rates)
        optimizer.zero_grad()
        loss.backward()
        for parameter in heads.parameters():  # SGD is linear in the gradient: this is a rate for each head
            assert parameter.grad is not None
            parameter.grad *= scale_R11
        optimizer.step()
        schedule.step()
    assert heads is not None
    return heads.eval()
