"""`make quick` runs the test files nearest to what changed."""

import pytest
from affected import ALWAYS, affected
from import_graph import ROOT

pytestmark = pytest.mark.sweep  # reads the imports of every file


def names(*changed: str) -> list[str]:
    return [str(file.relative_to(ROOT)) for file in affected(set(changed))]


def test_tests_come_in_the_order_of_their_distance_from_a_change() -> None:
    found = names("framework/objectives/vicreg.py", "tests/objectives/test_koleo.py")
    assert found[0] == "tests/objectives/test_koleo.py"  # changed itself
    importers = found.index("tests/objectives/test_vicreg.py"), found.index("tests/methods/test_every_method.py")
    assert 0 < importers[0] < importers[1]  # through the method and the cases
    assert "tests/cli/studies/test_points.py" not in found


def test_recipes_and_pages_are_near_to_what_mentions_them_and_fixtures_to_their_folder() -> None:
    assert "tests/test_golden.py" in ALWAYS
    assert "tests/cli/test_cli.py" in names("recipes/language/quickstart.yaml")
    assert "tests/test_readme.py" in names("docs/first-method.md")
    assert set(names("tests/cli/runs/conftest.py")) >= {
        "tests/cli/runs/test_fits.py",
        "tests/cli/runs/test_catalogue.py",
    }
    assert names("docs/no-such" + "-page.md") == []
