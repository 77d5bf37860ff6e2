"""The zoo of weights: a network trained for two steps goes all the way from the recipe to `lightspan pull`."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from evidence import zoo_weights
from evidence.zoo_networks import NETWORKS, Planned
from lightspan.cli.commands import pull
from lightspan.cli.config.signatures import Signature, signature
from lightspan.cli.main import main
from lightspan.cli.zoo.index import ADAPTER, INDEX, SHIPPED, read_index, settings_hash
from lightspan.core.files.runs import MODEL

SHORT = ("trainer.max_steps=2", "trainer.check_val_every_n_epoch=1")
TOY = Planned("supervised/turned_digits", "val/accuracy", "digits", "CC BY 4.0", flags=SHORT)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo with a network toy-digits of two seeds."""
    out = tmp_path_factory.mktemp("zoo")
    zoo_weights.add_to_index(out, {"toy-digits": zoo_weights.train("toy-digits", TOY, out, (0, 1))})
    return out


@pytest.mark.runs
@pytest.mark.smoke
def test_a_network_is_trained_measured_and_described(trained: Path) -> None:
    network = read_index(trained / INDEX)["toy-digits"]
    assert network.settings == settings_hash(zoo_weights.resolved_of(TOY).config)
    assert {*network.trained} == {*network.untrained} == {0, 1}
    assert network.trained != network.untrained
    assert all(0 <= value <= 1 for value in (*network.trained.values(), *network.untrained.values()))
    assert network.network["class_path"] == "lightspan.backbones.vision.MLP"
    assert network.made["processor"]
    card = (trained / "toy-digits" / "README.md").read_text()
    assert network.sha256 in card
    assert "CC BY 4.0" in card


@pytest.mark.runs
def test_a_run_that_is_there_is_not_made_again(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo_weights, "lightspan", lambda line: pytest.fail(f"ran {line}"))
    found = list(zoo_weights.measured(TOY, (0, 1), trained / "runs" / "toy-digits"))
    network = read_index(trained / INDEX)["toy-digits"]
    assert {seed: round(value, 6) for seed, _, value, _ in found} == network.trained


@pytest.mark.runs
def test_it_is_pulled_with_the_weights_of_its_run(trained: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["pull", "toy-digits", "--from", str(trained), "--out", str(tmp_path / "out")]) == 0
    python = capsys.readouterr().out.split("in Python:\n\n")[1].split("\nin a recipe")[0]
    names: dict[str, Any] = {}
    exec(python, names)
    assert sum(weight.numel() for weight in names["encoder"].parameters()) > 0


@pytest.mark.runs
def test_what_is_kept_is_shipped_while_it_is_small(trained: Path, tmp_path: Path, monkeypatch: Any) -> None:
    zoo_weights.keep(["toy-digits"], trained, tmp_path)
    assert (tmp_path / "toy-digits" / MODEL).read_bytes() == (trained / "toy-digits" / MODEL).read_bytes()
    monkeypatch.setattr(zoo_weights, "SHIPPED_BYTES", 1000)
    zoo_weights.keep(["toy-digits"], trained, tmp_path)
    assert [*read_index(tmp_path / INDEX)] == ["toy-digits"]
    assert not (tmp_path / "toy-digits" / MODEL).exists()


@pytest.mark.runs
def test_it_is_reproduced_and_other_figures_lie_outside(
    trained: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    from evidence import reproduce

    monkeypatch.setitem(NETWORKS, "toy-digits", TOY)
    monkeypatch.setattr(reproduce, "SHIPPED", trained)
    assert reproduce.main(["toy-digits", "--out", str(tmp_path)]) == 0
    assert "2 of 2 figures lie within" in capsys.readouterr().out
    stored = json.loads((trained / INDEX).read_text())
    stored["networks"]["toy-digits"] |= {"trained": {"0": 2.0}, "untrained": {"0": 0.5}, "settings": "0" * 64}
    (tmp_path / INDEX).write_text(json.dumps(stored))
    monkeypatch.setattr(reproduce, "SHIPPED", tmp_path)
    assert reproduce.main(["toy-digits", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "OUTSIDE  val/accuracy, toy-digits: now" in told
    assert "the settings of supervised/turned_digits have changed" in told


@pytest.mark.runs
def test_an_adapter_is_written_without_what_it_adapts(tmp_path: Path, capsys: Any) -> None:
    from lightspan.adapters.state import load_adapter
    from lightspan.backbones.vision import MLP

    callback, settings = "trainer.callbacks.adaptation", "trainer.callbacks.adaptation.init_args"
    flags = (
        f"{callback}.class_path=lightspan.callbacks.training.adaptation.Adaptation",
        f"{settings}.spec.class_path=lightspan.adapters.lora.LoRA",
        f"{settings}.match=[backbone.*]",
        f"{settings}.train=[head.*]",
    )
    planned = Planned(TOY.recipe, TOY.metric, TOY.data, TOY.data_licence, flags=SHORT + flags, kind=ADAPTER)
    network = zoo_weights.train("toy-adapter", planned, tmp_path, (0,))
    zoo_weights.add_to_index(tmp_path, {"toy-adapter": network})
    assert main(["pull", "toy-adapter", "--from", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    encoder = "encoder = MLP(in_shape=[1, 8, 8], hidden=[200, 200])\nload_adapter(encoder, "
    assert encoder in capsys.readouterr().out
    network = MLP(in_shape=(1, 8, 8), hidden=[200, 200])
    load_adapter(network, tmp_path / "out" / MODEL, other_weights=True, show=False)  # of this seed, not of that run


def test_the_page_has_every_planned_network_and_the_figures_of_the_index() -> None:
    assert zoo_weights.page_table() in zoo_weights.PAGE.read_text(encoding="utf-8"), "make pages"


@pytest.mark.parametrize("name", NETWORKS)
def test_every_planned_network_is_one_that_its_recipe_trains(name: str) -> None:
    planned = NETWORKS[name]
    resolved = zoo_weights.resolved_of(planned)
    network = zoo_weights.network_in(planned, resolved.config)
    taken = signature(network["class_path"])
    assert isinstance(taken, Signature)
    assert {*network.get("init_args", {})} <= {*taken.parameters}
    assert all(planned.data and planned.data_licence and planned.licence for planned in [planned])
    assert (planned.kind == ADAPTER) == ("adaptation" in resolved.config["trainer"].get("callbacks", {}))


def test_the_index_that_lightspan_ships_is_of_planned_networks_with_present_settings() -> None:
    for name, network in read_index(SHIPPED / INDEX).items():
        assert network.settings == settings_hash(zoo_weights.resolved_of(NETWORKS[name]).config), (
            f"train {name} again: make zoo-weights ARGS={name}, and keep it"
        )
    shipped = list(SHIPPED.glob(f"*/{MODEL}"))
    assert sum(path.stat().st_size for path in shipped) <= zoo_weights.SHIPPED_BYTES
    assert {path.parent.name for path in shipped} <= {*read_index(pull.SHIPPED / INDEX)}
