"""Folders for timm: whatever way timm and transformers load them, the outputs are the network's."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from transformers import AutoImageProcessor

from lightspan.backbones.vision import SmallConvNet, timm_backbone
from lightspan.backbones.vit import vit
from lightspan.cli.exports.huggingface import timm_wrapper
from lightspan.cli.exports.timm_folder import read_timm, timm_network, write_timm


def token_vit() -> nn.Module:
    return vit(width=16, depth=1, heads=2, img_size=16, patch_size=8, in_chans=1, class_token=False, layer_scale=0.1)


def registers() -> nn.Module:
    return vit(width=16, depth=2, heads=2, img_size=16, patch_size=4, in_chans=1, registers=2, sincos=False)


BACKBONES = {
    "a network by its name": lambda: timm_backbone("test_resnet", in_chans=1),
    "one whose size is fixed": lambda: timm.create_model("test_vit", img_size=16, in_chans=1, num_classes=0),
    "a transformer of a size of ours": token_vit,
    "one with registers": registers,
}


@pytest.fixture(params=BACKBONES.values(), ids=BACKBONES.keys())
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    backbone = request.param().eval()
    network = timm_network(backbone)
    assert network is not None
    assert write_timm(network, (16, 16), [0.25], [0.5], tmp_path)
    return backbone, tmp_path


def test_every_way_of_loading_gives_the_backbones_outputs(written: tuple[nn.Module, Path]) -> None:
    backbone, folder = written
    config = json.loads((folder / "config.json").read_text())
    name, arguments = config["architecture"], {**config["model_args"], "num_classes": 0}
    file = folder / "model.safetensors"
    overlay = {"file": str(file)}
    loaded = (
        read_timm(folder),
        timm.create_model(name, checkpoint_path=str(file), **arguments).eval(),
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval(),
    )
    images = torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        expected = backbone(images)
        for network in loaded:
            torch.testing.assert_close(network(images), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(timm_wrapper(folder)(images).pooler_output, expected, rtol=1e-6, atol=1e-6)
    assert read_timm(folder).pretrained_cfg["mean"] == pytest.approx([0.25])


def test_a_picture_is_prepared_whole_and_standardised_as_it_was_in_training(tmp_path: Path) -> None:
    assert write_timm(timm_backbone("test_resnet"), (16, 16), [0.5] * 3, [0.25] * 3, tmp_path)
    prepared = AutoImageProcessor.from_pretrained(tmp_path, local_files_only=True).data_config
    wanted = {"input_size": (3, 16, 16), "crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    assert wanted.items() <= prepared.items()


def test_other_networks_are_not_timms_and_nothing_is_written(tmp_path: Path) -> None:
    assert timm_network(SmallConvNet(1, 4, 2)) is None
    assert timm_network(None) is None
    replaced = timm_backbone("test_resnet")
    replaced.conv1 = nn.Sequential(nn.Identity(), replaced.conv1)
    assert not write_timm(replaced, (16, 16), [0.5] * 3, [0.5] * 3, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_last_block_with_other_heads_is_not_written_since_its_weights_would_fit_another_network(
    tmp_path: Path,
) -> None:
    network = timm_network(vit(width=16, depth=2, heads=2, img_size=16, patch_size=8, in_chans=1, last_heads=4))
    assert network is not None
    assert not write_timm(network, (16, 16), [0.25], [0.5], tmp_path)
    assert not [*tmp_path.iterdir()]
