"""Classes are found in sources alone, and made by their names."""

import importlib
import sys
from pathlib import Path

import pytest

from lightspan.core.classes import ClassEntry, create, list_classes
from lightspan.core.errors import UserError
from lightspan.core.spelling import nearest

BASE = '''
from abc import ABC, abstractmethod

class Shape(ABC):
    @abstractmethod
    def area(self): ...

class Half(Shape):
    """Still abstract."""

class _Private(Shape):
    def area(self): return 0
'''
SQUARE = '''"""Square: all sides alike. Its corners too.

Source: Euclid et al., "Elements", arXiv
1234.56789, and arXiv 0000.00000.
"""
raise AssertionError("imported")

from things.base import Half, _Private

class Square(Half):
    """Has sides."""
    def area(self): return 1

class Other:
    """Descends from nothing."""
'''
ROUND = '''"""Round things."""
from things.base import Half, Shape

class FullCircle(Half):
    """A circle (Archimedes et al., arXiv 2222.33333): area pi r^2. More."""
    def __init__(self, radius, *, sign=1): self.radius = sign * radius
    def area(self): return 3 * self.radius**2

class Ring(FullCircle):
    """A circle without its middle"""
'''


@pytest.fixture
def things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[ClassEntry]:
    folder = tmp_path / "things"
    (folder / "inner").mkdir(parents=True)
    (folder / "slow").mkdir()
    files = {"__init__": "", "base": BASE, "inner/__init__": "", "inner/square": SQUARE, "inner/round": ROUND}
    for name, text in {**files, "slow/__init__": "", "slow/twin": SQUARE}.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    found = list_classes("things", "things.base.Shape", {"things.slow"})
    assert "things" not in sys.modules
    yield found
    for name in [name for name in sys.modules if name.split(".")[0] == "things"]:
        del sys.modules[name]


def test_public_and_concrete_classes_are_listed_with_a_sentence_and_a_paper(things: list[ClassEntry]) -> None:
    assert things == [
        ("FullCircle", "A circle: area pi r^2", "2222.33333", "things.inner.round.FullCircle"),
        ("Ring", "A circle without its middle", "", "things.inner.round.Ring"),
        ("Square", "All sides alike", "1234.56789", "things.inner.square.Square"),
    ]


def test_a_name_is_found_in_any_spelling_and_only_its_module_is_imported(things: list[ClassEntry]) -> None:
    for name in ("FullCircle", "full_circle", "full-circle", "FULLCIRCLE"):
        made = create(name, things, "shape", 2, sign=-1)
        assert (type(made).__name__, made.radius) == ("FullCircle", -2)
    assert "things.inner.square" not in sys.modules


def test_an_unknown_name_and_settings_that_do_not_fit_are_refused(things: list[ClassEntry]) -> None:
    with pytest.raises(UserError, match="'full_circel'; did you mean FullCircle"):
        create("full_circel", things, "shape")
    for settings in ({}, {"radius": 1, "colour": 2}):
        with pytest.raises(UserError, match=r"FullCircle: .*(radius|colour)"):
            create("full_circle", things, "shape", **settings)


def test_the_nearest_name_is_found_in_any_case() -> None:
    assert nearest("galor", ["GaLore", "Trion"]) == "did you mean GaLore? "
    assert nearest("LR", ["learning_rate"]) == "did you mean learning_rate? "
    assert nearest("xyz", ["GaLore"]) == nearest("x", []) == ""
