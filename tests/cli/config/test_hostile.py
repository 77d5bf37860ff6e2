"""Every attempt of `hostile.py` is refused by `check`, and building refuses it too where `check` was never asked."""

import contextlib
import importlib.util
import os
import pkgutil
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from audited import nothing_happens

from lightspan.cli.config import allow
from lightspan.cli.config.build import build, resolve
from lightspan.cli.config.merge import merge, without_removed
from lightspan.cli.config.resolve import Resolved, with_layer
from lightspan.cli.config.tree import dump, plain, wrap
from lightspan.cli.main import main
from lightspan.core.errors import UserError

_SPEC = importlib.util.spec_from_file_location("hostile", Path(__file__).with_name("hostile.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
hostile = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(hostile)

ATTEMPTS = hostile.attempts()


def test_names_of_this_package_lead_to_something_that_must_be_refused() -> None:
    """A name that leads nowhere is refused for that, and shows nothing of the gate."""
    names = [name for name, _ in hostile.NAMES if re.fullmatch(r"lightspan(\.\w+)+", name, re.ASCII)]
    assert len(names) > 40
    for name in names:
        if "__builtins__" not in name:  # a mapping, which only code that evaluates names would enter
            pkgutil.resolve_name(name)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Resolved:
    """The sound recipe, built once so that all libraries are there before anybody listens."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "sound.yaml").write_text(dump(hostile.SOUND))
    resolved = resolve(str(folder / "sound.yaml"))
    inside = hostile.spec("lightspan.callbacks.resilience.checkpoint.Checkpoint", dirpath="${run}")
    for layer in ({}, hostile.device("cpu"), hostile.callback(inside)):
        with contextlib.suppress(UserError):  # jsonargparse looks for type stubs once, other libraries load on use
            build(unchecked(resolved, layer))
    return resolved


@pytest.fixture
def layer(request, tmp_path, monkeypatch) -> dict[str, Any]:
    """The attempt, with the names of a file that must not appear and of one that must not go."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "victim.yaml").write_text("class_path: os.system\ninit_args: {command: touch canary}\n")
    names = {"@CANARY@": str(tmp_path / "canary"), "@VICTIM@": str(tmp_path / "victim.yaml")}

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(child) for key, child in value.items()}
        if isinstance(value, list):
            return [filled(child) for child in value]
        for name, path in names.items():
            value = value.replace(name, path) if isinstance(value, str) else value
        return value

    return filled(ATTEMPTS[request.param])


def unchecked(sound: Resolved, layer: dict[str, Any]) -> Resolved:
    """What `resolve` would return if it checked nothing."""
    tree = merge(sound.tree, wrap(layer, "hostile.yaml:1"))
    return replace(sound, config=plain(without_removed(tree)), tree=tree)


def inert(layer: dict[str, Any]) -> bool:
    """Whether the builder alone makes nothing of it but a plain mapping, a network, or torch's own SGD."""
    names = ("harmless class under Any", "mapping passed on", "builder as callback", "short name for an optimizer")
    return layer in [ATTEMPTS[name] for name in names]


def test_there_are_some_two_hundred_attempts():
    assert len(ATTEMPTS) > 200


def test_what_happens_is_heard(sound, tmp_path):
    for act in (lambda: (tmp_path / "x").write_text("x"), lambda: os.system("true"), lambda: shutil.rmtree(tmp_path)):
        with pytest.raises(AssertionError), nothing_happens():
            act()


@pytest.mark.runs  # each worker of the tests builds the sound recipe in the first of them
@pytest.mark.parametrize("layer", ATTEMPTS, indirect=True)
def test_it_is_refused_and_nothing_happens(layer, sound, monkeypatch, tmp_path):
    with nothing_happens():
        with pytest.raises(UserError):
            with_layer(sound, layer, "hostile.yaml:1")  # a layer of the command line may name any place
        with contextlib.suppress(UserError) if inert(layer) else pytest.raises(UserError):
            build(unchecked(sound, layer), tmp_path / "run")
        # The builder alone, as if the gate stood open: it may build what does no harm, and that is all.
        monkeypatch.setattr(allow, "gate", lambda *_: [])
        with contextlib.suppress(UserError):
            build(unchecked(sound, layer), tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["victim.yaml"]


RECIPE, TO_RUN = "hostile.yaml", ("--run", "run")
LINES = {
    "check": [RECIPE],
    "show": [RECIPE, "--resolved"],
    "plan": [RECIPE],
    "fit": [RECIPE, *TO_RUN],
    "fit, dry": [RECIPE, "--dry-run"],
    "validate": [RECIPE, "--ckpt", "victim.yaml", *TO_RUN],
    "test": [RECIPE, "--ckpt", "victim.yaml", *TO_RUN],
    "predict": [RECIPE, "--ckpt", "victim.yaml", *TO_RUN],
    "submit": [RECIPE, "--to", "slurm", "--print", *TO_RUN],
    "intrinsic-dimension": [RECIPE, "--grid", "1,2", "--out", "run"],
    "prove-resume": [RECIPE],
    "export": ["stranger/checkpoints/last.ckpt", "--to", "safetensors"],
}


@pytest.mark.parametrize("verb", LINES)
@pytest.mark.parametrize("layer", ["untyped parameter", "Any in a mapping", "deep under Any"], indirect=True)
def test_every_verb_that_builds_goes_through_the_gate(verb, layer, sound, capsys, tmp_path):
    """Also the export of a run folder that somebody else made."""
    text = dump(plain(merge(wrap(hostile.SOUND, ""), wrap(layer, ""))))
    Path(RECIPE).write_text(text)
    Path("stranger/checkpoints").mkdir(parents=True)
    Path("stranger/checkpoints/last.ckpt").write_bytes(b"")
    Path("stranger/resolved.yaml").write_text(text)
    before = sorted(tmp_path.rglob("*"))
    with nothing_happens():
        assert main([verb.split(",")[0], *LINES[verb]]) == 2
    assert "in the configuration of" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
