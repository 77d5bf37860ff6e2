import os
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightspan.core.errors import UserError
from lightspan.datamodules.image.sets.glyphs import CHARACTERS, ROBOTO, FontShots, common_letters, glyphs, shipped


def test_every_font_has_as_many_shots_and_no_character_is_in_both_parts() -> None:
    training, test = FontShots(shots=7).load()
    assert np.bincount(training.labels).tolist() == [7, 7]
    assert np.bincount(test.labels).tolist() == [len(CHARACTERS) - 7] * 2
    for label, name in enumerate(("DejaVuSans-Bold", "DejaVuSans-Oblique")):
        parts = [*training.images[training.labels == label], *test.images[test.labels == label]]
        assert sorted(map(bytes, parts)) == sorted(map(bytes, glyphs(shipped(name))))


def test_shots_are_a_function_of_the_seed() -> None:
    one, again, other = (FontShots(draw_seed=seed).load()[0].images for seed in (0, 0, 1))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_bold_letters_have_more_ink_and_every_glyph_lies_inside_its_picture() -> None:
    plain, bold = glyphs(shipped("DejaVuSans")), glyphs(shipped("DejaVuSans-Bold"))
    assert (bold.mean(axis=(1, 2)) > plain.mean(axis=(1, 2))).all()
    assert plain.max(axis=(1, 2)).min() > 200
    assert not plain[:, [0, -1]].any()
    assert not plain[:, :, [0, -1]].any()


def test_letters_are_in_every_font_and_differ_and_each_is_whole() -> None:
    paths = [shipped("DejaVuSans"), shipped("cmr10")]
    letters = common_letters(paths)
    assert {*string.ascii_letters} <= {*letters}
    assert all(letter.islower() or letter.isupper() for letter in letters)
    for images in (glyphs(path, letters) for path in paths):
        assert not images[:, [0, -1]].any()
        assert not images[:, :, [0, -1]].any()
    many = common_letters(paths[:1])
    assert len({image.tobytes() for image in glyphs(paths[0], many)}) == len(many) > len(letters)
    assert "A" in many
    assert "\N{CYRILLIC CAPITAL LETTER A}" not in many  # which looks like it


def test_a_font_of_letters_has_those_that_are_not_shots_for_tests() -> None:
    font = str(shipped("cmr10"))
    letters = common_letters([shipped("cmr10")])
    training, test = FontShots([font], len(letters) - 3, characters="letters").load()
    assert [len(training.labels), len(test.labels)] == [len(letters) - 3, 3]
    with pytest.raises(UserError, match="shots"):
        FontShots([font], len(letters), characters="letters").load()


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.ttf").write_text("no font")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"fonts": []}, "fonts"),
        ({"shots": 0}, "shots"),
        ({"shots": 62}, "shots"),
    ]
    missing, broken = str(ROBOTO / "no.ttf"), str(tmp_path / "no.ttf")
    cases += [({"draw_seed": -1}, "draw_seed"), ({"fonts": [missing]}, "fonts-roboto"), ({"fonts": [broken]}, "fonts")]
    for settings, named in [*cases, ({"fonts": [broken], "characters": "letters"}, "fonts")]:
        with pytest.raises(UserError, match=named):
            FontShots(**settings).load()


def test_a_font_that_is_damaged_inside_or_no_regular_file_is_refused(tmp_path: Path) -> None:
    content = bytearray(shipped("DejaVuSans").read_bytes())
    tables = {bytes(content[at : at + 4]): at for at in range(12, 12 + 16 * content[5], 16)}
    first, size = (int.from_bytes(content[at : at + 4], "big") for at in (tables[b"glyf"] + 8, tables[b"glyf"] + 12))
    content[first : first + size] = b"\xff" * size  # the outlines alone, which are read when a character is drawn
    (tmp_path / "torn.ttf").write_bytes(content)
    os.mkfifo(tmp_path / "pipe.ttf")
    for name in ("torn.ttf", "pipe.ttf"):
        with pytest.raises(UserError, match=name):
            glyphs(tmp_path / name)
