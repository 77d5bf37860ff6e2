"""SupReMix: the loss of all views with rounded targets, and what it is without mixtures."""

from functools import partial
from pathlib import Path
from typing import Any

import method_runs
import pytest
import torch

from lightspan.backbones.vision import MLP, SmallConvNet
from lightspan.core.errors import UserError
from lightspan.methods.contrastive.supremix import SupReMix
from lightspan.nn.heads.projector import Projector
from lightspan.objectives.supcon import supcon
from lightspan.objectives.supremix import supremix

PLAIN: dict[str, Any] = {"window": 0.0, "beta": None, "distance_weight": 0.0}


def method(**settings: Any) -> SupReMix:
    torch.manual_seed(0)
    parts = {"backbone": MLP((1, 1, 6), (8,)), "projector": Projector(8, [16], 6)}
    built = SupReMix(**parts | settings, optimizer=partial(torch.optim.SGD, lr=0.05))
    built.log_training = lambda figures: None  # type: ignore[method-assign]
    return built


def batch(rows: int = 8, views: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "views": [torch.randn(rows, 6, generator=generator) for _ in range(views)],
        "target": 3 * torch.rand(rows, generator=generator),
        "index": torch.arange(rows),
    }


def embedded(model: SupReMix, given: dict[str, Any]) -> torch.Tensor:
    return model.projector(model.backbone(torch.cat(given["views"])))


def test_the_loss_is_that_of_all_views_with_targets_in_bins_and_drawn_shares() -> None:
    model, reference, given = method(bin_width=0.5, most_pairs=6), method(), batch()
    loss = model.training_step(given, 0)
    share, start = model.draws(given["index"], 2)
    bins = (given["target"] / 0.5).round().repeat(2)
    expected = supremix(embedded(reference, given), bins, share, 5.0, 1.0, 0.3, 6, start)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_draws_are_functions_of_seed_step_sample_and_view() -> None:
    model, index = method(), torch.arange(4000)
    share, start = model.draws(index, 2)
    assert share.mean().item() == pytest.approx(0.2, abs=0.01)  # of Beta(2, 8), variance 0.16 / 11
    assert share.var().item() == pytest.approx(0.16 / 11, rel=0.1)
    assert start.mean().item() == pytest.approx(0.5, abs=0.02)
    assert ((start >= 0) & (start < 1)).all()
    for mine, all_rows in zip(model.draws(index[40:60].flip(0), 2), (share, start), strict=True):
        assert torch.equal(mine, all_rows.view(2, -1)[:, 40:60].flip(1).flatten())
    assert len(share.unique()) > 7900  # samples and views draw apart
    assert not torch.equal(method(seed=1).draws(index[:4], 2)[0], model.draws(index[:4], 2)[0])


def test_without_mixtures_and_weights_it_is_supcon_on_the_bins() -> None:
    given = batch()
    bins = given["target"].round().long().repeat(2)
    loss = method(**PLAIN).training_step(given, 0)
    torch.testing.assert_close(loss, supcon(embedded(method(), given), bins, 0.3), rtol=1e-5, atol=0)


def test_labels_in_an_order_are_targets_and_pictures_are_rows() -> None:
    model = method(backbone=SmallConvNet(1, 4, 2))
    images = {"views": [torch.randn(4, 1, 8, 8)] * 2, "label": torch.tensor([0, 1, 2, 5])}
    images["index"] = torch.arange(4)
    assert model.training_step(images, 0).isfinite()
    assert model.features({"image": images["views"][0]}).shape == (4, 8)
    assert method().features({"table": torch.ones(2, 6)}).shape == (2, 8)


@pytest.mark.parametrize("missing", [float("nan"), float("inf")])
def test_a_target_that_is_missing_is_refused_before_it_reaches_the_weights(missing: float, tmp_path: Path) -> None:
    given = batch()
    given["target"] = given["target"].clone()
    given["target"][2] = missing
    with pytest.raises(UserError, match="1 of 8 targets of a batch are NaN or infinite"):
        method_runs.fit(method(), [given], tmp_path)


def test_what_it_cannot_train_is_refused() -> None:
    for settings, message in (
        ({"bin_width": 0.0}, "bin_width=0.0 must be above 0"),
        ({"window": -1.0}, "window=-1.0 must"),
        ({"beta": (0.0, 1.0)}, r"beta=\[0.0, 1.0\] must"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"projector": Projector(9, [16], 6)}, "projector.in_features=9, but MLP gives 8"),
    ):
        with pytest.raises(UserError, match=message):
            method(**settings)
    given = batch()
    with pytest.raises(
        UserError, match=r"SupReMix needs a number for each sample as label, and this batch holds views"
    ):
        method().training_step({"views": given["views"]}, 0)
