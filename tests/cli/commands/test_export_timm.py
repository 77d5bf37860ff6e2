"""`lightspan export --to timm`: one checkpoint gives networks of many sizes, each of which timm loads alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from export_runs import run_export, run_with_checkpoint
from safetensors.torch import load_file
from transformers import AutoModel

from lightspan.cli.config.build import build, load_resolved
from lightspan.core.errors import UserError
from lightspan.nn.subnets import Size

HEAD = {"class_path": "lightspan.nn.heads.dino_head.DINOHead", "init_args": {"in_features": 16, "prototypes": 4}}
CONFIG: dict[str, Any] = {
    "about": {"title": "t", "paper": "none", "family": "distillation"},
    "trainer": {"max_steps": 1, "accelerator": "cpu", "logger": {}, "enable_checkpointing": False},
    "model": {
        "class_path": "lightspan.methods.distillation.poa.POA",
        "init_args": {
            "backbone": {
                "class_path": "lightspan.backbones.elastic.ElasticViT",
                "init_args": {
                    "widths": [8, 16],
                    "depths": [1, 3],
                    "head_dim": 4,
                    "img_size": 8,
                    "patch_size": 4,
                    "in_chans": 1,
                    "init_values": 0.1,
                },
            },
            "heads": [HEAD],
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        },
    },
    "data": {"class_path": "lightspan.datamodules.image.sets.small.Digits"},
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return run_with_checkpoint(tmp_path / "run", CONFIG, "distillation/tiny")


def test_every_network_is_a_folder_that_timm_loads_and_says_what_the_teacher_says(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_export(run_dir, "--to", "timm", "--sizes", "all") == 0
    out = run_dir / "export" / "timm"
    assert {path.name for path in out.iterdir()} == {"8x1", "8x3", "16x1", "16x3", "export.json"}
    model = build(load_resolved(run_dir)).model
    model.load_state_dict(torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    x = torch.randn(3, 1, 8, 8)
    for size in (Size(8, 1), Size(8, 3), Size(16, 1), Size(16, 3)):
        alone = timm.create_model(f"local-dir:{out / str(size)}", pretrained=True).eval()
        expected = model.teacher.module.backbone.tokens(x, size)[:, 0]
        torch.testing.assert_close(alone(x), expected, rtol=1e-5, atol=1e-5)
        assert load_file(out / str(size) / "model.safetensors").keys() == alone.state_dict().keys()
        assert alone.num_features == size.width
    config = json.loads((out / "8x1" / "config.json").read_text())
    assert config["model_args"]["embed_dim"] == 8
    assert "tag" not in config["pretrained_cfg"]  # that of weights which are not these
    data = build(load_resolved(run_dir)).datamodule
    data.setup()
    assert config["pretrained_cfg"]["mean"] == pytest.approx(data.train.mean.flatten().tolist())
    assert "library_name: timm" in (out / "8x1" / "README.md").read_text()
    assert "read back with timm: largest output difference" in capsys.readouterr().out


def test_without_sizes_the_whole_teacher_is_written(run_dir: Path, tmp_path: Path) -> None:
    assert run_export(run_dir, "--to", "timm", "--out", tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"16x3", "export.json"}
    with pytest.raises(UserError, match=r"--sizes 32x3 is no network"):  # before what is wrong with the folder
        run_export(run_dir, "--to", "timm", "--out", tmp_path / "out", "--sizes", "32x3")
    with pytest.raises(UserError, match="contains an earlier export"):
        run_export(run_dir, "--to", "timm", "--out", tmp_path / "out", "--sizes", "8x1")


def test_sizes_that_are_not_there_and_other_formats_are_refused_and_nothing_is_written(
    run_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=r"--sizes 12x1 is no network in here; widths are 8, 16 and depths 1, 3, written 8x1"
    ):
        run_export(run_dir, "--to", "timm", "--sizes", "8x1", "12x1", "--out", tmp_path / "out")
    with pytest.raises(UserError, match=r"--sizes is an option of --to timm, and this is --to peft"):
        run_export(run_dir, "--to", "peft", "--sizes", "all")
    assert not (tmp_path / "out").exists()


def with_backbone(run_dir: Path, backbone: dict[str, Any]) -> Any:
    """The run as one of a classifier with this backbone."""
    config = json.loads((run_dir / "resolved.yaml").read_text())
    classifier = {"backbone": backbone, "num_classes": 3, "optimizer": {"class_path": "torch.optim.AdamW"}}
    config["model"] = {"class_path": "lightspan.methods.supervised.classifier.Classifier", "init_args": classifier}
    (run_dir / "resolved.yaml").write_text(json.dumps(config))
    model = build(load_resolved(run_dir)).model
    torch.save({"state_dict": model.state_dict(), "global_step": 1}, run_dir / "checkpoints" / "last.ckpt")
    return model


def test_a_backbone_that_timm_does_not_build_is_refused(run_dir: Path) -> None:
    with_backbone(run_dir, {"class_path": "lightspan.backbones.vision.SmallConvNet"})
    with pytest.raises(UserError, match=r"out of an ElasticViT, and Classifier has a SmallConvNet as its backbone"):
        run_export(run_dir, "--to", "timm", "--sizes", "all")
    with pytest.raises(UserError, match=r"builds its own networks only, and Classifier has a SmallConvNet .*--to onnx"):
        run_export(run_dir, "--to", "timm")
    assert not (run_dir / "export").exists() or not list((run_dir / "export").iterdir())


def test_an_encoder_of_timm_is_a_folder_for_timm_and_for_transformers(run_dir: Path, tmp_path: Path) -> None:
    small = {"width": 16, "depth": 1, "heads": 2, "img_size": 8, "patch_size": 4, "in_chans": 1}
    model = with_backbone(run_dir, {"class_path": "lightspan.backbones.vit.vit", "init_args": small}).eval()
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        expected = model.features({"image": images})
        assert run_export(run_dir, "--to", "timm", "--out", tmp_path / "timm") == 0
        again = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
        torch.testing.assert_close(again(images), expected)
        assert run_export(run_dir, "--to", "huggingface", "--out", tmp_path / "hf") == 0
        wrapped = AutoModel.from_pretrained(tmp_path / "hf", local_files_only=True).eval()
        torch.testing.assert_close(wrapped(images).pooler_output, expected)
    assert "library_name: transformers" in (tmp_path / "hf" / "README.md").read_text()
