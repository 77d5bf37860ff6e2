"""Selective state-space layers: a linear recurrence whose coefficients each step chooses by its own input.

Source: Gu, Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (S6), 2023, arXiv 2312.00752,
algorithm 2 and section 3.6. Of each channel with input u, of N states h_n and step size Delta_t:

    h_t = exp(Delta_t A) h_(t-1) + Delta_t B_t u_t        y_t = <C_t, h_t> + D u_t

where Delta_t > 0, B_t and C_t are functions of all channels of step t, and A < 0 and D are weights. A = -1 ... -N and
Delta in [1e-3, 1e-1] at the start (section 3.6 and appendix D; S4D-Real, arXiv 2206.11893).
The recurrence takes 2 log2(L) rounds and 3 L products, over pairs of steps, then pairs of pairs (Blelloch, "Prefix Sums
and Their Applications", 1990). Nothing is divided, so decays that underflow do no harm.
Shapes: B sequences, K sets of weights, L steps, D channels, N states of each, S numbers of a state, R rank of Delta.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightspan.core.devices import wide
from lightspan.core.errors import UserError

CHUNK = 1024
"""Steps of which all N states are in memory at a time."""


def linear_recurrence(a_LS: Tensor, x_LS: Tensor) -> Tensor:
    """h_t = a_t h_(t-1) + x_t with h_(-1) = 0: [... L S], of coefficients of the same shape."""
    return _Recurrence.apply(a_LS, x_LS)


class _Recurrence(torch.autograd.Function):
    """Keeps a and h alone: the gradient by x is the same recurrence from the other end, g_t + a_(t+1) (...)_(t+1)."""

    @staticmethod
    def forward(ctx, a_LS: Tensor, x_LS: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        h_LS = _in_pairs(a_LS, x_LS)
        ctx.save_for_backward(a_LS, h_LS)
        return h_LS

    @staticmethod
    def backward(ctx, g_LS: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        a_LS, h_LS = ctx.saved_tensors
        by_x_LS = linear_recurrence(_delayed(a_LS.flip(-2)), g_LS.flip(-2)).flip(-2)
        return by_x_LS * _delayed(h_LS), by_x_LS


def _delayed(x_LS: Tensor) -> Tensor:
    """A step later, behind a zero."""
    return F.pad(x_LS[..., :-1, :], (0, 0, 1, 0)) if x_LS.shape[-2] else x_LS


def _in_pairs(a_LS: Tensor, x_LS: Tensor) -> Tensor:
    """h after every second step is the recurrence of pairs of steps, and between them it takes one step more."""
    if x_LS.shape[-2] < 2:
        return x_LS.clone()
    pairs = x_LS.shape[-2] // 2
    a_early, x_early = a_LS[..., 0 : 2 * pairs : 2, :], x_LS[..., 0 : 2 * pairs : 2, :]
    a_late, x_late = a_LS[..., 1::2, :], x_LS[..., 1::2, :]
    h_late = _in_pairs(a_late * a_early, torch.addcmul(x_late, a_late, x_early))
    h_LS = torch.empty_like(x_LS)
    h_LS[..., 1::2, :] = h_late
    h_LS[..., 0, :] = x_LS[..., 0, :]
    a_next, x_next = a_LS[..., 2::2, :], x_LS[..., 2::2, :]
    h_LS[..., 2::2, :] = torch.addcmul(x_next, a_next, h_late[..., : a_next.shape[-2], :])
    return h_LS


def selective_scan(
    u_BKLD: Tensor,
    delta_BKLD: Tensor,
    A_KDN: Tensor,
    B_BKLN: Tensor,
    C_BKLN: Tensor,
    state_BKDN: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """(y [B K L D], <C, h> without D u; the state after the last step, [B K D N]).

    Of more steps than `chunk` the states of one chunk are in memory at a time, also backwards, where they are computed
    again.

    Args:
        delta_BKLD: >= 0.
        A_KDN: <= 0, at which the recurrence cannot grow.
        state_BKDN: that before the first step; None is zeros.
        chunk: >= 1; L is at least 1.
    """
    found, parts = [], [each.split(chunk, dim=2) for each in (u_BKLD, delta_BKLD, B_BKLN, C_BKLN)]
    for given in zip(*parts, strict=True):
        if len(parts[0]) == 1:
            return _chunk_scan(A_KDN, state_BKDN, *given)
        y_BKLD, state_BKDN = checkpoint(
            _chunk_scan, A_KDN, state_BKDN, *given, use_reentrant=False, preserve_rng_state=False
        )
        found.append(y_BKLD)
    assert state_BKDN is not None
    return torch.cat(found, dim=2), state_BKDN


def _chunk_scan(
    A_KDN: Tensor, state_BKDN: Tensor | None, u_BKLD: Tensor, delta_BKLD: Tensor, B_BKLN: Tensor, C_BKLN: Tensor
) -> tuple[Tensor, Tensor]:
    a_BKLDN = (delta_BKLD[..., None] * A_KDN[:, None]).exp()
    x_BKLDN = (delta_BKLD * u_BKLD)[..., None] * B_BKLN[..., None, :]
    if state_BKDN is not None:
        first_BK1DN = x_BKLDN[:, :, :1] + a_BKLDN[:, :, :1] * state_BKDN[:, :, None]
        x_BKLDN = torch.cat([first_BK1DN, x_BKLDN[:, :, 1:]], dim=2)
    h_BKLDN = linear_recurrence(a_BKLDN.flatten(3), x_BKLDN.flatten(3)).unflatten(3, A_KDN.shape[1:])
    return torch.einsum("bkldn,bkln->bkld", h_BKLDN, C_BKLN), h_BKLDN[:, :, -1]


class SelectiveScan(nn.Module):
    """K sets of weights, each for sequences of its own: [B K L D] -> [B K L D], in float32 or wider whatever the type
    of x. Decays, skips and biases do not decay, and no optimiser projects them.

    Args:
        width: D.
        copies: K.
        states: N.
        rank: R of Delta; None is D / 16, rounded up.
        steps: Delta at the start, from the least to the greatest, above 0, spread evenly in the logarithm.
    Raises: UserError for sizes below 1, or steps that are no range above 0.
    """

    parameter_kinds = {"log_decay_KDN": "vectors", "skip_KD": "vectors", "delta_bias_KD": "vectors"}  # noqa: RUF012 - read by lightspan.optim.groups

    def __init__(
        self,
        width: int,
        copies: int = 1,
        states: int = 16,
        rank: int | None = None,
        steps: tuple[float, float] = (1e-3, 1e-1),
    ) -> None:
        super().__init__()
        rank = -(-width // 16) if rank is None else rank
        if min(width, copies, states, rank) < 1 or not 0 < steps[0] <= steps[1] < math.inf:
            raise UserError(
                f"SelectiveScan width={width}, copies={copies}, states={states} and rank={rank} must be at least 1, "
                f"and steps={[*steps]} two numbers above 0, the smaller one first"
            )
        self.sizes = [rank, states, states]
        self.choice_KED = nn.Parameter(torch.empty(copies, sum(self.sizes), width).uniform_(-1, 1) * width**-0.5)
        self.delta_KDR = nn.Parameter(torch.empty(copies, width, rank).uniform_(-1, 1) * rank**-0.5)
        delta_KD = torch.empty(copies, width).uniform_(*map(math.log, steps)).exp().clamp_min(1e-4)
        self.delta_bias_KD = nn.Parameter(delta_KD + torch.log(-torch.expm1(-delta_KD)))  # softplus gives delta
        self.log_decay_KDN = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(copies, width, 1))
        self.skip_KD = nn.Parameter(torch.ones(copies, width))

    def forward(self, x_BKLD: Tensor) -> Tensor:
        with torch.autocast(x_BKLD.device.type, enabled=False):
            u_BKLD = wide(x_BKLD)
            choice_KED, delta_KDR, bias_KD, log_decay_KDN, skip_KD = map(
                wide, (self.choice_KED, self.delta_KDR, self.delta_bias_KD, self.log_decay_KDN, self.skip_KD)
            )
            chosen = (u_BKLD @ choice_KED.mT).split(self.sizes, dim=3)
            delta_BKLD = F.softplus(chosen[0] @ delta_KDR.mT + bias_KD[:, None])
            y_BKLD, _ = selective_scan(u_BKLD, delta_BKLD, -log_decay_KDN.exp(), *chosen[1:])
            return y_BKLD + skip_KD[:, None] * u_BKLD
