"""`lightspan export --to onnx` and `--to torch-export`: functions that need no lightspan, or nothing."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli.commands.test_export import CONFIG as LANGUAGE
from export_runs import run_export, run_with_checkpoint
from lightning import LightningDataModule

from lightspan.cli.config.build import build, load_resolved
from lightspan.cli.exports import formats
from lightspan.cli.exports.examples import example_batch
from lightspan.cli.exports.program import ABOUT
from lightspan.cli.exports.standalone import Compared
from lightspan.core.errors import UserError
from lightspan.datamodules.video.batch import ClipBatch
from lightspan.training.checkpoints.io import read_checkpoint

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CONFIG: dict[str, Any] = {
    "about": {"title": "t", "paper": "none", "family": "supervised", "modality": "image"},
    "trainer": {"max_steps": 1, "accelerator": "cpu", "logger": {}, "enable_checkpointing": False},
    "model": {
        "class_path": "lightspan.methods.supervised.classifier.Classifier",
        "init_args": {
            "backbone": {"class_path": "lightspan.backbones.vision.MLP", "init_args": {"in_shape": [1, 8, 8]}},
            "num_classes": 10,
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        },
    },
    "data": {"class_path": "lightspan.datamodules.image.sets.small.Digits"},
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return run_with_checkpoint(tmp_path / "run", CONFIG, "supervised/tiny")


def trained(run_dir: Path) -> tuple[Any, Any]:
    """The method with its weights, and its data."""
    built = build(load_resolved(run_dir))
    content = read_checkpoint(run_dir / "checkpoints" / "last.ckpt", optimizers=False)
    built.model.load_state_dict(content["state_dict"])
    assert built.datamodule is not None
    built.datamodule.setup("fit")
    return built.model.eval(), built.datamodule


@pytest.mark.runs
def test_onnxruntime_gives_the_features_of_pictures_in_the_unit_range(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_export(run_dir, "--to", "onnx") == 0
    assert "read back with onnxruntime: largest output difference" in capsys.readouterr().out
    out = run_dir / "export" / "onnx"
    assert {path.name for path in out.iterdir()} == {"model.onnx", "export.json", "README.md"}
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    method, data = trained(run_dir)
    for count in (1, 4):
        images = torch.rand(count, 1, 8, 8)
        (found,) = session.run(None, {"image": images.numpy()})
        expected = method.features({"image": (images - data.train.mean) / data.train.std})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
    about = session.get_modelmeta().custom_metadata_map
    assert (about["recipe"], about["what"], about["weights"]) == ("supervised/tiny", "features", "float32")
    assert json.loads(about["mean"]) == pytest.approx(data.train.mean.flatten().tolist())
    record = json.loads((out / "export.json").read_text())
    assert record["largest_difference"] <= record["limit"]
    assert record["inputs"]["image"]["shape"] == ["batch", 1, 8, 8]


def test_predictions_are_exported_on_demand(run_dir: Path, tmp_path: Path) -> None:
    assert run_export(run_dir, "--to", "torch-export", "--what", "predict", "--out", tmp_path / "out") == 0
    found = {ABOUT: ""}
    program = torch.export.load(tmp_path / "out" / "model.pt2", extra_files=found).module()
    method, data = trained(run_dir)
    for count in (1, 4):
        images = torch.rand(count, 1, 8, 8)
        expected = method.predict_step({"image": (images - data.train.mean) / data.train.std}, 0)
        torch.testing.assert_close(program(images), expected)
    assert json.loads(found[ABOUT])["what"] == "predict"
    assert "the predictions, as a program" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.runs
def test_language_models_take_tokens_in_batches_of_any_size(tmp_path: Path) -> None:
    run = run_with_checkpoint(tmp_path / "run", LANGUAGE, "language/tiny")
    assert run_export(run, "--to", "torch-export") == 0
    program = torch.export.load(run / "export" / "torch-export" / "model.pt2").module()
    method, _ = trained(run)
    for count in (1, 3):
        tokens = torch.randint(256, (count, 17))
        torch.testing.assert_close(program(tokens), method.features({"tokens": tokens}))


def test_a_file_that_differs_is_not_left_behind(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(formats, "write_onnx", lambda *_: Compared(0.25, 1e-4))
    assert run_export(run_dir, "--to", "onnx") == 1
    assert list((run_dir / "export").iterdir()) == []
    assert "this is more than 0.0001: nothing was written" in capsys.readouterr().out


def test_pictures_of_another_size_are_standardised_as_those_of_the_run(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_export(run_dir, "--to", "torch-export", "--shape", "1,4,16") == 0
    method, data = trained(run_dir)
    images = torch.rand(3, 1, 4, 16)
    program = torch.export.load(run_dir / "export" / "torch-export" / "model.pt2").module()
    expected = method.features({"image": (images - data.train.mean) / data.train.std})
    torch.testing.assert_close(program(images), expected)
    assert "unknown" not in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--shape 3,8,8 has 3 channels"):
        run_export(run_dir, "--to", "torch-export", "--shape", "3,8,8", "--out", tmp_path / "out")


def test_without_the_data_the_shape_of_a_picture_is_enough(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = CONFIG | {
        "data": {
            "class_path": "lightspan.datamodules.image.sets.small.FashionMNIST",
            "init_args": {"source": "full", "root": str(tmp_path / "nowhere")},
        }
    }
    (run_dir / "resolved.yaml").write_text(json.dumps(missing))
    with pytest.raises(UserError, match=r"nowhere.* --shape needs no data"):
        run_export(run_dir, "--to", "torch-export")
    with pytest.raises(UserError, match=r"--shape 3,8,9: .* cannot read this \(.*the shape that it was trained"):
        run_export(run_dir, "--to", "torch-export", "--shape", "3,8,9")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightspan.methods.supervised.classifier.Classifier.features", lambda *_: "no tensor")
        with pytest.raises(UserError, match=r"^Classifier.features .* gives a str"):  # not the fault of --shape
            run_export(run_dir, "--to", "torch-export", "--shape", "1,8,8")
    assert run_export(run_dir, "--to", "torch-export", "--shape", "1,8,8") == 0
    assert "note: what is written takes image as the data of the run give it" in capsys.readouterr().err
    images = torch.randn(2, 1, 8, 8)
    program = torch.export.load(run_dir / "export" / "torch-export" / "model.pt2").module()
    built = build(load_resolved(run_dir)).model
    built.load_state_dict(read_checkpoint(run_dir / "checkpoints" / "last.ckpt", optimizers=False)["state_dict"])
    torch.testing.assert_close(program(images), built.eval().features({"image": images}))
    card = (run_dir / "export" / "torch-export" / "README.md").read_text()
    assert "`image` is standardised as the data of the run did, before it goes in" in card


class ElsewhereClips(LightningDataModule):
    batch_type = ClipBatch

    def setup(self, stage: str) -> None:
        raise UserError("on another machine")


def test_a_shape_has_as_many_numbers_as_what_the_run_reads_has_axes() -> None:
    built: Any = SimpleNamespace(datamodule=ElsewhereClips(), model=None, trainer=None)
    batch, _ = example_batch(built, (3, 4, 8, 8))
    assert {name: x.shape for name, x in batch.items()} == {"clip": (1, 3, 4, 8, 8)}
    with pytest.raises(UserError, match=r"--shape 3,8,8 has 3 numbers, .* clip .* has 4: C, T, H, W"):
        example_batch(built, (3, 8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "peft", "--what", "predict"), "--what is an option of --to torch-export and --to onnx"),
        (("--to", "timm", "--precision", "float16"), "--precision is an option of --to onnx, and this is --to timm"),
        (("--to", "safetensors", "--shape", "1,8,8"), "--shape is an option of --to timm and --to huggingface"),
    ],
)
def test_options_of_other_formats_are_refused(run_dir: Path, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_export(run_dir, *options)


@pytest.mark.parametrize(("option", "value"), [("--shape", "3,224"), ("--shape", "0,8,8"), ("--licence", "My own!")])
def test_values_that_cannot_be_are_refused(run_dir: Path, option: str, value: str) -> None:
    with pytest.raises(SystemExit):
        run_export(run_dir, "--to", "onnx", option, value)


def test_the_licence_that_is_stated_is_in_the_card(run_dir: Path) -> None:
    assert run_export(run_dir, "--to", "safetensors", "--licence", "apache-2.0") == 0
    assert "license: apache-2.0\n" in (run_dir / "export" / "safetensors" / "README.md").read_text()
