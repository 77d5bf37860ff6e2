"""PaCA: some input columns of a weight train, drawn at random, and the others stay.

Source: Woo et al., "PaCA: Partial Connection Adaptation for Efficient Fine-Tuning", ICLR 2025, arXiv 2503.01905,
equations 7 to 9: of W only r random columns have a gradient, dL/dy x_r^T, so that the backward pass needs of the
layer's input only the r numbers x_r, where LoRA needs all I. Here the change P of the columns trains, beside the layer:
y = W x + (alpha / r) P x_r is the function of columns that train in place, but W is never written to, half precision
swallows no small step, and weight decay pulls towards the pretrained columns. It costs one thin product, where LoRA has
two, one after the other. The factor alpha / r is that of the authors' code, whose columns are (alpha / r) P.
Columns are drawn evenly, as the paper's are. For a convolution they are input channels with their whole kernels, the
same ones of each group.
Shapes: O output features, C input channels of one group (of a linear layer its inputs), R trained ones, M = R x kernel
positions, I = C x kernel positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.adapters.adapter import Adapter, AdapterSpec
from lightspan.adapters.layers import LayerShape, like
from lightspan.core.distributed import register_replicated
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.subspaces.masks.draws import uniform


@dataclass(frozen=True)
class PaCA(AdapterSpec):
    """Args:
    rank: r, trained input columns of a linear layer or input channels of a convolution's group, from 1 to all of them.
    alpha: the change is scaled by alpha / r, > 0; None is r, a scale of 1.
    cap: whether a layer with fewer of them trains them all; otherwise it is refused.
    seed: of the draw, >= 0. With the layer's name it decides the columns, on every rank and in every run alike.
    """

    rank: int = 8
    alpha: float | None = None
    cap: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        require_in("[1, inf)", rank=self.rank)
        require_in("(0, inf)", alpha=self.alpha)
        require_in("[0, inf)", seed=self.seed)

    def build(self, layer: nn.Module, name: str) -> "PaCAUpdate":
        channels = LayerShape.of(layer).modes[1]
        if self.rank > channels and not self.cap:
            raise UserError(
                f"rank={self.rank} is above {channels}, the inputs of {name} (of a convolution, the channels of one "
                "group); lower it, or set cap=True to train all inputs of such layers"
            )
        rank = min(self.rank, channels)
        drawn_C = uniform(self.seed, 0, name, (channels,), dtype=torch.float64)
        inputs_R = drawn_C.argsort(stable=True)[:rank].sort().values
        return PaCAUpdate(layer, inputs_R, 1.0 if self.alpha is None else self.alpha / rank)


class PaCAUpdate(Adapter):
    """scale * change on the drawn columns, zero on all others; the change is zero at first.

    Attributes:
        inputs_R: numbers of the columns in increasing order, part of checkpoints and adapter files.
    """

    inputs_R: Tensor

    def __init__(self, layer: nn.Module, inputs_R: Tensor, scale: float) -> None:
        super().__init__(layer)
        options = like(layer)
        self.positions = self.layer.fan_in // self.layer.modes[1]
        self.change_OM = nn.Parameter(torch.zeros(self.layer.out_features, len(inputs_R) * self.positions, **options))
        register_replicated(self, "inputs_R", inputs_R.to(options["device"]))
        self.scale = scale

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        # Chosen before anything else is done to x, which autograd then has no reason to keep.
        x_r = x.index_select(-1 - len(self.layer.stride), self._of_each_group()).to(self.change_OM.dtype)
        change_OM = self.change_OM * self.scale
        if self.layer.linear:
            return F.linear(x_r, change_OM)
        return self.layer.convolve(x_r, change_OM.view(len(change_OM), -1, *self.layer.weight[2:]))

    def delta(self) -> Tensor:
        change_OM = self.change_OM * self.scale
        change_OI = change_OM.new_zeros(len(change_OM), self.layer.fan_in)
        return self.layer.shaped(change_OI.index_copy(1, self._places_M(), change_OM))

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """The columns and the ones that choose them; of more columns than outputs, an identity and the whole change."""
        up_OM, places_M = self.change_OM * self.scale, self._places_M()
        if len(places_M) > len(up_OM):
            return torch.eye(len(up_OM)).to(up_OM), self.layer.matrix(self.delta())
        return up_OM, F.one_hot(places_M, self.layer.fan_in).to(up_OM)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        inputs_R, channels = tensors.get("inputs_R"), self.layer.modes[1]
        if inputs_R is not None and inputs_R.ndim == 1 and len(inputs_R):
            whole_numbers = inputs_R.dtype == torch.int64 and bool((inputs_R.diff() > 0).all())
            if not (whole_numbers and inputs_R[0] >= 0 and inputs_R[-1] < channels):
                raise UserError(f"not the tensors of this adapter: inputs_R must be rising numbers below {channels}")
        super().restore(tensors)

    def _of_each_group(self) -> Tensor:
        """The same inputs of every group, as channels of the layer's input."""
        first_G1 = torch.arange(self.layer.groups, device=self.inputs_R.device)[:, None] * self.layer.modes[1]
        return (first_G1 + self.inputs_R).flatten()

    def _places_M(self) -> Tensor:
        """The inputs' columns in the weight as a matrix [O I]."""
        places_CK = torch.arange(self.layer.fan_in, device=self.inputs_R.device).view(-1, self.positions)
        return places_CK[self.inputs_R].flatten()
