"""The search behind the quickstart's rates: its record is that of the search that would be made now."""

import importlib.util
from pathlib import Path

import pytest

from lightspan.config.resolve import resolve

FILE = Path(__file__).parents[2] / "benchmarks" / "quickstart_sweep.py"
spec = importlib.util.spec_from_file_location("quickstart_sweep", FILE)
assert spec is not None
assert spec.loader is not None
sweep = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweep)


@pytest.mark.parametrize("name", list(sweep.RECIPES))
def test_the_recorded_search_ends_at_the_rates_of_the_recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every point that the search asks for is in the results: none would be trained."""
    monkeypatch.setattr(sweep, "online_loss", None)
    config = resolve(sweep.RECIPES[name]).config["model"]["init_args"]
    assert sweep.search(name) == (config["optimizer"]["init_args"]["lr"], config["groups"]["other_lr"])
