"""The encoder as files: others get the same features from them, and nothing else is in them."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightspan.backbones.vision import SmallConvNet, timm_backbone
from lightspan.cli.exports.encoder import write_encoder

MEAN, STD = torch.tensor([0.2, 0.4, 0.6])[:, None, None], torch.tensor([0.5, 0.25, 0.125])[:, None, None]


class Pretrained(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, nn.Linear(1000, 1000)

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        return self.backbone(batch["image"])


def test_the_program_takes_pictures_and_any_batch_and_holds_no_projector(tmp_path: Path) -> None:
    method = Pretrained(SmallConvNet(3, 4, 2)).train()
    modes = [part.training for part in method.modules()]
    written = write_encoder(method, MEAN, STD, 8, tmp_path / "out")
    assert written.files == ["encoder.pt2", "model.safetensors"]
    assert written.difference == 0
    assert [part.training for part in method.modules()] == modes
    assert method.projector is not None
    program = torch.export.load(tmp_path / "out" / "encoder.pt2")
    assert not any("projector" in name for name in program.state_dict)
    for count in (1, 2, 5):
        images = torch.rand(count, 3, 8, 8)
        expected = method.eval().features({"image": (images - MEAN) / STD})
        torch.testing.assert_close(program.module()(images), expected)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    SmallConvNet(3, 4, 2).load_state_dict(weights)
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (about["input"], about["features"]) == ("float32 [B, 3, 8, 8] in [0, 1]", 8)
    assert about["mean"] == pytest.approx([0.2, 0.4, 0.6])


def test_timm_builds_a_backbone_that_it_knows(tmp_path: Path) -> None:
    method = Pretrained(timm_backbone("test_resnet"))
    written = write_encoder(method, MEAN, STD, 32, tmp_path / "out")
    assert written.files == ["encoder.pt2", "timm"]
    again = timm.create_model(f"local-dir:{tmp_path / 'out' / 'timm'}", pretrained=True).eval()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(images), method.eval().backbone(images))
    assert again.pretrained_cfg["mean"] == pytest.approx([0.2, 0.4, 0.6])


def test_a_backbone_that_timm_cannot_build_again_is_written_as_weights(tmp_path: Path) -> None:
    backbone = timm_backbone("test_resnet")
    backbone.conv1 = nn.Sequential(nn.Identity(), backbone.conv1)
    written = write_encoder(Pretrained(backbone), MEAN, STD, 32, tmp_path / "out")
    assert written.files == ["encoder.pt2", "model.safetensors"]


def test_what_torch_cannot_export_is_said_and_the_weights_are_written(tmp_path: Path) -> None:
    class Undecided(SmallConvNet):
        def forward(self, x_BCHW: Tensor) -> Tensor:
            return super().forward(x_BCHW) if x_BCHW.sum().item() > 0 else x_BCHW

    written = write_encoder(Pretrained(Undecided(3, 4, 2)), MEAN, STD, 8, tmp_path / "out")
    assert written.files == ["model.safetensors"]
    assert "torch.export cannot follow Pretrained" in written.remarks[0]
    assert 'load_file("FOLDER/model.safetensors")' in written.loading


def test_the_card_is_written_from_what_was_written(tmp_path: Path) -> None:
    method = Pretrained(SmallConvNet(3, 4, 2))
    written = write_encoder(method, MEAN, STD, 8, tmp_path / "out", lambda done: f"{done.files} {done.loading}")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card == f"{written.files} {written.loading}"
    found: dict[str, torch.Tensor] = {"image": torch.rand(2, 3, 8, 8)}
    exec(written.loading.replace("FOLDER", str(tmp_path / "out")), {}, found)
    assert found["features"].shape == (2, 8)
    assert written.inputs["inputs"]["image"]["range"] == [0, 1]


def test_an_earlier_export_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_encoder(Pretrained(SmallConvNet(3, 4, 2)), MEAN, STD, 8, tmp_path / "out")
    write_encoder(Pretrained(timm_backbone("test_resnet")), MEAN, STD, 32, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["encoder.pt2", "export.json", "timm"]
