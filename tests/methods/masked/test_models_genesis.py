from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import fit, stays_finite
from torch import nn
from torch.nn import functional as F

from lightspan.backbones.dense import UNet
from lightspan.core.errors import UserError
from lightspan.methods.masked.models_genesis import ModelsGenesis
from lightspan.nn.masking.volume_distortions import VolumeDistortions


def method(channels: int = 1, **settings: Any) -> ModelsGenesis:
    torch.manual_seed(0)
    given = {"optimizer": partial(torch.optim.SGD, lr=0.1)} | settings
    return ModelsGenesis(UNet(channels, width=4, levels=2, axes=3), channels, **given)


def batch(rows: int = 3, channels: int = 1) -> dict[str, Any]:
    volume = torch.rand(rows, channels, 8, 8, 6, generator=torch.Generator().manual_seed(1))
    return {"volume": volume, "spacing": torch.ones(rows, 3), "index": torch.arange(rows) + 5}


def test_the_loss_is_the_squared_error_of_what_is_restored_over_all_voxels() -> None:
    model, given = method(), batch()
    seen = model.distortions(given["volume"], 0, [5, 6, 7])
    guess = model.head(model.backbone(seen)).sigmoid()
    torch.testing.assert_close(model.training_step(given, 0), F.mse_loss(guess, given["volume"]))
    torch.testing.assert_close(model(seen), guess)


def test_a_missing_channel_is_no_part_of_the_loss() -> None:
    model, given = method(2), batch(channels=2)
    present = torch.tensor([[True, False]] * 3)
    guess = model(model.distorted(given["volume"], given["index"]))
    found = model.training_step(given | {"present": present}, 0)
    torch.testing.assert_close(found, F.mse_loss(guess[:, 0], given["volume"][:, 0]))
    assert model.training_step(given | {"present": present & False}, 0) == 0


def test_features_are_means_of_the_coarsest_maps_and_pictures_show_what_was_seen() -> None:
    model, given = method(), batch()
    coarse = model.backbone.scales(given["volume"])[-1]  # type: ignore[operator]
    torch.testing.assert_close(model.features(given), coarse.mean(dim=(2, 3, 4)))
    found = model.reconstruct(given)
    assert found.other_BChw is not None
    assert torch.equal(found.other_BChw, model.distorted(given["volume"], given["index"]))
    assert torch.equal(found.hidden_B1hw, found.other_BChw != found.image_BChw)
    torch.testing.assert_close(found.guess_BChw, model(found.other_BChw))


def test_training_restores_better_than_leaving_volumes_as_they_are(tmp_path: Path) -> None:
    body = torch.linspace(0, 1, 8).view(1, 1, 8, 1, 1).expand(4, 1, 8, 8, 6)
    given = batch(4) | {"volume": 0.9 * body + 0.1 * batch(4)["volume"]}
    model = method(optimizer=partial(torch.optim.Adam, lr=1e-2), distortions=VolumeDistortions(window=0.4))
    losses = fit(model, [given] * 60, tmp_path)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    with torch.no_grad():
        seen = model.distorted(given["volume"], given["index"])
        assert F.mse_loss(model(seen), given["volume"]) < 0.5 * F.mse_loss(seen, given["volume"])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_constant_volumes_and_intensities_out_of_range_stay_finite(tmp_path: Path, precision: str) -> None:
    black, loud = (batch() | {"volume": torch.full((3, 1, 8, 8, 6), value)} for value in (0.0, 1e4))
    stays_finite(method(), [black, loud, batch(1)], tmp_path, precision=precision)


def test_what_cannot_be_trained_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="scales"):
        ModelsGenesis(nn.Conv3d(1, 4, 1), optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match="in_chans"):
        ModelsGenesis(UNet(1, width=4, levels=2, axes=3), 0, optimizer=torch.optim.SGD)
