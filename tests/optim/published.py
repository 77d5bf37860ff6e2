"""Published optimisers as slow references: one weight, float64, straight from the papers' equations.

They share no code with the package, so that a test which compares the two compares with the paper. Every reference runs
one step per entry of `gradients` and takes weights of any orientation. The shorter side is compressed, the columns of a
square matrix; all equations below are written for a tall matrix, so the papers' left projections P are transposed:
R = G Q with Q = P^T [N R]. Steps count from 0 in `refreshes` and from 1 in the formulas.

Shapes: M rows (longer side), N columns (shorter side), R rank; weights and gradients [M N] or [N M].

Arguments that mean the same everywhere:
    lr: one rate, or one per step. weight_decay: decoupled, W <- (1 - lr * weight_decay) W before the step.
    alpha: the papers' scale factor, a second learning rate of the projected matrices.
    frames: Q_t [N R] of every step, one entry per gradient.
    refreshes: the steps (0-based, 0 among them) at which a new frame is chosen; `range(0, steps, gap)` in most papers.
"""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Rate = float | Sequence[float]
Betas = tuple[float, float]


class Run(NamedTuple):
    """A reference that is more than its last weight. Lists have one entry per step, in the tall orientation.

    frames: Q_t [N R]. moments: (m_t, v_t) [M R], empty without Adam. buffers: the full-size state after the step, which
    is the error E [M N] of error feedback or the momentum M [M N] of Trion; empty if there is none.
    """

    weight: Tensor
    frames: list[Tensor]
    moments: list[tuple[Tensor, Tensor]]
    buffers: list[Tensor]


def tall(matrix: Tensor) -> Tensor:
    """In float64, with the longer side as rows."""
    matrix = matrix.detach().double()
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def as_given(result: Tensor, weight: Tensor) -> Tensor:
    return result if weight.shape[0] >= weight.shape[1] else result.T


def rates(lr: Rate, steps: int) -> Sequence[float]:
    return [lr] * steps if isinstance(lr, float | int) else lr


