"""`lightspan check` before weights and data are here: they are named, everything else is checked, and `fit` refuses."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightspan.backbones.weights import with_weights
from lightspan.cli.main import main
from lightspan.core.absent import MissingFile, without_missing_weights

WEIGHTS = "runs/noisy_labels/export/safetensors/model.safetensors"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_missing_file_is_named_and_the_rest_is_built(capsys: pytest.CaptureFixture[str]) -> None:
    for fast in ([], ["--fast"]):
        assert main(["check", "robustness/nmtune", *fast]) == 0
        said = capsys.readouterr()
        assert f"not here yet, so what they hold is not checked: {WEIGHTS} (model.init_args.encoder" in said.err
        assert ("its parts fit together: NMTune" in said.out) == (not fast)
    assert main(["fit", "robustness/nmtune", "--dry-run"]) == 2
    assert "there are no weights at" in capsys.readouterr().err


def test_a_wrong_setting_beside_a_missing_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "robustness/nmtune", "model.init_args.mlp.init_args.in_features=63"]) == 2
    assert "in_features" in capsys.readouterr().err
    shards = ["data.class_path=lightspan.datamodules.shards.stream.Shards", "data.init_args.shards=[one.tar]"]
    assert main(["check", "compression/svd", *shards, "data.init_args.hold_out=5"]) == 2
    assert "hold_out=5" in capsys.readouterr().err  # although the model is not known without the file


def test_what_takes_its_form_from_a_missing_file_is_said_to_be_unchecked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "compression/svd"]) == 0
    said = capsys.readouterr()
    assert "model: not checked beyond this: there are no weights at runs/vit/export" in said.out
    assert "data: Digits" in said.out
    assert said.err.count("runs/vit/export") == 1


@pytest.mark.sweep
def test_overlays_of_stand_ins_for_what_is_missing_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "adaptation/flora_commonsense"]) == 0
    assert capsys.readouterr().out.endswith("with stand-ins for what is missing: add -c scale/stand_ins_chat\n")
    assert main(["plan", "adaptation/flora_commonsense"]) == 2
    said = capsys.readouterr().err
    assert "there is no causal language model in runs/llama" in said
    assert said.endswith("or plan with stand-ins for what is missing: add -c scale/stand_ins_chat\n")
    for command in ("check", "plan"):  # whose files nothing stands in for
        main([command, "compression/svd"])
        assert "stand-ins" not in "".join(capsys.readouterr())


def test_a_file_that_is_here_is_still_compared(capsys: pytest.CaptureFixture[str]) -> None:
    Path(WEIGHTS).parent.mkdir(parents=True)
    save_file({"backbone.weight": torch.zeros(3)}, WEIGHTS)
    assert main(["check", "robustness/nmtune"]) == 2
    said = capsys.readouterr().err
    assert "do not fit" in said
    assert "not here yet" not in said


def test_a_pattern_of_shards_is_here_only_as_a_whole(capsys: pytest.CaptureFixture[str]) -> None:
    Path("0.tar").touch()
    flags = ["data.init_args.shards=['{0..1}.tar']", "--fast"]
    assert main(["check", "contrastive/simclr_imagenet", *flags]) == 0
    assert "{0..1}.tar (data.init_args.shards.0)" in capsys.readouterr().err
    Path("1.tar").touch()
    assert main(["check", "contrastive/simclr_imagenet", *flags]) == 0
    assert "not here yet" not in capsys.readouterr().err


def test_only_check_goes_on_without_weights() -> None:
    layer = torch.nn.Linear(2, 2)
    with without_missing_weights():
        assert with_weights(layer, "gone.safetensors") is layer
    with pytest.raises(MissingFile):
        with_weights(layer, "gone.safetensors")
