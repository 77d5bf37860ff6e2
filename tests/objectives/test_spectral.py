"""The spectral contrastive loss: the matrix that it factorises, its plain sums, and what gradient descent keeps."""

import pytest
import torch
from torch import Tensor

from lightspan.objectives.spectral import spectral_contrastive


def rows(count: int = 7, width: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_is_the_sum_over_all_pairs() -> None:
    z1, z2 = rows(), rows(seed=1)
    alike = sum(z1[n] @ z2[n] for n in range(7)) / 7
    apart = sum((z1[n] @ z2[m]) ** 2 for n in range(7) for m in range(7)) / 49
    torch.testing.assert_close(spectral_contrastive(z1, z2), -2 * alike + apart)


def test_it_factorises_the_graph_of_augmentations_up_to_a_constant() -> None:
    """Of 5 augmented images that occur as pairs (x, y) and (y, x) with these counts: L = |A - F F'|^2 - |A|^2, where
    A_xy = w_xy / sqrt(w_x w_y) and F_x = sqrt(w_x) f(x) (HaoChen et al., lemma 3.2).
    """
    generator = torch.Generator().manual_seed(2)
    counts = torch.randint(0, 4, (5, 5), generator=generator)
    counts = counts + counts.T + torch.eye(5, dtype=torch.int64)
    joint = counts.double() / counts.sum()
    margin = joint.sum(dim=1)
    graph = joint / (margin[:, None] * margin).sqrt()
    pairs = torch.tensor([(x, y) for x in range(5) for y in range(5) for _ in range(int(counts[x, y]))])
    for seed in range(3):
        f = rows(5, 3, seed)
        scaled = margin.sqrt()[:, None] * f
        expected = (graph - scaled @ scaled.T).square().sum() - graph.square().sum()
        torch.testing.assert_close(spectral_contrastive(f[pairs[:, 0]], f[pairs[:, 1]]), expected)


def test_gradients_are_those_of_the_numbers() -> None:
    assert torch.autograd.gradcheck(spectral_contrastive, (rows().requires_grad_(), rows(seed=1).requires_grad_()))


def test_views_and_images_have_no_order() -> None:
    z1, z2 = rows(), rows(seed=1)
    loss, order = spectral_contrastive(z1, z2), torch.tensor([3, 1, 0, 6, 5, 2, 4])
    torch.testing.assert_close(spectral_contrastive(z2, z1), loss)
    torch.testing.assert_close(spectral_contrastive(z1[order], z2[order]), loss)


@pytest.mark.parametrize("seed", [0, 1])
def test_plain_descent_of_two_linear_layers_keeps_them_balanced_and_the_head_squares_singular_values(seed: int) -> None:
    """arXiv 2403.11391, section 4: features of strengths 0.5 to 1.5 in 8 dimensions, small balanced weights."""
    torch.manual_seed(seed)
    strength = torch.linspace(0.5, 1.5, 4, dtype=torch.float64)
    signal = torch.randn(200, 4, dtype=torch.float64).sign() * strength
    x1, x2 = (torch.cat([signal, signal * 0], 1) + 0.1 * torch.randn(200, 8, dtype=torch.float64) for _ in range(2))
    w1 = 0.3 * torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    w2 = 0.3 * torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    weights = [w.clone().requires_grad_() for w in (w1, w2)]  # both Gram matrices are 0.09 I
    for _ in range(600):
        first, second = weights
        loss = spectral_contrastive(x1 @ first.T @ second.T, x2 @ first.T @ second.T)
        with torch.no_grad():
            for w, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                w -= 1e-2 * gradient
    first, second = (w.detach() for w in weights)
    assert float((first @ first.T - second.T @ second).abs().max()) < 1e-3
    before, behind = torch.linalg.svdvals(first), torch.linalg.svdvals(second @ first)
    torch.testing.assert_close(before.square(), behind, rtol=0, atol=1e-3)
    assert float(behind[0]) > 10 * float(behind[-1])  # they have moved from equal ones
