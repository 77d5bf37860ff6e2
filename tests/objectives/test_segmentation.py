import numpy as np
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from lightspan.objectives.segmentation import deep_supervision, dice_and_cross_entropy, dice_loss, voxel_cross_entropy


def drawn(*sides: int, classes: int = 3, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, *sides, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (rows, *sides), generator=generator)


def test_both_are_their_formulas_voxel_by_voxel() -> None:
    logits, label = drawn(3, 2, 4)
    losses, nats = [], []
    for row, truth in zip(logits.softmax(dim=1), label, strict=True):
        for number, p in enumerate(row):
            t = (truth == number).double()
            losses.append(1 - (2 * (p * t).sum() + 1e-5) / (p.sum() + t.sum() + 1e-5))
        nats += [-row[(truth[at], *at)].log() for at in np.ndindex(*truth.shape)]
    found = dice_and_cross_entropy(logits, label)
    torch.testing.assert_close(found["dice"], torch.stack(losses).mean())
    torch.testing.assert_close(found["nats"], torch.stack(nats).mean())


def test_a_sure_and_right_answer_costs_nothing_and_a_sure_wrong_one_all() -> None:
    _, label = drawn(4, 4)
    sure = 1e3 * F.one_hot(label, 3).movedim(-1, 1).float()
    assert dice_loss(sure, label) < 1e-5
    assert voxel_cross_entropy(sure, label) == 0
    assert dice_loss(sure, (label + 1) % 3) > 1 - 1e-4


def test_voxels_without_a_label_and_samples_without_any_are_left_out() -> None:
    logits, label = drawn(4, 4)
    label[0, :2], label[1] = -1, -1
    found = dice_and_cross_entropy(logits, label)
    cut = dice_and_cross_entropy(logits[:1, :, 2:], label[:1, 2:])
    for name, loss in found.items():
        torch.testing.assert_close(loss, cut[name])
    nothing = dice_and_cross_entropy(logits.requires_grad_(), torch.full_like(label, -1))
    assert nothing == {"dice": 0, "nats": 0}
    sum(nothing.values()).backward()  # type: ignore[union-attr]
    assert logits.grad is not None
    assert not logits.grad.any()


def test_gradients_are_those_of_differences_and_half_precision_is_finite() -> None:
    logits, label = drawn(2, 3)
    assert gradcheck(lambda x: sum(dice_and_cross_entropy(x, label).values()), (logits.requires_grad_(),))
    half = logits.detach().bfloat16().requires_grad_()
    loss = sum(dice_and_cross_entropy(half, label).values())
    loss.backward()  # type: ignore[union-attr]
    assert half.grad is not None
    assert half.grad.isfinite().all()


def test_coarse_guesses_are_enlarged_and_all_scales_weigh_the_same() -> None:
    for sides in ((8,), (8, 4), (8, 4, 4)):
        logits, label = drawn(*sides)
        coarse = logits[(..., *(slice(None, None, 2) for _ in sides))]
        large = F.interpolate(coarse, sides, mode={1: "linear", 2: "bilinear", 3: "trilinear"}[len(sides)])
        found = deep_supervision([logits, coarse], label)
        for name, loss in found.items():
            apart = dice_and_cross_entropy(logits, label)[name], dice_and_cross_entropy(large, label)[name]
            torch.testing.assert_close(loss, sum(apart) / 2)
