"""Diagonal state-space layers: a linear recurrence of each channel, as one convolution, in chunks, or step by step.

Source: Gupta, Mehta, Berant, "Simplifying and Understanding State Space Models with Diagonal Linear RNNs" (DLR), 2022,
arXiv 2212.00768, whose parameters these are; Gu, Gupta, Goel, Re, "On the Parameterization and Initialization of
Diagonal State Space Models" (S4D), 2022, arXiv 2206.11893, for the start from HiPPO's frequencies; Orvieto et al.,
"Resurrecting Recurrent Neural Networks for Long Sequences" (LRU), 2023, arXiv 2303.06349, for the random one.

Of each channel x:  h_t = lambda h_(t-1) + x_t,  y_t = 2 Re(sum over the states of w h_t),  which is the convolution
with k_l = 2 Re(sum of w lambda^l). Powers of lambda come from one rounded lambda by multiplications alone, in all three
forms: phases l times an angle, rounded in float32, would drift apart.
Shapes: B sequences, L steps, D channels, N complex states of each channel, c steps of a chunk, J chunks.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.errors import UserError

LEAST_DECAY = 1e-6
"""Of a state in a step, so that |lambda| is below 1 in float32 whatever the parameters are."""
CHUNK = 64


def recurrence(
    x_BLD: Tensor, lambda_DN: Tensor, weight_DN: Tensor, state_BDN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, step by step: (y [B L D], the state after the last step [B D N]).

    Args:
        lambda_DN, weight_DN: complex.
        state_BDN: that before the first step, complex; None is zeros.
    """
    state_BDN = _start(x_BLD, lambda_DN) if state_BDN is None else state_BDN
    y_BLD = torch.empty_like(x_BLD)
    for t in range(x_BLD.shape[1]):
        state_BDN = lambda_DN * state_BDN + x_BLD[:, t, :, None]
        y_BLD[:, t] = 2 * (weight_DN * state_BDN).sum(dim=2).real
    return y_BLD, state_BDN


def powers(base_DN: Tensor, count: int) -> Tensor:
    """base^0 to base^(count - 1), [D N count], by doubling."""
    # Not a constant 1, so that sequences of one step leave no weight out of the graph, as DDP needs.
    table_DNl, top_DN1 = (0 * base_DN + 1).unsqueeze(2), base_DN.unsqueeze(2)
    while table_DNl.shape[2] < count:
        table_DNl = torch.cat([table_DNl, top_DN1 * table_DNl], dim=2)
        top_DN1 = top_DN1 * top_DN1
    return table_DNl[:, :, :count]


