"""docs/pictures.md: its pictures, all of them small, come from the commands that it prints."""

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightspan.cli.config.resolve import ANY_KIND, resolve

ROOT = Path(__file__).parents[1]
_SPEC = importlib.util.spec_from_file_location("pictures", ROOT / "tools" / "pictures.py")
assert _SPEC
assert _SPEC.loader
tool = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tool)
PAGE = tool.PAGE.read_text(encoding="utf-8")
PICTURES = sorted((ROOT / "docs" / "pictures").iterdir())


def test_every_picture_is_on_the_page_once_and_has_its_command() -> None:
    drawn = tool.drawn(PAGE)
    assert sorted(f"{run}-{what}.png" for run, what in drawn) == [path.name for path in PICTURES]
    assert {run for run, _ in drawn} == {run for run, _ in tool.commands(PAGE)}


def test_pictures_are_small() -> None:
    for path in PICTURES:
        with Image.open(path) as picture:
            assert picture.width <= tool.MOST_WIDTH, path.name
            assert picture.mode == "P", path.name
    sizes = {path.name: path.stat().st_size for path in PICTURES}
    assert max(sizes.values()) < 100_000, sizes
    assert sum(sizes.values()) < 700_000, sizes


def test_every_command_can_be_given(tmp_path: Path) -> None:
    for name, text in tool.overlays(PAGE).items():
        (tmp_path / name).write_text(text)
    for _, (verb, *words) in tool.commands(PAGE):
        if verb in ("fit", "run"):
            recipe, *rest = words[: words.index("--run")]
            files = [str(tmp_path / rest[at + 1]) for at, word in enumerate(rest) if word == "-c"]
            resolve(recipe, files, [word for word in rest if "=" in word], kinds=ANY_KIND)


def test_a_picture_is_made_narrow_and_of_few_colours() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 2 * tool.MOST_WIDTH, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream := io.BytesIO(), "png")
    made = tool.small(stream.getvalue())
    with Image.open(io.BytesIO(made)) as picture:
        assert picture.size == (tool.MOST_WIDTH, 30)
        assert len(picture.convert("RGB").getcolors(1000)) <= 128
    assert tool.small(stream.getvalue()) == made


def test_a_report_without_a_browser_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool.shutil, "which", lambda program: None)
    with pytest.raises(SystemExit, match="simclr needs chromium"):
        tool.source("simclr", tool.REPORT)
