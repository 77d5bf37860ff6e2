"""SIE: its terms by hand and against VICReg's, what the predictor gets, ranks, and what it refuses."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rank_processes
import torch
import torch.distributed as dist
from method_runs import Pooled, fit
from torch import Tensor, nn

from lightspan.core.distributed import end_process_group
from lightspan.core.errors import UserError
from lightspan.methods.contrastive.sie import SIE, sie_terms
from lightspan.nn.heads.hyper_linear import HyperLinear
from lightspan.nn.heads.projector import Projector
from lightspan.nn.relations import PlaneTurn
from lightspan.objectives.vicreg import vicreg_loss, vicreg_terms


def method(**settings: Any) -> SIE:
    torch.manual_seed(0)
    parts = {
        "backbone": Pooled(),
        "invariant": Projector(3, [6], 4, hidden_norm=False),
        "equivariant": Projector(5, [6], 7, hidden_norm=False),
        "predictor": HyperLinear(2, 7, 7),
        "relation": PlaneTurn(column=0),
    }
    return SIE(**parts | settings, optimizer=partial(torch.optim.SGD, lr=0.02))


def vicreg_alone() -> SIE:
    torch.manual_seed(0)
    parts: dict[str, Any] = {"equivariant": None, "predictor": None, "relation": None}
    return method(invariant=Projector(8, [6], 4, hidden_norm=False), **parts)


def batch(rows: int = 8, seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "views": [torch.randn(rows, 1, 8, 8, generator=generator) for _ in range(2)],
        "parameters": 360 * torch.rand(rows, 2, 1, generator=generator),
        "index": torch.arange(rows),
    }


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(inv_2BI: Tensor, eq_2BE: Tensor, predicted_BE: Tensor) -> list[Tensor]:
    """The card of the paper, line by line."""

    def spread(z: Tensor) -> Tensor:
        return torch.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean() / 2

    def repeated(z: Tensor) -> Tensor:
        covariance = torch.cov(z.T)
        return (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[1]

    z1, z2 = torch.cat([inv_2BI, eq_2BE], dim=2)
    return [
        (inv_2BI[0] - inv_2BI[1]).square().mean(),
        (predicted_BE - eq_2BE[1]).square().mean(),
        spread(z1) + spread(z2) + spread(predicted_BE),
        repeated(z1) + repeated(z2),
    ]


def test_the_terms_are_those_of_the_paper_and_their_gradients_those_of_differences() -> None:
    given = drawn(2, 6, 4), drawn(2, 6, 3, seed=1), 0.5 * drawn(6, 3, seed=2)
    for term, expected in zip(sie_terms(*given), by_hand(*given), strict=True):
        torch.testing.assert_close(term, expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *x: sum(sie_terms(*x)), [x.requires_grad_() for x in given])


def test_halves_that_repeat_each_other_are_penalised_across_the_split() -> None:
    inv = drawn(2, 50, 1)
    apart, repeated = (sie_terms(inv, eq, eq[1]).covariance for eq in (drawn(2, 50, 1, seed=5), inv))
    assert repeated > 10 * apart


def test_no_variance_is_asked_of_features_that_have_it() -> None:
    assert sie_terms(5 * drawn(2, 40, 4), 5 * drawn(2, 40, 3, seed=1), 5 * drawn(40, 3, seed=2)).variance == 0


def test_without_an_equivariant_half_the_loss_is_that_of_vicreg() -> None:
    views = drawn(2, 6, 4)
    assert sie_terms(views)[::2] == vicreg_terms(*views)[:2]
    model, reference, given = vicreg_alone(), vicreg_alone(), batch()
    loss = model.training_step({"views": given["views"], "index": given["index"]}, 0)
    z1, z2 = (reference.invariant(reference.backbone(view)) for view in given["views"])
    expected = vicreg_loss(z1, z2, 10.0, 10.0, 1.0)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_the_step_predicts_the_second_view_from_the_first_with_their_relation_and_no_gradient_stops() -> None:
    model, given = method(equivariance_factor=0.3, invariance_weight=5.0, covariance_weight=2.0), batch()
    logged: dict[str, Any] = {}
    model.log_training = logged.update  # type: ignore[method-assign]
    loss = model.training_step(given, 0)
    f1, f2 = (model.backbone(view) for view in given["views"])
    e1, e2 = model.equivariant(f1[:, 3:]), model.equivariant(f2[:, 3:])  # type: ignore[misc]
    turn = torch.deg2rad(given["parameters"][:, 1, 0] - given["parameters"][:, 0, 0])
    told = torch.stack([turn.cos(), turn.sin()], dim=1)
    predicted = torch.einsum("bk,kij,bj->bi", told, model.predictor.weight, e1)  # type: ignore[union-attr]
    expected = by_hand(
        torch.stack([model.invariant(f1[:, :3]), model.invariant(f2[:, :3])]), torch.stack([e1, e2]), predicted
    )
    torch.testing.assert_close(loss, 5 * expected[0] + 1.5 * expected[1] + 10 * expected[2] + 2 * expected[3])
    torch.testing.assert_close(logged["train/equivariance"], expected[1])
    for view in (e1, e2):
        (gradient,) = torch.autograd.grad(by_hand(torch.zeros(2, 8, 1), torch.stack([e1, e2]), predicted)[1], view,
                                          retain_graph=True)  # fmt: skip
        assert gradient.abs().max() > 0
    assert model.embeddings({"image": given["views"][0]}).shape == (8, 11)


def test_one_row_and_equal_rows_and_half_precision_stay_finite() -> None:
    equal = batch() | {"views": [torch.zeros(8, 1, 8, 8)] * 2}
    for given in (batch(1), equal):
        model = method()
        model.log_training = lambda figures: None  # type: ignore[method-assign]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.training_step(given, 0)
        assert loss.dtype == torch.float32
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        assert loss.isfinite()


def test_training_lowers_the_loss_and_the_prediction_needs_its_relation(tmp_path: Path) -> None:
    model, given = method(), batch(32)
    losses = fit(model, [given] * 30, tmp_path)
    assert losses[-1] < losses[0]
    silent = model.predictor(drawn(4, 7).float(), torch.zeros(4, 2))  # type: ignore[misc]
    assert silent.abs().max() == 0


def gradients(given: dict[str, Any]) -> list[Tensor]:
    """The loss and the gradient of every weight."""
    model = method()
    model.log_training = lambda figures: None  # type: ignore[method-assign]
    loss = model.training_step(given, 0)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def one_rank(rank: int, folder: str) -> None:
    """Five rows on the first rank and three on the second; the gradient that DDP takes is the mean of both."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    rows, whole = (slice(0, 5), slice(5, 8))[rank], batch()
    given = {name: whole[name][rows] for name in ("parameters", "index")}
    found = gradients(given | {"views": [view[rows] for view in whole["views"]]})
    for tensor in found:
        dist.all_reduce(tensor)
        tensor /= 2
    torch.save(found, Path(folder, f"{rank}.pt"))
    end_process_group()


