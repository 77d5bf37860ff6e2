"""NMTune: its terms and their gradients, what it reduces to, and what it refuses."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import Pooled, batch, fit
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.methods.robustness.nmtune import NMTune, kept_geometry
from lightspan.nn.heads.residual_mlp import ResidualMLP
from lightspan.objectives.singular import leading_singular_share


def method(**settings: Any) -> NMTune:
    torch.manual_seed(0)
    parts = {"encoder": Pooled(), "mlp": ResidualMLP(8), "num_classes": 3}
    return NMTune(**parts | settings, optimizer=partial(torch.optim.SGD, lr=0.05))


def two_views(rows: int = 8) -> dict[str, Any]:
    return batch(rows, locals_=0) | {"label": torch.arange(rows) % 3}


def test_the_loss_is_that_of_the_equation_with_an_svd_of_the_rows_of_both_views() -> None:
    model, given = method(mse=2.0, covariance=0.3, svd=0.5, leading=2), two_views()
    logged: dict[str, Any] = {}
    model.log_training = logged.update  # type: ignore[method-assign]
    loss = model.training_step(given, 0)
    f = torch.cat([model.backbone.encoder(view) for view in given["views"]])
    z = model.backbone.mlp(f)
    values, covariance = torch.linalg.svdvals(z), torch.cov(z.T)
    off_diagonal = (covariance.square().sum() - covariance.diagonal().square().sum()) / 8
    same = F.mse_loss(F.normalize(z[8:]), F.normalize(f[:8]))
    nats = F.cross_entropy(model.head(z), given["label"].repeat(2))
    expected = nats + 2.0 * same + 0.3 * off_diagonal - 0.5 * values[:2].mean() / values.sum()
    torch.testing.assert_close(loss, expected)
    assert logged["train/loss_nats"].item() == pytest.approx(nats.item())
    assert logged["train/loss"] is loss


def test_without_regularisers_and_scale_it_is_the_linear_probe() -> None:
    model, given = method(mse=0.0, covariance=0.0, svd=0.0, mlp=ResidualMLP(8, scale=0.0)), two_views()
    probe = nn.Linear(8, 3)
    probe.load_state_dict(model.head.state_dict())
    f = torch.cat([model.backbone.encoder(view) for view in given["views"]])
    expected = F.cross_entropy(probe(f), given["label"].repeat(2))
    loss = model.training_step(given, 0)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(model.head.weight.grad, probe.weight.grad)
    torch.testing.assert_close(model(given["views"][0]), probe(model.backbone.encoder(given["views"][0])))


def test_terms_but_the_covariance_do_not_change_when_both_kinds_of_features_are_rotated() -> None:
    generator = torch.Generator().manual_seed(0)
    f, z = (torch.randn(12, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    torch.testing.assert_close(kept_geometry(z @ turn, f @ turn), kept_geometry(z, f))
    torch.testing.assert_close(leading_singular_share(z @ turn), leading_singular_share(z))
    torch.testing.assert_close(kept_geometry(3 * z, 5 * f), kept_geometry(z, f))
    assert kept_geometry(f, f).item() == 0


def test_the_head_begins_he_uniform_and_validation_measures_the_images() -> None:
    model = method(encoder=Pooled(), num_classes=3)
    assert not model.head.bias.any()
    most = (6 / 8) ** 0.5  # of He et al., for 8 features
    assert 0.8 * most < model.head.weight.abs().amax() <= most
    logged: dict[str, Any] = {}
    model.log_dict = lambda figures, **_: logged.update(figures)  # type: ignore[assignment, method-assign]
    model.eval()
    image, label = two_views()["views"][0], torch.tensor([0, 1, 2, 0, 1, 1, 1, 1])
    model.validation_step({"image": image, "label": label}, 0)
    logits = model(image)
    assert logged["val/loss_nats"].item() == pytest.approx(F.cross_entropy(logits, label).item())
    assert logged["val/accuracy"].item() == pytest.approx((logits.argmax(dim=1) == label).double().mean().item())


def test_no_gradient_reaches_the_encoder_nor_the_features_that_are_kept() -> None:
    model = method()
    before = {name: value.clone() for name, value in model.backbone.encoder.state_dict().items()}
    model.train()
    model.training_step(two_views(), 0).backward()
    assert not model.backbone.encoder.module.training
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all(name.startswith(("backbone.mlp.", "head.")) for name in trained)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.encoder.state_dict().items())
    z, f = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    kept_geometry(z, f).backward()
    assert z.grad is not None
    assert f.grad is None


def test_training_lowers_the_loss_and_probes_read_what_the_head_reads(tmp_path: Path) -> None:
    model, given = method(), two_views(16)
    losses = fit(model, [given] * 20, tmp_path)
    assert losses[-1] < losses[0]
    model.eval()
    torch.testing.assert_close(model(given["views"][0]), model.head(model.features(given)))


def test_constant_features_and_half_precision_train() -> None:
    model = method(mlp=ResidualMLP(8, batch_norm=False))
    for views in ([torch.zeros(4, 1, 8, 8)] * 2, [torch.ones(4, 1, 8, 8)] * 2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.training_step({"views": views, "label": torch.tensor([0, 1, 2, 0])}, 0)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


class Silent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_what_it_cannot_train_is_refused() -> None:
    for name in ("mse", "covariance", "svd"):
        with pytest.raises(UserError, match=rf"{name}=-1.0 must be at least 0 and finite"):
            method(**{name: -1.0})
    with pytest.raises(UserError, match="num_classes=1 must"):
        method(num_classes=1)
    with pytest.raises(UserError, match=r"mlp.in_features=9, but Pooled gives 8 features"):
        method(mlp=ResidualMLP(9))
    with pytest.raises(UserError, match="neither Silent nor Silent says one"):
        method(encoder=Silent(), mlp=Silent())
    with pytest.raises(UserError, match="NMTune needs 2 views"):
        method().training_step(batch(), 0)
    with pytest.raises(UserError, match="in_features=0"):
        ResidualMLP(0)
