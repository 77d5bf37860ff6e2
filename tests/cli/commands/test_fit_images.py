"""`lightspan fit RECIPE --images FOLDER`: a folder of pictures in, an examined and exported encoder out."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from picture_files import write_pictures

from lightspan.cli.main import main

RECIPE = "contrastive/simclr"
SHORT = (
    *("--image-size", "8", "trainer.max_epochs=2", "trainer.log_every_n_steps=1", "trainer.accelerator=cpu"),
    *("model.init_args.backbone.init_args.stages=2", "model.init_args.projector.init_args.in_features=32"),
    *("trainer.logger.tensorboard=null", "trainer.callbacks.preemption=null", "trainer.callbacks.watchdog=null"),
    *("data.init_args.num_workers=0", "trainer.callbacks.feature_pictures.init_args.method=pca"),
)


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIGHTSPAN_RUN", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.runs
@pytest.mark.parametrize("labelled", [True, False])
def test_a_folder_in_gives_probes_pictures_an_encoder_and_a_report(
    labelled: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(Path("in"), {"cat": 6, "bird": 6} if labelled else {"": 12})
    assert main(["fit", RECIPE, "--images", "in", "--run", "out", *SHORT]) == 0
    said, run = capsys.readouterr(), Path("out")
    summary = json.loads((run / "summary.json").read_text())
    assert {"train_loss", "probe_rankme"} <= set(summary)
    assert ("probe_knn_accuracy" in summary, "probe_linear_accuracy" in summary) == (labelled, labelled)
    assert sorted(path.name for path in (run / "pictures").iterdir()) == [
        "first-batch.png",
        "map.png",
        "neighbours.png",
    ]
    assert (run / "report" / "report.html").read_text().count("data:image/png;base64,") == 3
    assert "12 picture files" in said.err
    assert "features read back differ by at most 0" in said.out
    features = torch.export.load(run / "export" / "encoder" / "encoder.pt2").module()(torch.rand(1, 3, 8, 8))
    assert features.shape == (1, 32)
    assert features.isfinite().all()
    card = (run / "export" / "encoder" / "README.md").read_text()
    assert "This folder holds the encoder of the recipe" in card
    assert 'torch.export.load("FOLDER/encoder.pt2")' in card
    assert "One run, one seed" in card
    if not labelled:  # what the last lines say to type next
        typed = re.findall(r"^(?:next: |      )lightspan (.+)$", said.out, re.MULTILINE)
        assert [line.split()[0] for line in typed] == ["report", "export"]
        assert [main(shlex.split(line)) for line in typed] == [0, 0]
    if labelled:  # a finished run goes on when it gets more epochs, with the pictures where it was
        assert main(["fit", RECIPE, "--images", "in", "--run", "out", *SHORT, "trainer.max_epochs=3"]) == 0
        assert json.loads((run / "summary.json").read_text())["steps"] == 3


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"": 0}, "the folder is empty"),
        ({"": 1}, "no readable pictures are left for val: 1 for train"),
        (None, "in does not exist"),
    ],
)
def test_folders_that_cannot_train_say_why_and_leave_no_step(
    classes: dict[str, int] | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if classes is not None:
        write_pictures(Path("in"), classes)
    assert main(["fit", RECIPE, "--images", "in", "--run", "out", *SHORT]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not list(Path().glob("out/checkpoints/*"))


def test_a_size_without_a_folder_and_files_that_are_no_pictures_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", RECIPE, "--image-size", "8"]) == 2
    assert "--image-size is the size of the pictures of --images FOLDER" in capsys.readouterr().err
    Path("in").mkdir()
    Path("in/notes.txt").write_text("x")
    assert main(["fit", RECIPE, "--images", "in"]) == 2
    assert "1 other files were left out: 1 .txt" in capsys.readouterr().err