@pytest.mark.ranks
def test_two_ranks_have_the_loss_and_the_gradients_of_one(tmp_path: Path) -> None:
    rank_processes.start(one_rank, 2, str(tmp_path))
    alone = gradients(batch())
    for rank in range(2):
        for one, other in zip(torch.load(tmp_path / f"{rank}.pt", weights_only=True), alone, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_it_cannot_train_is_refused() -> None:
    for name in ("invariance_weight", "variance_weight", "covariance_weight", "equivariance_factor"):
        with pytest.raises(UserError, match=rf"{name}=-1.0.* must be at least 0 and finite"):
            method(**{name: -1.0})
    with pytest.raises(UserError, match=r"invariant.in_features=4 and equivariant.in_features=5 take 9 .* gives 8"):
        method(invariant=Projector(4, [6], 4))
    with pytest.raises(UserError, match="equivariant, predictor and relation together"):
        method(relation=None)
    with pytest.raises(UserError, match=r"predictor.in_features=6, but Projector gives 7"):
        method(predictor=HyperLinear(2, 6, 7))
    with pytest.raises(UserError, match=r"predictor.condition_features=3, but PlaneTurn gives 2"):
        method(predictor=HyperLinear(3, 7, 7))
    with pytest.raises(UserError, match="invariant: Identity has no in_features"):
        method(invariant=nn.Identity())
    given = batch()
    del given["parameters"]
    with pytest.raises(UserError, match=r"SIE needs the parameters of two views .* this batch has none"):
        method().training_step(given, 0)
    with pytest.raises(UserError, match="SIE needs 2 views"):
        method().training_step({"views": batch()["views"][:1]}, 0)
