"""`lightspan run RECIPE --encoder PLACE --images FOLDER`: what of a recipe they replace, and what stays."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from picture_files import write_pictures
from safetensors.torch import save_file

from lightspan.backbones.published import timm_folder
from lightspan.backbones.timm_networks import timm_network
from lightspan.backbones.vision import SmallConvNet
from lightspan.cli.config import user_encoder, user_images
from lightspan.cli.config.resolve import Resolved, resolve
from lightspan.cli.config.tree import dump
from lightspan.cli.config.user_encoder import with_encoder
from lightspan.cli.main import main
from lightspan.core.errors import UserError

RECIPE = "analysis/imagenet_protocol"
SMALL = {"class_path": "lightspan.backbones.vision.SmallConvNet", "init_args": {"in_chans": 3, "width": 4}}


def settings(resolved: Resolved, name: str = "subject") -> dict[str, Any]:
    return resolved.config["inputs"][name]["init_args"]


def run_folder(place: Path, backbone: dict[str, Any], exported: bool = True) -> Path:
    """What a run and `lightspan export --to safetensors` leave of a small network."""
    place.mkdir(parents=True)
    (place / "resolved.yaml").write_text(dump({"model": {"class_path": "M", "init_args": {"backbone": backbone}}}))
    if exported:
        (place / "export" / "safetensors").mkdir(parents=True)
        state = {f"backbone.{name}": tensor for name, tensor in SmallConvNet(3, 4, 3).state_dict().items()}
        save_file(state, place / "export" / "safetensors" / "model.safetensors")
    return place


def timm_files(place: Path, **changed: Any) -> Path:
    """A folder as timm writes it."""
    place.mkdir()
    network = timm_network("resnet10t", num_classes=5)
    save_file(network.state_dict(), place / "model.safetensors")
    config = {"architecture": "resnet10t", "model_args": {"in_chans": 3}, "pretrained_cfg": {"classifier": "fc"}}
    config["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (place / "config.json").write_text(json.dumps(config | changed))
    return place


def test_a_run_gives_its_backbone_with_exported_weights_and_the_floor_without(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", SMALL)
    given = settings(with_encoder(RECIPE, (), run, None, 64, ()))
    assert given["encoder"]["class_path"] == user_encoder.WITH_WEIGHTS
    assert given["encoder"]["init_args"]["path"] == str(run / "export" / "safetensors" / "model.safetensors")
    assert given["encoder"]["init_args"]["module"] == given["floor"] == SMALL  # nothing of the recipe's: no `stages`
    assert given["data"] == settings(resolve(RECIPE, kinds=("estimator",)))["data"]
    assert given["standardised"] == "data"


def test_of_a_run_that_began_with_weights_the_floor_has_none(tmp_path: Path) -> None:
    begun = {"class_path": user_encoder.WITH_WEIGHTS, "init_args": {"path": "a.safetensors", "module": SMALL}}
    assert settings(with_encoder(RECIPE, (), run_folder(tmp_path / "a", begun), None, 64, ()))["floor"] == SMALL
    published = {"class_path": user_encoder.BUILDER, "init_args": {"name": "resnet18", "pretrained": True}}
    given = settings(with_encoder(RECIPE, (), run_folder(tmp_path / "b", published), None, 64, ()))
    assert given["floor"]["init_args"] == {"name": "resnet18", "pretrained": False}


def test_a_folder_of_timms_and_a_name_bring_their_statistics(tmp_path: Path) -> None:
    folder = timm_files(tmp_path / "timm")
    given = settings(with_encoder(RECIPE, (), folder, None, 64, ()))
    assert (given["encoder"]["class_path"], given["standardised"]) == (user_encoder.FOLDER, "timm")
    assert given["floor"]["init_args"] == {"folder": str(folder), "weights": False}
    named = settings(with_encoder(RECIPE, (), Path("resnet18.a1_in1k"), None, 64, ()))
    assert named["encoder"] == {
        "class_path": user_encoder.PUBLISHED,
        "init_args": {"name": "resnet18.a1_in1k", "outputs": 0},
    }
    assert named["floor"] == {"class_path": user_encoder.BUILDER, "init_args": {"name": "resnet18.a1_in1k"}}


def test_inputs_without_a_floor_get_the_encoder_alone(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", SMALL)
    found = with_encoder("analysis/knn_digits", (), run, None, 64, ())
    for name in ("bank", "query"):
        assert settings(found, name)["encoder"]["init_args"]["module"] == SMALL
        assert not {"floor", "standardised"} & settings(found, name).keys()


def test_pictures_keep_the_recipes_views_and_fit_its_own_network(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "in", {"cat": 4, "bird": 4})
    flags = ("inputs.subject.init_args.data.init_args.val_share=0.25", "estimator.init_args.k=3")
    found = with_encoder(RECIPE, (), None, folder, 32, flags)
    data, before = settings(found)["data"], settings(resolve(RECIPE, kinds=("estimator",)))["data"]
    assert data["class_path"] == user_images.DATA
    assert data["init_args"]["views"] == before["init_args"]["views"]
    assert (data["init_args"]["folder"], data["init_args"]["size"], data["init_args"]["val_share"]) == (
        *(str(folder), 32), 0.25,
    )  # fmt: skip
    assert data["init_args"]["batch_size"] <= 6
    assert settings(found)["floor"]["init_args"]["in_chans"] == 3
    assert found.config["estimator"]["init_args"]["k"] == 3
    assert any("8 picture files" in str(note) for note in found.notes)
    split = tmp_path / "split"
    write_pictures(split / "train", {"cat": 3, "bird": 3})
    write_pictures(split / "val", {"cat": 2, "bird": 2})
    paper = settings(with_encoder("analysis/imagenet_protocol_vit_b16", (), None, split, 64, ()))["data"]["init_args"]
    assert (paper["val_folder"], paper["views"]["init_args"]["size"]) == (str(split / "val"), 64)


def test_what_is_no_encoder_and_what_has_no_classes_is_refused(tmp_path: Path) -> None:
    for encoder, message in (
        (run_folder(tmp_path / "a", SMALL, exported=False), "has no exported weights"),
        (run_folder(tmp_path / "b", {"name": "x"}), "names no model.init_args.backbone"),
        (tmp_path, "is no run folder"),
        (tmp_path / "nowhere", "is no run folder"),
    ):
        with pytest.raises(UserError, match=message):
            with_encoder(RECIPE, (), encoder, None, 64, ())
    with pytest.raises(UserError, match="learns from labels"):
        with_encoder(RECIPE, (), None, write_pictures(tmp_path / "in", {"": 3}), 64, ())
    with pytest.raises(UserError, match="no input of analysis/filters has a setting data"):
        with_encoder("analysis/filters", (), None, write_pictures(tmp_path / "two", {"a": 2, "b": 2}), 64, ())
    with pytest.raises(UserError, match="recipe of a merger"):
        with_encoder("merging/ties", (), tmp_path / "a", None, 64, ())


def test_a_folder_of_timms_is_read_back_without_its_classifier(tmp_path: Path) -> None:
    network = timm_folder(str(timm_files(tmp_path / "timm"))).eval()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert network(x).shape == (2, 512)
    assert network.pretrained_cfg["mean"] == [0.1, 0.2, 0.3]
    drawn = timm_folder(str(tmp_path / "timm"), weights=False).eval()
    assert not torch.equal(drawn(x), network(x))
    for number, (changed, message) in enumerate(
        (
            ({"architecture": "resnet10x"}, "no network named"),
            ({"architecture": None}, "names no network of timm"),
            ({"model_args": {"in_chans": 4}}, "do not fit"),
            ({"model_args": [3]}, "names no network of timm"),
            ({"model_args": {"depth": 0}}, "timm cannot make"),
            ({"pretrained_cfg": {"std": [0.0, 1.0, 1.0]}}, "pretrained_cfg.std"),
            ({"pretrained_cfg": {"mean": "grey"}}, "pretrained_cfg.mean"),
        )
    ):
        with pytest.raises(UserError, match=message):
            timm_folder(str(timm_files(tmp_path / str(number), **changed)))
    with pytest.raises(UserError, match="there are no weights"):
        timm_folder(str(tmp_path))


def test_one_line_runs_the_protocol_on_a_run_and_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, folder = run_folder(tmp_path / "run", SMALL), write_pictures(tmp_path / "in", {"cat": 6, "bird": 6})
    words = ["--encoder", str(run), "--images", str(folder), "--image-size", "16", "--run", str(tmp_path / "out")]
    quick = ["epochs=1", "rates=[0.1]", "shares=[0.5]", "tuning_epochs=[1]", "k=2"]
    flags = [f"estimator.init_args.{one}" for one in quick]
    at = "inputs.subject.init_args.data.init_args"
    flags += [f"{at}.num_workers=0", f"{at}.cache_dir={tmp_path / 'cache'}", f"{at}.batch_size=4"]
    assert main(["run", RECIPE, *words, "--features", str(tmp_path / "features"), *flags]) == 0
    said = capsys.readouterr().out
    assert "nearest neighbours" in said
    assert "floor: random weights" in said
    assert {"result.json", "picture.png", "table.csv"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert main(["run", RECIPE, "--image-size", "16"]) == 2
