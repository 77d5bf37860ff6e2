"""Networks of timm and torchvision whose published weights lie on this disk, and the words where they do not."""

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from lightspan.backbones.published import timm_published, torchvision_published
from lightspan.errors import UserError


def test_what_the_cache_of_hugging_face_holds_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--timm--test_vit.r160_in1k"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    network = timm.create_model("test_vit")
    save_file(network.state_dict(), folder / "snapshots" / "abc" / "model.safetensors")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        found = timm_published("test_vit")
    for name, tensor in network.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_what_the_cache_of_torch_hub_holds_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    network = torchvision.models.squeezenet1_1()
    torch.save(network.state_dict(), tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    assert torch.equal(torchvision_published("squeezenet1_1").features[0].weight, network.features[0].weight)


def test_weights_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"weights of resnet18 are not on this disk: there is no .*resnet18-.*\.pth"):
        torchvision_published("resnet18")
    with pytest.raises(UserError, match=r"not on this disk: .* has no timm/resnet18.a1_in1k/model.safetensors"):
        timm_published("resnet18")
    with pytest.raises(UserError, match=r"timm has no network named 'resnet18\.mine'; did you mean resnet18"):
        timm_published("resnet18.mine")
    with pytest.raises(UserError, match="torchvision has no network named 'resnet19'; did you mean resnet18"):
        torchvision_published("resnet19")
