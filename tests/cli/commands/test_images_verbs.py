"""`--images FOLDER` lays the same pictures over a recipe in every verb that takes one."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from picture_files import write_every_kind, write_pictures

from lightspan.cli.commands import arguments
from lightspan.cli.commands.arguments import REPLACING
from lightspan.cli.main import main
from lightspan.datamodules.shards.headers import looked_at

TINY = ("--images", "in", "--image-size", "8")
MAE = (
    "masked/mae",
    *TINY,
    *("trainer.max_epochs=1", "trainer.accelerator=cpu", "data.init_args.num_workers=0"),
    *("trainer.callbacks.preemption=null", "trainer.callbacks.watchdog=null", "trainer.logger.tensorboard=null"),
    *("model.init_args.backbone.init_args.depth=1", "model.init_args.decoder.init_args.depth=1"),
    "trainer.callbacks.feature_pictures.init_args.method=pca",
)


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIGHTSPAN_RUN", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_pictures(Path("in"), {"cat": 6, "bird": 6})


def test_every_verb_that_trains_takes_the_users_data_and_all_ask_one_place() -> None:
    without = {"run", "show"}  # which do not train
    commands = {path.stem: path.read_text() for path in Path(str(arguments.__file__)).parent.glob("*.py")}
    verbs = {name for name, text in commands.items() if "add_recipe_arguments(parser)" in text} - without
    assert len(verbs) > 8
    assert verbs == {name for name, text in commands.items() if "add_data_arguments(parser)" in text}
    assert not any(re.search(r"\bresolve\(args", commands[name]) for name in verbs)
    assert arguments.IMAGE_SIZE == 64


def test_check_says_what_changes_and_finds_mistakes_in_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *MAE]) == 0
    said = capsys.readouterr()
    assert "note: model.init_args.backbone.init_args.in_chans=3" in said.err
    assert "masked/mae: no problems" in said.out
    assert main(["check", *MAE, "data.init_args.sise=3"]) == 2
    assert "did you mean size" in capsys.readouterr().err
    assert main(["check", "masked/mae", "--images", "none"]) == 2
    assert "none does not exist" in capsys.readouterr().err
    assert main(["check", "analysis/knn_digits", *TINY]) == 2
    assert "does not train; use it with `lightspan run`" in capsys.readouterr().err
    assert main(["check", "masked/mae", "--image-size", "8"]) == 2
    assert "--image-size is the size of the pictures of --images FOLDER" in capsys.readouterr().err


def test_check_finds_pictures_that_cannot_be_whole_and_leaves_those_alone_that_can(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_every_kind(tmp_path / "in" / "kinds")
    assert main(["check", *MAE]) == 0
    half = (tmp_path / "in/cat/000.png").read_bytes()
    (tmp_path / "in/cat/half.png").write_bytes(half[: len(half) // 2])
    (tmp_path / "in/cat/empty.png").touch()
    (tmp_path / "in/cat/text.png").write_text("<html>")
    jpeg = (tmp_path / "in/kinds/rgb.JPEG").read_bytes()
    (tmp_path / "in/bird/half.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (tmp_path / "in/bird/with-more.jpg").write_bytes(jpeg + b"a camera's own data")  # as good as any
    (tmp_path / "in/bird/without-its-end.png").write_bytes(half[:-12])  # and so is one with all its pixels
    assert main(["check", *MAE]) == 2
    said = capsys.readouterr().err
    assert "data.init_args.folder: 4 of 34 pictures cannot be read: bird/half.jpg (" in said
    assert "cat/empty.png (it is empty), cat/half.png (" in said
    assert "cat/text.png (it is not a JPEG, PNG, WebP, BMP, GIF or TIFF image); repair or remove them, or train" in said
    assert main(["check", *MAE, "data.init_args.skip_damaged=true"]) == 0
    assert "note: data.init_args.folder: 4 of 34 pictures cannot be read: " in capsys.readouterr().err


def test_of_many_pictures_as_many_as_the_limit_are_looked_at_from_the_first_to_the_last() -> None:
    assert looked_at(4, most=4) == [0, 1, 2, 3]
    numbers = looked_at(1_000, most=10)
    assert (len(numbers), numbers[0], numbers[-1]) == (10, 0, 999)
    assert {*np.diff(numbers)} == {111}


@pytest.mark.runs
def test_a_plan_is_of_the_network_for_these_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    weights = []
    for size in ("8", "64"):
        assert main(["plan", "masked/mae", "--images", "in", "--image-size", size, "data.init_args.batch_size=4"]) == 0
        weights.append(float(re.findall(r"weights\W+([\d.]+)", capsys.readouterr().out)[0]))
    assert weights[0] < weights[1]  # patches of 64 x 64 pixels hold more


def test_a_job_gets_the_pictures_and_its_container_sees_them(capsys: pytest.CaptureFixture[str]) -> None:
    one = ("trainer.devices=1", "trainer.num_nodes=1")
    assert main(["submit", "masked/mae", *TINY, "--to", "slurm", "--image", "a.sif", "--print", *one]) == 0
    script = capsys.readouterr().out
    assert "fit masked/mae --images in --image-size 8 trainer.devices=1" in script
    assert f"--bind={Path('in').absolute()}" in script
    for option in REPLACING:
        Path("table").touch()
        place = "table" if option == "--table" else "in"
        pods = ["--to", "kubernetes", "--image", "a", "--print"]
        assert main(["submit", "masked/mae", option, place, *pods, *one]) == 2
        assert f"{option} does not work with --to kubernetes, only with slurm and local" in capsys.readouterr().err


def test_a_check_counts_the_settings_that_the_users_data_brought(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *MAE, "--fast"]) == 0
    counted = re.search(r"(\d+) of them from the command line", capsys.readouterr().out)
    assert counted is not None
    assert int(counted[1]) > sum("=" in word for word in MAE)


@pytest.mark.runs
def test_a_run_of_a_masked_method_shows_its_guesses_and_is_validated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *MAE, "--run", "out"]) == 0
    assert (Path("out/pictures/reconstructions.png")).exists()
    assert Path("out/report/report.html").read_text().count("data:image/png;base64,") == 4
    assert main(["validate", *MAE, "--ckpt", "out", "--run", "validated"]) == 0, capsys.readouterr().err
    assert 0 <= json.loads(Path("validated/validate.json").read_text())["probe/knn_accuracy"] <= 1
