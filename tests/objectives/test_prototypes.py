"""Self-distillation on prototypes: against numpy, by hand, and over ranks."""

from pathlib import Path

import numpy as np
import pytest
import rank_processes
import torch
import torch.distributed as dist
from scipy.optimize import minimize
from scipy.special import logsumexp
from torch import Tensor

from lightspan.core.distributed import end_process_group
from lightspan.nn.teachers.centring import Centre
from lightspan.objectives.prototypes import centred_softmax, cross_view_loss, prototype_cross_entropy, sinkhorn


def scores(rows: int = 7, prototypes: int = 5) -> Tensor:
    return torch.randn(rows, prototypes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def swav(scores_BK: Tensor, temperature: float, iterations: int) -> Tensor:
    """The published pseudo-code (SwAV, appendix A): exponentials, rows and columns in turn."""
    q = np.exp(scores_BK.numpy() / temperature).T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True) * len(q)
        q /= q.sum(axis=0, keepdims=True) * q.shape[1]
    return torch.from_numpy(q.T * q.shape[1])


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_is_the_published_one(iterations: int) -> None:
    torch.testing.assert_close(sinkhorn(scores(), 0.3, iterations), swav(scores(), 0.3, iterations))


def test_rows_are_distributions_and_prototypes_are_used_equally_in_the_limit() -> None:
    q_BK = sinkhorn(scores(10, 5), 0.5, iterations=200)
    torch.testing.assert_close(q_BK.sum(dim=1), torch.ones(10).double())
    torch.testing.assert_close(q_BK.sum(dim=0), torch.full((5,), 2.0).double())


def test_in_the_limit_codes_are_those_of_entropic_transport() -> None:
    """max <Q, S> + eps H(Q) with equal shares, by its dual in the prototypes' prices, which knows no iterations."""
    given, temperature = scores(20, 6).numpy(), 0.5

    def dual(price_K: np.ndarray) -> float:
        return temperature * logsumexp((given - price_K) / temperature, axis=1).mean() + price_K.mean()

    found = minimize(dual, np.zeros(6), method="BFGS", options={"gtol": 1e-9})
    expected = torch.from_numpy(given - found.x).div(temperature).softmax(dim=1)
    torch.testing.assert_close(sinkhorn(scores(20, 6), temperature, iterations=200), expected, rtol=0, atol=1e-5)


def test_scores_that_would_underflow_and_degenerate_batches_are_finite() -> None:
    far = torch.tensor([[1000.0, 0, 0], [999.0, 0, 0], [1000.0, 0, 1]])
    for given in (far, torch.zeros(4, 3), torch.ones(1, 3), far.bfloat16()):
        q = sinkhorn(given, 0.04)
        assert q.dtype == torch.float32
        assert q.isfinite().all()
        torch.testing.assert_close(q.sum(dim=1), torch.ones(len(q)))
    assert sinkhorn(torch.zeros(0, 3), 0.04).shape == (0, 3)
    torch.testing.assert_close(sinkhorn(torch.zeros(4, 3), 0.04), torch.full((4, 3), 1 / 3))


def test_centring_takes_off_what_all_rows_share() -> None:
    shift = torch.randn(5).double()
    torch.testing.assert_close(
        centred_softmax(scores() + shift, shift, 0.2), (scores() / 0.2).softmax(dim=1), rtol=1e-9, atol=1e-9
    )


def test_cross_entropy_by_hand_with_and_without_weights() -> None:
    target, given = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    rows = [np.log(2), 0.5 * np.log1p(np.exp(-4)) + 0.5 * (4 + np.log1p(np.exp(-4)))]
    assert prototype_cross_entropy(target, given, 0.5).item() == pytest.approx(sum(rows) / 2)
    weighted = prototype_cross_entropy(target, given, 0.5, torch.tensor([1.0, 0.25]))
    assert weighted.item() == pytest.approx((rows[0] + rows[1] / 4) / 2)
    of_images = prototype_cross_entropy(target, given, 0.5, torch.tensor([1.0, 0.25]), 5)
    assert of_images.item() == pytest.approx((rows[0] + rows[1] / 4) / 5)


def test_the_cross_view_loss_is_the_mean_over_pairs_of_different_views() -> None:
    targets = torch.stack([scores().softmax(dim=1), scores().flip(0).softmax(dim=1)])
    views = torch.stack([scores(), scores().sin(), scores().cos(), scores().flip(1)]).requires_grad_()
    pairs = [
        prototype_cross_entropy(targets[g], views[v], 0.1) for g in range(len(targets)) for v in range(4) if g != v
    ]
    loss = cross_view_loss(targets, views, 0.1)
    torch.testing.assert_close(loss, torch.stack(pairs).mean())
    swapped = cross_view_loss(targets.flip(0), views[[1, 0, 3, 2]], 0.1)
    torch.testing.assert_close(swapped, loss)
    assert cross_view_loss(targets[:1], views[:1], 0.1).item() == 0
    assert torch.autograd.gradcheck(lambda given: cross_view_loss(targets[:, :2], given, 0.5), views[:, :2])


def one_rank(index: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2)
    own, centre = (scores()[:5], scores()[5:])[index], Centre(5)
    centre.see(own)
    centre.follow()
    alone = sinkhorn(scores()[: 7 * index], 0.3)  # all rows on one rank
    torch.save({"q": sinkhorn(own, 0.3), "alone": alone, "centre": centre()}, Path(folder, f"{index}.pt"))
    end_process_group()


@pytest.mark.ranks
def test_targets_and_centres_of_ranks_are_those_of_one_process(tmp_path: Path) -> None:
    rank_processes.start(one_rank, 2, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{index}.pt", weights_only=True) for index in range(2))
    torch.testing.assert_close(torch.cat([first["q"], second["q"]]), sinkhorn(scores(), 0.3), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(second["alone"], sinkhorn(scores(), 0.3), rtol=1e-12, atol=1e-15)
    assert first["alone"].shape == (0, 5)
    centre = Centre(5)
    centre.see(scores())
    centre.follow()
    torch.testing.assert_close(first["centre"], centre())
    assert torch.equal(first["centre"], second["centre"])
