"""Labels carried through clips, against loops; J and F, against numpy and scipy."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation
from torch import Tensor

from lightspan.evaluation.dense.label_propagation import contour_accuracy, propagated_labels
from lightspan.evaluation.dense.prompt_masks import iou

GRID = (3, 4)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def objects(*shape: int, of: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(of, shape, generator=torch.Generator().manual_seed(seed))


def by_loops(x: Tensor, first: Tensor, context: int, neighbours: int, radius: float, heat: float, whole: bool) -> list:
    """Shares of labels of each frame, of maps as large as the grid."""
    unit = (x / x.norm(dim=2, keepdim=True)).double().numpy()
    shares = [np.eye(int(first.max()) + 1)[first.flatten().numpy()]]
    for frame in range(1, len(unit)):
        carried = []
        for patch in range(12):
            near = []
            for source in sorted({0, *range(max(0, frame - context), frame)}):
                for other in range(12):
                    away = math.dist(divmod(patch, 4), divmod(other, 4))
                    if away < radius or (whole and source == 0):
                        near.append((float(unit[frame, patch] @ unit[source, other]), source, other))
            best = sorted(near, reverse=True)[:neighbours]
            weights = np.exp([similar / heat for similar, _, _ in best])
            carried.append(sum(w * shares[s][o] for w, (_, s, o) in zip(weights, best, strict=True)) / weights.sum())
        shares.append(np.stack(carried))
    return shares


@pytest.mark.parametrize("settings", [(2, 3, 1.5, 0.1, False), (20, 7, 20.0, 0.7, True), (1, 40, 2.0, 1.0, False)])
def test_labels_are_those_of_loops_over_patches(settings: tuple) -> None:
    x, first = normal(5, 12, 6), objects(*GRID)
    found = propagated_labels(x, first, GRID, *settings)
    expected = [share.argmax(axis=1).reshape(GRID) for share in by_loops(x, first, *settings)]
    assert np.array_equal(found.numpy(), np.stack(expected))


def test_what_moves_is_followed_by_features_that_know_it_and_its_number_is_kept() -> None:
    """Stripes of width 4 that move by a patch a frame, numbered 0, 7 and 30."""
    kind = torch.stack([objects(12, of=3).roll(frame) for frame in range(6)])[:, None].expand(-1, 4, -1)
    numbers = torch.tensor([0, 7, 30])[kind]
    maps = numbers.repeat_interleave(4, 1).repeat_interleave(4, 2)
    x = torch.eye(3)[kind.flatten(1)]
    assert torch.equal(propagated_labels(x, numbers[0], (4, 12), neighbours=3), numbers)
    assert torch.equal(propagated_labels(x, maps[0], (4, 12), neighbours=3), maps)
    assert torch.equal(propagated_labels(x.bfloat16(), numbers[0], (4, 12), neighbours=3), numbers)
    assert torch.equal(propagated_labels(x[:1], numbers[0], (4, 12)), numbers[:1])


def contour_by_scipy(a: np.ndarray, b: np.ndarray, reach: int) -> float:
    """The F-measure of DAVIS's code."""

    def outline(mask: np.ndarray) -> np.ndarray:
        wide = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
        return (mask != wide[1:, :-1]) | (mask != wide[:-1, 1:]) | (mask != wide[1:, 1:])

    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    lines = [outline(a), outline(b)]
    near = [binary_dilation(line, x**2 + y**2 <= reach**2) if line.any() else line for line in lines]
    shares = [
        (line & other).sum() / line.sum() if line.any() else 1.0 for line, other in zip(lines, near[::-1], strict=True)
    ]
    return 2 * shares[0] * shares[1] / sum(shares) if sum(shares) else 0.0


def test_region_and_contour_are_those_of_numpy_and_scipy() -> None:
    smooth = torch.nn.functional.avg_pool2d(normal(2, 30, 36, 54), 5, 1, 2)
    masks = smooth > torch.linspace(-0.4, 0.8, 30)[:, None, None]
    masks[0, 3], masks[1, 3:5], masks[:, 6], masks[:, 7] = False, False, False, True
    for tolerance, reach in ((0.008, 1), (0.06, 4)):
        found = contour_accuracy(*masks, tolerance)
        expected = [contour_by_scipy(a.numpy(), b.numpy(), reach) for a, b in zip(*masks, strict=True)]
        assert found.tolist() == pytest.approx(expected, rel=1e-12)
    a, b = masks.numpy()
    either = (a | b).sum(axis=(1, 2))
    expected = np.where(either, (a & b).sum(axis=(1, 2)) / np.maximum(either, 1), 1.0)
    assert iou(*masks).numpy() == pytest.approx(expected, rel=1e-12)
    assert iou(*masks)[6] == contour_accuracy(*masks)[6] == 1
    assert contour_accuracy(masks[0], masks[0]).tolist() == [1.0] * 30
