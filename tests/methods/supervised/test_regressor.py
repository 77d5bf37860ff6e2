from functools import partial

import pytest
import torch
from torch import nn

from lightspan.backbones.vision import MLP
from lightspan.core.errors import UserError
from lightspan.methods.supervised.regressor import Regressor

SGD = partial(torch.optim.SGD, lr=0.1)


def method(**settings: float) -> Regressor:
    torch.manual_seed(0)
    model = Regressor(MLP((1, 1, 3), (5,)), optimizer=SGD, **settings)
    model.log_dict = lambda values, **options: model.__dict__.update(seen=values)  # type: ignore[method-assign]
    return model


def batch(rows: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"table": torch.randn(rows, 3, generator=generator), "target": torch.tensor([8.0, 12.0, 10.0, 14.0])[:rows]}


def test_a_head_of_zeros_predicts_the_mean_and_its_loss_is_worked_out_by_hand() -> None:
    model = method(target_mean=10.0, target_deviation=2.0)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    assert model.predict_step(batch(), 0).tolist() == [10.0] * 4
    # Errors -1, 1, 0, 2 in units of the deviation.
    assert float(model.training_step(batch(), 0)) == 1.5
    model.validation_step(batch(), 0)
    assert {name: float(value) for name, value in model.seen.items()} == {
        "val/loss": 1.5,
        "val/mean_absolute_error": 2.0,
    }


def test_the_unit_of_the_targets_changes_neither_loss_nor_training() -> None:
    scaled = batch() | {"target": batch()["target"] * 1000}
    one, other = method(target_mean=10.0, target_deviation=2.0), method(target_mean=1e4, target_deviation=2e3)
    torch.testing.assert_close(one.training_step(batch(), 0), other.training_step(scaled, 0))
    torch.testing.assert_close(one.predict_step(batch(), 0) * 1000, other.predict_step(batch(), 0))


def test_features_are_those_of_rows_and_probes_read_them() -> None:
    model = method()
    assert model.features(batch()).shape == (4, 5)
    assert model.compares_features


def test_one_row_and_half_precision_have_a_finite_gradient() -> None:
    model = method().bfloat16()
    loss = model.training_step({name: value[:1].bfloat16() for name, value in batch().items()}, 0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_what_cannot_be_trained_is_refused() -> None:
    for deviation in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="target_deviation"):
            method(target_deviation=deviation)
    with pytest.raises(UserError, match="num_features"):
        Regressor(nn.Flatten(), optimizer=SGD)
    with pytest.raises(UserError, match=r"head.in_features=6, but MLP gives 5"):
        Regressor(MLP((1, 1, 3), (5,)), head=nn.Linear(6, 1), optimizer=SGD)
    with pytest.raises(UserError, match=r"in_shape=\[1, 1, 3\], but a sample of this batch is \[1, 1, 2\]"):
        method().features({"table": torch.ones(4, 2)})