def adam(m: Tensor, v: Tensor, g: Tensor, t: int, betas: Betas, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """m, v and the direction after step t = 1, 2, ... of Kingma & Ba 2015, algorithm 1."""
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
    m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    return m, v, m_hat / (v_hat.sqrt() + eps)


def row_scale(above: Tensor, below: Tensor, outside: Tensor, frame: Tensor, bound: float | None) -> Tensor:
    """|u| / (|r| + 1e-8), with the epsilon of the papers' code. Not in the papers: what is rescaled becomes no longer
    than bound sqrt(N / R) |u|, `bound` times what an isotropic gradient would make of it; None leaves it as published.
    """
    scale = above / (below + 1e-8)
    if bound is None:
        return scale
    longest = bound * math.sqrt(frame.shape[0] / frame.shape[1]) * above
    return torch.where(scale * outside > longest, longest / outside, scale)


def limited(update: Tensor, norm: float, gamma: float | None) -> tuple[Tensor, float]:
    """Norm-growth limiter (Fira, section 4.2) and the norm to measure the next step against: at most gamma times the
    norm of the last step whose update was not zero, itself limited. Before any such step, norm = 0, there is no limit.
    The papers' code counts steps without an update too, and lets the one after such a step be 1e-8 long.
    """
    own = update.norm().item()
    if gamma is None or own == 0 or norm == 0 or own <= gamma * norm:
        return update, own or norm
    return update / own * gamma * norm, gamma * norm


def svd_frames(gradients: Sequence[Tensor], rank: int, refreshes: Collection[int]) -> list[Tensor]:
    """GaLore's frames: the top singular vectors of the shorter side, of the gradient at the last refresh."""
    frames: list[Tensor] = []
    for step, gradient in enumerate(gradients):
        fresh = step in refreshes
        frames.append(torch.linalg.svd(tall(gradient), full_matrices=False).Vh[:rank].T if fresh else frames[-1])
    return frames


def adamw_rotated(
    weight: Tensor, gradients: Sequence[Tensor], frame: Tensor, *,
    lr: Rate, betas: Betas = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
) -> Tensor:  # fmt: skip
    """torch's own AdamW on the coordinates W Q, for one orthogonal Q [N N] of the shorter side."""
    rotated = torch.nn.Parameter(tall(weight) @ frame.double())
    optimizer = torch.optim.AdamW([rotated], betas=betas, eps=eps, weight_decay=weight_decay)
    for gradient, rate in zip(gradients, rates(lr, len(gradients)), strict=True):
        optimizer.param_groups[0]["lr"] = rate
        rotated.grad = tall(gradient) @ frame.double()
        optimizer.step()
    return as_given(rotated.detach() @ frame.double().T, weight)


def galore(
    weight: Tensor, gradients: Sequence[Tensor], frames: Sequence[Tensor], *,
    lr: Rate, alpha: float = 1.0, betas: Betas = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
) -> Tensor:  # fmt: skip
    """GaLore with Adam (Zhao et al. 2024, arXiv 2403.03507, algorithm 2): W <- W - lr alpha N Q^T, where N is Adam's
    direction of R = G Q. Bias correction counts all steps; moments stay as they are when the frame changes.
    """
    return _with_residual(weight, gradients, frames, lr, alpha, betas, eps, weight_decay, None, residual=False)


def fira(
    weight: Tensor, gradients: Sequence[Tensor], frames: Sequence[Tensor], *,
    lr: Rate, alpha: float = 1.0, gamma: float | None = 1.01, bound: float | None = 4.0, inside: float = 1.0,
    betas: Betas = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
) -> Tensor:  # fmt: skip
    """Fira with Adam (Chen et al. 2025, arXiv 2410.01623, algorithm 1): GaLore and the gradient outside the frame,
        phi_i = |N_i| / |R_i|     S = limiter(phi o (G - R Q^T))     W <- W - lr alpha (N Q^T + S)
    with one phi per row (the paper's column, for its wide matrices), by `row_scale`. gamma = None is Fira without
    limiter. The paper's N has epsilon outside the bias correction; that is not done here. The published code has
    alpha = 1 and its own scale factor as `inside`, which multiplies N Q^T and R Q^T.
    """
    rest = (gamma, True, bound, inside)
    return _with_residual(weight, gradients, frames, lr, alpha, betas, eps, weight_decay, *rest)


def _with_residual(
    weight: Tensor, gradients: Sequence[Tensor], frames: Sequence[Tensor], lr: Rate, alpha: float,
    betas: Betas, eps: float, weight_decay: float, gamma: float | None, residual: bool,
    bound: float | None = None, inside: float = 1.0,
) -> Tensor:  # fmt: skip
    w, m, v, norm = tall(weight), torch.zeros(()), torch.zeros(()), 0.0
    steps = zip(gradients, frames, rates(lr, len(gradients)), strict=True)
    for t, (gradient, frame, rate) in enumerate(steps, start=1):
        g, q = tall(gradient), frame.double()
        r = g @ q
        m, v, n = adam(m, v, r, t, betas, eps)
        update = inside * n @ q.T
        if residual:
            left = g - inside * r @ q.T
            phi = row_scale(n.norm(dim=1), r.norm(dim=1), left.norm(dim=1), q, bound)
            s, norm = limited(phi[:, None] * left, norm, gamma)
            update = update + s
        w = (1 - rate * weight_decay) * w - rate * alpha * update
    return as_given(w, weight)


def apollo(
    weight: Tensor, gradients: Sequence[Tensor], projections: Sequence[Tensor], *,
    lr: Rate, alpha: float = 1.0, gamma: float | None = 1.01, bound: float | None = 4.0, tensor_wise: bool = False,
    betas: Betas = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
) -> Tensor:  # fmt: skip
    """APOLLO (Zhu et al. 2025, arXiv 2412.05270, algorithm 1, equations 4 and 5): the raw gradient, scaled by what Adam
    does to its random projection R = G P^T, of which R~ is Adam's direction:
        s_i = |R~_i| / |R_i| per row (one s = |R~| / |R| if tensor_wise)     W <- W - lr alpha limiter(s o G)
    by `row_scale`.
    The limiter works before alpha; with a constant alpha the order makes no difference. Moments stay as they are when P
    is drawn anew. R~ is bias corrected, as in AdamW; equation 5 leaves the correction out.

    Args:
        projections: P_t^T [N R] of every step, not orthonormal: entries N(0, 1/R), drawn anew every T steps.
    """
    w, m, v, norm = tall(weight), torch.zeros(()), torch.zeros(()), 0.0
    steps = zip(gradients, projections, rates(lr, len(gradients)), strict=True)
    for t, (gradient, projection, rate) in enumerate(steps, start=1):
        g = tall(gradient)
        r = g @ projection.double()
        m, v, n = adam(m, v, r, t, betas, eps)
        norms = (x.norm() if tensor_wise else x.norm(dim=1, keepdim=True) for x in (n, r, g))
        update, norm = limited(row_scale(*norms, projection, bound) * g, norm, gamma)
        w = (1 - rate * weight_decay) * w - rate * alpha * update
    return as_given(w, weight)


def apollo_mini(
    weight: Tensor, gradients: Sequence[Tensor], projections: Sequence[Tensor], *,
    lr: Rate, alpha: float = math.sqrt(128), gamma: float | None = 1.01, bound: float | None = 4.0,
    betas: Betas = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
) -> Tensor:  # fmt: skip
    """APOLLO-Mini (same paper, section 4.2): rank 1, one scale for the whole matrix, alpha = sqrt(128)."""
    assert all(projection.shape[1] == 1 for projection in projections)
    return apollo(
        weight, gradients, projections, lr=lr, alpha=alpha, gamma=gamma, bound=bound, tensor_wise=True,
        betas=betas, eps=eps, weight_decay=weight_decay,
    )  # fmt: skip


def rotated_moments(m: Tensor, v: Tensor, overlap: Tensor, t: int, betas: Betas) -> tuple[Tensor, Tensor]:
    """LDAdam's projection-aware moments after t steps, for overlap = Q_old^T Q_new: the mean is rotated, the variance
    v_hat - m_hat^2 by the squares (coordinates count as uncorrelated), and |.| mends a negative result. Not in the
    paper: v stays so large that m / sqrt(v) is no more than Adam's can be, by Cauchy-Schwarz.
    """
    if t == 0:
        return m, v
    m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    v = ((v_hat - m_hat**2) @ overlap**2 + (m_hat @ overlap) ** 2).abs()
    least = (m_hat @ overlap) ** 2 * (1 - betas[1]) * (1 - betas[0] ** 2 / betas[1]) / (1 - betas[0]) ** 2
    v = (1 - betas[1] ** t) * torch.maximum(v, least)
    return m @ overlap, v


def ldadam_frame(a: Tensor, frame: Tensor | None, m_hat: Tensor | None, rank: int, rho: float) -> Tensor:
    """LDAdam's frame for the input A = G + E (tall): one block power iteration QR(B^T B Q) from the frame before, on
    B = rho m_hat Q^T + (1 - rho) A; in the first step the top singular vectors of A.
    """
    if frame is None or m_hat is None:
        return torch.linalg.svd(a, full_matrices=False).Vh[:rank].T
    b = rho * m_hat @ frame.T + (1 - rho) * a
    return torch.linalg.qr(b.T @ (b @ frame)).Q


def ldadam(
    weight: Tensor, gradients: Sequence[Tensor], *,
    lr: Rate, rank: int | None = None, frames: Sequence[Tensor] | None = None, rho: float = 0.908,
    error_feedback: bool = True, betas: Betas = (0.908, 0.99), eps: float = 1e-8, weight_decay: float = 0.0,
) -> Run:  # fmt: skip
    """LDAdam (Robert et al. 2025, arXiv 2410.16103), with its own frames of `rank` or with `frames`:
        A = G + E, a = A Q_t, moments m', v' = rotated_moments of the step before, then Adam on a from m', v',
        E <- A - a Q_t^T + b1 / (1 - b1) (m_{t-1} Q_{t-1}^T - m' Q_t^T)
    The last term returns what the rotation took from the momentum; b1 / (1 - b1) is the sum of the weights with which
    that part would still have entered later steps.
    """
    assert (rank is None) != (frames is None)
    w, q, b1 = tall(weight), None, betas[0]
    m = v = error = torch.zeros((), dtype=torch.float64)
    run = Run(w, [], [], [])
    for step, (gradient, rate) in enumerate(zip(gradients, rates(lr, len(gradients)), strict=True)):
        a, old, lifted = tall(gradient) + error, q, torch.zeros((), dtype=torch.float64)
        if frames is not None:
            q = frames[step].double()
        else:
            assert rank is not None
            q = ldadam_frame(a, old, m / (1 - b1**step) if step else None, rank, rho)
        if old is not None:
            lifted = m @ old.T
            m, v = rotated_moments(m, v, old.T @ q, step, betas)
            lifted = lifted - m @ q.T
        if error_feedback:
            error = a - a @ q @ q.T + b1 / (1 - b1) * lifted
            run.buffers.append(error)
        m, v, n = adam(m, v, a @ q, step + 1, betas, eps)
        w = (1 - rate * weight_decay) * w - rate * n @ q.T
        run.frames.append(q)
        run.moments.append((m, v))
    return run._replace(weight=as_given(w, weight))


def dct_basis(size: int) -> Tensor:
    """Orthonormal DCT-II basis [N N]: column k is sqrt(2 / N) cos(pi k (2 j + 1) / (2 N)), the first by sqrt(1 / 2)."""
    j, k = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    basis = (2 / size) ** 0.5 * torch.cos(torch.pi * (k * (2 * j + 1)).double() / (2 * size))
    basis[:, 0] *= 0.5**0.5
    return basis


def selected(a: Tensor, basis: Tensor, rank: int, norm: int) -> Tensor:
    """Indices, ascending, of the `rank` columns of the basis with the largest l1 or l2 norm of A Q."""
    return (a @ basis).norm(p=norm, dim=0).topk(rank).indices.sort().values


def dct_adamw(
    weight: Tensor, gradients: Sequence[Tensor], basis: Tensor, *,
    lr: Rate, rank: int, refreshes: Collection[int], rotate: bool = True, error_feedback: bool = True, norm: int = 1,
    betas: Betas = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
) -> Run:  # fmt: skip
    """DCT-AdamW (Modoranu et al. 2025, arXiv 2505.17967): Adam on `rank` columns Q_I of one orthogonal basis [N N].
        A = G + E, at a refresh new I by `selected`, a = A Q_I, E <- A - a Q_I^T,
        at a refresh T = Q_Iprev^T Q_I and m <- m T, v <- |v T|, then Adam on a with the bias correction of all steps
    The paper refreshes in its first and every T_u-th step, counted from 1: {0} | {s : (s + 1) % T_u == 0}.
    """
    assert 0 in refreshes
    w, q = tall(weight), torch.zeros(())
    m = v = error = torch.zeros((), dtype=torch.float64)
    run = Run(w, [], [], [])
    for step, (gradient, rate) in enumerate(zip(gradients, rates(lr, len(gradients)), strict=True)):
        w = (1 - rate * weight_decay) * w
        a, old = tall(gradient) + error, q
        if step in refreshes:
            q = basis.double()[:, selected(a, basis.double(), rank, norm)]
        if error_feedback:
            error = a - a @ q @ q.T
            run.buffers.append(error)
        if step in refreshes and step > 0 and rotate:
            overlap = old.T @ q
            m, v = m @ overlap, (v @ overlap).abs()
        m, v, n = adam(m, v, a @ q, step + 1, betas, eps)
        w = w - rate * n @ q.T
        run.frames.append(q)
        run.moments.append((m, v))
    return run._replace(weight=as_given(w, weight))


def newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    """U V^T of the SVD U S V^T, roughly, by the quintic iteration of Muon (Jordan et al. 2024) in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def trion_scale(shape: torch.Size, scale: str | None) -> float:
    """Factor of an orthogonalised update of a weight with this shape (as given, not made tall)."""
    rows, columns = shape
    if scale == "kj":
        return math.sqrt(max(1.0, rows / columns))
    if scale == "kimi":
        return 0.2 * math.sqrt(max(rows, columns))
    if scale == "dion":
        return math.sqrt(rows / columns)
    assert scale is None
    return 1.0


def trion(
    weight: Tensor, gradients: Sequence[Tensor], basis: Tensor, *,
    lr: Rate, rank: int, refreshes: Collection[int] | None = None, mu: float = 0.95, norm: int = 1,
    scale: str | None = "kj", weight_decay: float = 0.0,
) -> Run:  # fmt: skip
    """Trion (Modoranu et al. 2025, arXiv 2505.17967): Dion with selected columns for its power iteration.
    B = M + G, I by `selected` in every step (or at `refreshes`), b = B Q_I,
    M <- B - (1 - mu) b Q_I^T, W <- W - lr c newton_schulz(b) Q_I^T
    """
    assert refreshes is None or 0 in refreshes
    w, q = tall(weight), torch.zeros(())
    momentum = torch.zeros((), dtype=torch.float64)
    run = Run(w, [], [], [])
    for step, (gradient, rate) in enumerate(zip(gradients, rates(lr, len(gradients)), strict=True)):
        accumulated = momentum + tall(gradient)
        if refreshes is None or step in refreshes:
            q = basis.double()[:, selected(accumulated, basis.double(), rank, norm)]
        momentum = accumulated - (1 - mu) * accumulated @ q @ q.T
        update = trion_scale(weight.shape, scale) * newton_schulz(accumulated @ q) @ q.T
        w = (1 - rate * weight_decay) * w - rate * update
        run.frames.append(q)
        run.buffers.append(momentum)
    return run._replace(weight=as_given(w, weight))
