"""Classifier alignment: its loss by hand, and its head by a loop with gradients and momentum written out."""

import math

import numpy as np
import pytest
import torch

from lightspan.core.noise import mixed_seed
from lightspan.evaluation.gaussians.class_gaussians import ClassGaussians
from lightspan.evaluation.gaussians.classifier_alignment import ClassifierAlignment, aligned_cross_entropy
from lightspan.evaluation.geometry.moments import Moments


def test_scaling_all_logits_leaves_the_loss_and_each_task_weighs_by_its_own_length() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BC, label_B = torch.randn(6, 5, generator=generator).double(), torch.tensor([0, 1, 2, 3, 4, 0])
    task_C = torch.tensor([0, 1, 0, 1, 1])
    loss = aligned_cross_entropy(logits_BC, label_B, task_C, 0.1)
    for factor in (1e-6, 0.3, 1e5):
        torch.testing.assert_close(aligned_cross_entropy(factor * logits_BC, label_B, task_C, 0.1), loss)
    parts = [np.linalg.norm(logits_BC[:, task_C == t].numpy(), axis=1) for t in (0, 1)]
    z = logits_BC.numpy() / (0.1 * (parts[0] + parts[1])[:, None] / 2)
    by_hand = np.mean([np.log(np.exp(row).sum()) - row[y] for row, y in zip(z, label_B.tolist(), strict=True)])
    assert float(loss) == pytest.approx(by_hand)


def test_logits_of_zero_have_a_finite_loss_and_gradient() -> None:
    logits_BC = torch.zeros(2, 3, requires_grad=True)
    aligned_cross_entropy(logits_BC, torch.tensor([0, 2]), torch.tensor([0, 0, 1]), 0.1).backward()
    assert logits_BC.grad is not None
    assert logits_BC.grad.isfinite().all()
    half = torch.randn(2, 3, dtype=torch.bfloat16)
    assert aligned_cross_entropy(half, torch.tensor([0, 2]), torch.tensor([0, 0, 1]), 0.1).dtype == torch.float32


def gaussians(known: tuple[int, ...] = (0, 1, 3, 4)) -> ClassGaussians:
    found, generator = ClassGaussians(6, 3).double(), torch.Generator().manual_seed(0)
    for number in known:
        found.learn(number, Moments.of(number + torch.randn(20, 3, generator=generator).double()))
    return found


TASK_C = torch.tensor([1, 0, 2, 0, 1, 2])  # classes 2 and 5 have not come yet
SETTINGS = ClassifierAlignment(epochs=3, samples=8, lr=0.02, decay=0.1, temperature=0.5, shrink=0.6, seed=4)


def loss_of_numpy(weight: np.ndarray, x: np.ndarray, label: np.ndarray, task: np.ndarray) -> float:
    """Of rows with a last feature of 1, whose weight is the bias."""
    z = x @ weight.T
    length = np.mean([np.linalg.norm(z[:, task == t], axis=1) for t in np.unique(task)], axis=0)
    z = z / (0.5 * length[:, None])
    return float((np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), label]).mean())


def test_the_head_is_that_of_momentum_with_decay_on_a_half_cosine_over_all_classes_so_far() -> None:
    head = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).double()
    seen, found = [0, 1, 3, 4], gaussians()
    weight, momentum = head[seen].numpy().copy(), np.zeros((4, 4))
    label, task = np.repeat(np.arange(4), 8), TASK_C[seen].numpy()
    for epoch in range(3):
        drawn = [found.sample(c, 8, (4, 1, epoch), 0.6 + 0.4 * (int(TASK_C[c]) + 1) / 2) for c in seen]
        x = np.concatenate([torch.cat(drawn).numpy(), np.ones((32, 1))], axis=1)
        shuffle = torch.Generator().manual_seed(int(mixed_seed(torch.tensor(-1), 4, 1, epoch)))
        for rows in torch.randperm(32, generator=shuffle).numpy().reshape(4, 8):
            slope = np.zeros_like(weight)
            for at in np.ndindex(*weight.shape):
                step = np.zeros_like(weight)
                step[at] = 1e-6
                ends = [loss_of_numpy(weight + sign * step, x[rows], label[rows], task) for sign in (1, -1)]
                slope[at] = (ends[0] - ends[1]) / 2e-6
            momentum = 0.9 * momentum + slope + 0.1 * weight
            weight = weight - 0.02 * (1 + math.cos(math.pi * epoch / 3)) / 2 * momentum
    classes, *parts = SETTINGS.rows(head[:, :3], head[:, 3], found, TASK_C, 1)
    assert classes.tolist() == seen
    np.testing.assert_allclose(torch.cat([parts[0], parts[1][:, None]], dim=1).numpy(), weight, rtol=1e-6, atol=1e-7)


def test_what_is_given_stays_and_no_epoch_and_classes_without_a_gaussian_leave_rows_as_they_are() -> None:
    head = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    before = head.detach().clone()
    for how, known in ((ClassifierAlignment(epochs=0), gaussians()), (SETTINGS, gaussians(()))):
        _, weight, bias = how.rows(head[:, :3], head[:, 3], known, TASK_C, 1)
        assert torch.equal(weight, before[[0, 1, 3, 4], :3])
        assert torch.equal(bias, before[[0, 1, 3, 4], 3])
    half = head[:, :3].bfloat16(), head[:, 3].bfloat16()
    seen_C, *parts = SETTINGS.rows(*half, gaussians((0, 1, 4)).bfloat16(), TASK_C, 1)
    assert seen_C.tolist() == [0, 1, 3, 4]
    for part in parts:
        assert part.dtype == torch.float32
        assert part.isfinite().all()
    assert torch.equal(head, before)
    assert head.grad is None