def kernel(lambda_DN: Tensor, weight_DN: Tensor, length: int) -> Tensor:
    """2 Re(sum over N of weight lambda^l) for l below `length`: real [D L].

    With l = i + c j this is a product of two small tables for each channel, [J N] with [N c] and c near the root of L:
    the D N L powers of lambda are never in memory.
    """
    width = max(1, math.isqrt(length))
    fine_DNc = powers(lambda_DN, width)
    coarse_DNJ = powers(lambda_DN * fine_DNc[:, :, -1], -(-length // width))
    left_DJN = (weight_DN.unsqueeze(2) * coarse_DNJ).mT
    product_DJc = left_DJN.real @ fine_DNc.real - left_DJN.imag @ fine_DNc.imag
    return 2 * product_DJc.flatten(1)[:, :length]


def convolution(x_BLD: Tensor, kernel_DL: Tensor, behind_DL: Tensor | None = None) -> Tensor:
    """y_t = sum over l of k_l x_(t-l), and of b_l x_(t+1+l), b `behind`, where that is given: [B L D], by the FFT."""
    length = x_BLD.shape[1]
    size = 2 * length
    ring_DS = torch.cat([kernel_DL, torch.zeros_like(kernel_DL) if behind_DL is None else behind_DL.flip(1)], dim=1)
    if not x_BLD.numel():  # which the FFT refuses; the weights stay in the graph, as DDP needs
        return x_BLD * ring_DS.sum(dim=1)
    product = torch.fft.rfft(x_BLD, size, dim=1) * torch.fft.rfft(ring_DS, dim=1).mT
    return torch.fft.irfft(product, size, dim=1)[:, :length]


def scan(
    x_BLD: Tensor, lambda_DN: Tensor, weight_DN: Tensor, state_BDN: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """As `recurrence`, in chunks of c steps and log2(J) rounds over the J chunks.

    Within a chunk it is a product with the kernel's triangular matrix; each chunk's last state, from a product with
    powers of lambda, then reaches the later ones by doubling distances (Hillis and Steele, 1986). 4 products and
    log2(J) sums whatever L is, with J states of a sequence in memory in place of L.
    """
    length, start_BDN = x_BLD.shape[1], _start(x_BLD, lambda_DN) if state_BDN is None else state_BDN
    if not length:
        return x_BLD, start_BDN
    chunk = min(chunk, length)
    count = -(-length // chunk)
    power_DNc = powers(lambda_DN, chunk + 1)
    padded_BDJc = nn.functional.pad(x_BLD.mT, (0, count * chunk - length)).unflatten(2, (count, chunk))
    kernel_Dc = kernel(lambda_DN, weight_DN, chunk)
    # Row t, column s is k_(t-s): a window of the kernel behind c - 1 zeros, turned around.
    windows_Dcc = nn.functional.pad(kernel_Dc.flip(1), (0, chunk - 1)).unfold(1, chunk, 1).flip(1)
    inner_BDJc = torch.einsum("bdjs,dts->bdjt", padded_BDJc, windows_Dcc)
    own_BDJN = torch.einsum("bdjs,dns->bdjn", padded_BDJc.to(lambda_DN.dtype), power_DNc[:, :, :chunk].flip(2))
    # What stands before the first chunk is one more chunk's state.
    state_BDJN = torch.cat([start_BDN.unsqueeze(2), own_BDJN], dim=2)
    step_DN, distance = power_DNc[:, :, -1], 1
    while distance <= count:
        moved_BDJN = step_DN[:, None] * state_BDJN[:, :, :-distance]
        state_BDJN = torch.cat([state_BDJN[:, :, :distance], state_BDJN[:, :, distance:] + moved_BDJN], dim=2)
        step_DN, distance = step_DN * step_DN, 2 * distance
    turned_DNc = weight_DN.unsqueeze(2) * power_DNc[:, :, 1:]
    before_BDJc = 2 * torch.einsum("bdjn,dnt->bdjt", state_BDJN[:, :, :-1], turned_DNc).real
    y_BLD = (inner_BDJc + before_BDJc).flatten(2)[:, :, :length].mT
    # Of the last chunk only some steps are the sequence's own: zeros behind them turned the state further.
    rest = length - (count - 1) * chunk
    last_BDs = padded_BDJc[:, :, -1, :rest].to(lambda_DN.dtype)
    last_BDN = torch.einsum("bds,dns->bdn", last_BDs, power_DNc[:, :, :rest].flip(2))
    return y_BLD, power_DNc[:, :, rest] * state_BDJN[:, :, -2] + last_BDN


def _start(x_BLD: Tensor, lambda_DN: Tensor) -> Tensor:
    return lambda_DN.new_zeros(x_BLD.shape[0], *lambda_DN.shape)


class StateSpace(nn.Module):
    """A diagonal linear recurrence of each channel: [B L D] -> [B L D], in float32 or wider whatever the type of x.

    |lambda| < 1 whatever the weights are. Its weights do not decay, and no optimiser projects them.

    Args:
        width: D.
        states: N, complex numbers in the state of a channel (and their conjugates, which are not kept).
        bidirectional: a second set of weights reads what follows a step; else y_t depends on x up to t alone.
        start: "hippo" is S4D-Lin, frequencies pi n dt and equal decays dt / 2, with dt spread over the channels on a
            logarithmic scale; "random" is LRU's ring, radii 0.5 to 0.99 and any angle.
        steps: least and greatest dt of "hippo", above 0.
    Raises: UserError for a width or number of states below 1, or steps that are no range above 0.
    """

    parameter_kinds = {"log_decay_DN": "vectors", "angle_DN": "vectors", "weight_KDN2": "vectors"}  # noqa: RUF012 - read by lightspan.optim.groups

    def __init__(
        self,
        width: int,
        states: int = 32,
        bidirectional: bool = True,
        start: Literal["hippo", "random"] = "hippo",
        steps: tuple[float, float] = (1e-3, 1e-1),
    ) -> None:
        super().__init__()
        if min(width, states) < 1 or not 0 < steps[0] <= steps[1] < math.inf or start not in ("hippo", "random"):
            raise UserError(
                f"StateSpace width={width} and states={states} must be at least 1, start={start!r} hippo or random, "
                f"and steps={list(steps)} two numbers above 0, the smaller one first"
            )
        self.bidirectional = bidirectional
        if start == "hippo":
            step_D1 = torch.linspace(math.log(steps[0]), math.log(steps[1]), width).exp()[:, None]
            decay_DN, angle_DN = (step_D1 / 2).expand(-1, states), step_D1 * math.pi * torch.arange(states)
            rate_DN = torch.complex(decay_DN, -angle_DN)
            scale_DN = -torch.expm1(-rate_DN) / rate_DN * step_D1  # zero-order hold of an input that holds for dt
        else:
            radius_DN = (torch.rand(width, states) * (0.99**2 - 0.5**2) + 0.5**2).sqrt()
            decay_DN, angle_DN = -radius_DN.log(), torch.pi * torch.rand(width, states)
            scale_DN = ((1 - radius_DN.square()) / (2 * states)).sqrt().to(torch.complex64)
        self.log_decay_DN, self.angle_DN = nn.Parameter(decay_DN.log()), nn.Parameter(angle_DN.clone())
        drawn_KDN = torch.randn(1 + bidirectional, width, states, dtype=torch.complex64) * scale_DN
        self.weight_KDN2 = nn.Parameter(torch.view_as_real(drawn_KDN).clone())
        self.skip_D = nn.Parameter(torch.randn(width))

    def dynamics(self) -> tuple[Tensor, Tensor]:
        """(lambda [D N], weights [K D N], K 1 or 2 directions), complex."""
        decay_DN = wide(self.log_decay_DN).exp() + LEAST_DECAY
        weight_KDN2 = wide(self.weight_KDN2)
        return torch.polar((-decay_DN).exp(), wide(self.angle_DN)), torch.view_as_complex(weight_KDN2.contiguous())

    def forward(self, x_BLD: Tensor) -> Tensor:
        with torch.autocast(x_BLD.device.type, enabled=False):
            wide_BLD, (lambda_DN, weight_KDN) = wide(x_BLD), self.dynamics()
            kernels = [kernel(lambda_DN, weight_DN, x_BLD.shape[1]) for weight_DN in weight_KDN]
            y_BLD = convolution(wide_BLD, *kernels) + self.skip_D * wide_BLD
        return y_BLD.to(x_BLD.dtype)

    def read(self, x_BLD: Tensor, state_BDN: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A piece of sequences that arrive over time, of any length: (y [B L D], the state for the next piece).

        Raises: UserError for a layer that also reads what follows.
        """
        if self.bidirectional:
            raise UserError("a bidirectional StateSpace needs whole sequences; set bidirectional=False")
        with torch.autocast(x_BLD.device.type, enabled=False):
            wide_BLD, (lambda_DN, weight_KDN) = wide(x_BLD), self.dynamics()
            y_BLD, state_BDN = scan(wide_BLD, lambda_DN, weight_KDN[0], state_BDN)
            y_BLD = y_BLD + self.skip_D * wide_BLD
        return y_BLD.to(x_BLD.dtype), state_BDN
