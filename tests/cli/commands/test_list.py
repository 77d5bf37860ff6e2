"""`lightspan list`: what can be made by name, read from the sources without torch."""

import pytest

from lightspan.cli.main import main


def rows(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, list[str]]:
    assert main(["list", *words]) == 0
    header, *lines = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert header[0] == "name"
    return {name: [*rest] for name, *rest in lines}


def test_optimisers_methods_and_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    muons = rows(capsys, "optimizers", "muon")
    assert {"Muon", "NorMuon", "FactoredMuon"} <= {*muons}
    assert muons["NorMuon"][1:] == ["2510.05491", "lightspan.optim.muon.NorMuon"]
    methods = rows(capsys, "methods")
    assert methods["SimCLR"][1:] == ["2002.05709", "lightspan.methods.contrastive.simclr.SimCLR"]
    assert all(summary for summary, *_ in methods.values())
    assert "contrastive/simclr" in rows(capsys, "recipes", "simclr")


def test_mistakes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for words, named in (
        (["list", "optimizers", "xyzzy"], "xyzzy"),
        (["list", "things"], "things"),
        (["list"], "KIND"),
    ):
        assert main(words) == 2
        assert named in capsys.readouterr().err
