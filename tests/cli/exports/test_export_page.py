"""docs/export.md: its commands and its Python run as they stand, one after the other."""

import re
import shlex
from pathlib import Path

import pytest
from export_runs import run_with_checkpoint

from lightspan.cli.config.build import resolve
from lightspan.cli.main import main

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

PAGE = (Path(__file__).parents[3] / "docs" / "export.md").read_text()
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", PAGE, re.DOTALL)
RUNS = {"runs/mine": "contrastive/simclr", "runs/mae": "masked/mae"}


@pytest.mark.runs
def test_the_page_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, recipe in RUNS.items():
        run_with_checkpoint(tmp_path / folder, resolve(recipe, (), (), ()).document(), recipe)
    names: dict[str, object] = {}
    for language, text in BLOCKS:
        if language == "python":
            exec(text, names)
            continue
        for line in text.strip().splitlines():
            verb, *words = shlex.split(line)
            assert (verb, main(words)) == ("lightspan", 0), line
    assert {path.name for path in tmp_path.iterdir()} >= {"weights", "encoder-onnx", "encoder-torch", "encoder"}
    assert names["features"].shape == (5, 128)  # type: ignore[attr-defined]
