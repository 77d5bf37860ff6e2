"""`lightspan pull`: weights are what the index promises and can be used as it says; a hostile zoo gives nothing."""

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from zoo_folders import NETWORK, described, toy_network, write_index

from lightspan.adapters.inject import adapt
from lightspan.adapters.lora import LoRA
from lightspan.adapters.state import save_adapter, write_tensors
from lightspan.cli.commands import pull
from lightspan.cli.config.resolve import resolve
from lightspan.cli.main import main
from lightspan.cli.zoo.index import INDEX
from lightspan.core.files.runs import EXPORT, MODEL


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def said(capsys: pytest.CaptureFixture[str], *words: object, status: int = 0) -> str:
    """What `lightspan pull` prints, to standard error where it refuses."""
    assert main(["pull", *map(str, words)]) == status
    found = capsys.readouterr()
    assert "Traceback" not in found.err
    return found.err if status else found.out


def blocks(text: str) -> tuple[str, str]:
    """The lines of Python and the lines of a recipe."""
    _, python, recipe = re.split(r"\nin Python:\n\n|\nin a recipe, .*:\n\n", text)
    return python, recipe


def test_networks_are_listed_with_their_floor(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header, row = said(capsys, "--from", zoo).splitlines()
    found = dict(zip(header.split("\t"), row.split("\t"), strict=True))
    assert (found["name"], found["trained"], found["untrained"]) == ("toy-digits", "0.5 to 0.75", "0.125")
    assert found["bytes"] == f"{(zoo / 'toy-digits' / MODEL).stat().st_size:,}"


def test_what_lightspan_ships_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, *rows = said(capsys).splitlines()
    for name in (row.split("\t")[0] for row in rows):
        if (pull.SHIPPED / name).is_dir():
            said(capsys, name, "--out", tmp_path / name)


def test_weights_are_pulled_and_used_as_the_command_says(zoo: Path, tmp_path: Path, capsys: Any) -> None:
    text = said(capsys, "toy-digits", "--from", zoo)
    file = tmp_path / "cache" / "lightspan" / "zoo" / "toy-digits" / MODEL
    assert file.read_bytes() == (zoo / "toy-digits" / MODEL).read_bytes()
    python, recipe = blocks(text)
    names: dict[str, Any] = {}
    exec(python, names)
    for name, tensor in toy_network().state_dict().items():
        assert torch.equal(names["encoder"].state_dict()[name], tensor)
    (overlay := tmp_path / "start.yaml").write_text(recipe)
    resolved = resolve("supervised/turned_digits", [str(overlay)])
    assert resolved.config["model"]["init_args"]["backbone"]["init_args"] == {"path": str(file), "module": NETWORK}
    card = (file.parent / "README.md").read_text()
    assert python.strip() in card
    assert "| seed 1 | 0.5 | 0.125 |" in card
    assert "make zoo-weights ARGS=toy-digits" in card


def test_an_adapter_is_pulled_and_loaded_as_the_command_says(zoo: Path, tmp_path: Path, capsys: Any) -> None:
    (weights := zoo / "toy-adapter" / MODEL).parent.mkdir()
    linear = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 2}}
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    adapt(layer, ["0"], LoRA(rank=1), show=False)
    save_adapter(layer, weights)
    write_index(zoo, toy_adapter=described(weights, kind="adapter", network=linear))
    text = said(capsys, "toy-adapter", "--from", zoo, "--out", tmp_path / "out")
    assert "from lightspan.adapters.state import load_adapter\nfrom torch.nn import Linear\n" in text
    assert f"load_adapter(encoder, '{tmp_path / 'out' / MODEL}')" in text
    assert "in a recipe" not in text


def test_a_second_pull_finds_the_weights_and_replaces_others_only_if_told(
    zoo: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    said(capsys, "toy-digits", "--from", zoo, "--out", out)
    before = (out / MODEL).stat().st_mtime_ns
    assert "has these weights already" in said(capsys, "toy-digits", "--from", zoo, "--out", out)
    assert (out / MODEL).stat().st_mtime_ns == before
    (out / MODEL).write_bytes(b"damaged")
    assert "--overwrite" in said(capsys, "toy-digits", "--from", zoo, "--out", out, status=2)
    said(capsys, "toy-digits", "--from", zoo, "--out", out, "--overwrite")
    assert (out / MODEL).read_bytes() == (zoo / "toy-digits" / MODEL).read_bytes()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert "not an earlier export" in said(
        capsys, "toy-digits", "--from", zoo, "--out", tmp_path / "mine", "--overwrite", status=2
    )


def test_a_file_that_lightspan_lists_and_another_one_are_told_apart(
    zoo: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shipped := tmp_path / "shipped").mkdir()
    monkeypatch.setattr(pull, "SHIPPED", shipped)
    write_index(shipped)
    assert "does not list this file" in said(capsys, "toy-digits", "--from", zoo)
    (shipped / INDEX).write_text((zoo / INDEX).read_text())
    assert "note: " not in said(capsys, "toy-digits", "--from", zoo)
    assert "make zoo-weights ARGS=toy-digits" in said(capsys, "toy-digits", "--out", tmp_path / "new", status=2)
    write_index(shipped, toy_digits=described(zoo / "toy-digits" / MODEL, sha256="1" * 64))
    assert "lists another file of this name" in said(capsys, "toy-digits", "--from", zoo)


def test_mistakes_are_named(zoo: Path, tmp_path: Path, capsys: Any) -> None:
    assert "did you mean toy-digits?" in said(capsys, "toy-digit", "--from", zoo, status=2)
    assert f"there is no {tmp_path / INDEX}" in said(capsys, "--from", tmp_path, status=2)
    assert "--from is empty" in said(capsys, "--from", "", status=2)
    for place in ("https://lab/zoo", "file:///zoo", "s3://key:secret@lab/zoo", "s3://"):
        told = said(capsys, "--from", place, status=2)
        assert "secret" not in told
        assert "--from" in told or "is not the address" in told


LONG = "x" * 500
DEEP: Any = 1
for _ in range(100):
    DEEP = [DEEP]


def with_setting(**settings: Any) -> dict[str, Any]:
    return {"class_path": NETWORK["class_path"], "init_args": settings}


HOSTILE = {
    "a title that controls the terminal": {"title": "x\x1b]0;pwn\x07"},
    "a long title": {"title": LONG},
    "no title": {"title": None},
    "another kind": {"kind": "pickle"},
    "a recipe elsewhere": {"recipe": "../../etc/passwd"},
    "many flags": {"flags": ["a=1"] * 1000},
    "a seed that is no number": {"seed": True},
    "a huge size": {"bytes": 2**50},
    "a size below nothing": {"bytes": -1},
    "no digest": {"sha256": "0"},
    "a digest in capitals": {"sha256": "A" * 64},
    "no figure": {"trained": {}},
    "a figure that is not finite": {"trained": {"0": float("nan")}},
    "a figure of no seed": {"untrained": {"x": 1.0}},
    "a place that is code": {"place": "model.init_args.backbone = 1; import os"},
    "an unknown key": {"url": "https://elsewhere"},
    "facts of any shape": {"made": {"cpu": ["x"]}},
    "a class outside": {"network": {"class_path": "os.system", "init_args": {"command": "touch pwned"}}},
    "a function inside": {"network": {"class_path": "lightspan.core.files.atomic.remove", "init_args": {"path": "/"}}},
    "a class outside, deep inside": {"network": with_setting(hidden=[{"class_path": "subprocess.Popen"}])},
    "a setting that is code": {"network": with_setting(**{"hidden=[]); import os; print(": 1})},
    "a nest": {"network": with_setting(hidden=DEEP)},
    "a text that controls the terminal": {"network": with_setting(pool="\x1b[31m")},
    "a network that is none": {"network": "lightspan.backbones.vision.MLP"},
    "a number of infinite size": {"network": with_setting(width=float("inf"))},
}


@pytest.mark.parametrize("changed", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_index_is_refused_with_one_error_and_nothing_is_written(
    zoo: Path, tmp_path: Path, capsys: Any, changed: dict[str, Any]
) -> None:
    write_index(zoo, toy_digits=described(zoo / "toy-digits" / MODEL) | changed)
    for words in ([], ["toy-digits"]):
        told = said(capsys, *words, "--from", zoo, status=2)
        assert told.startswith(f"lightspan: {zoo / INDEX}: toy-digits ")
        assert told.count("\n") == 1
        assert len(told) < 700
        assert "\x1b" not in told
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/b", ".", "", "A", "x" * 65, "a\n", "ä"])
def test_a_name_that_leads_out_of_the_zoo_is_refused(zoo: Path, tmp_path: Path, capsys: Any, name: str) -> None:
    write_index(zoo, **{name: described(zoo / "toy-digits" / MODEL)})
    assert "has a network called" in said(capsys, name or "x", "--from", zoo, status=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zoo"]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "lightspan zoo 2", "networks": {}}', '{"format": "lightspan zoo 1"}', "[" * 9999],
)
def test_what_is_no_index_is_refused(zoo: Path, capsys: Any, text: str) -> None:
    (zoo / INDEX).write_text(text)
    assert f"{zoo / INDEX} is no index of weights" in said(capsys, "--from", zoo, status=2)


def test_an_index_above_the_limit_is_not_read(zoo: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTSPAN_MAX_SETTINGS_BYTES", "100")
    assert "the limit is 100" in said(capsys, "--from", zoo, status=2)


def exchanged(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def behind_a_link(file: Path) -> None:
    file.rename(elsewhere := file.parents[2] / "elsewhere")
    file.symlink_to(elsewhere)


def behind_a_linked_folder(file: Path) -> None:
    file.parent.rename(elsewhere := file.parents[2] / "elsewhere")
    file.parent.symlink_to(elsewhere)


def a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


CHANGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "another byte": (exchanged, "damaged or exchanged"),
    "a byte more": (lambda file: file.write_bytes(file.read_bytes() + b"x"), "but the index says"),
    "a byte less": (lambda file: file.write_bytes(file.read_bytes()[:-1]), "but the index says"),
    "a link": (behind_a_link, "behind a link"),
    "a linked folder": (behind_a_linked_folder, "behind a link"),
    "a pipe": (a_pipe, "is no file that can be read"),
    "nothing": (Path.unlink, "make zoo-weights ARGS=toy-digits"),
}


@pytest.mark.parametrize(("change", "message"), CHANGED.values(), ids=CHANGED)
def test_other_weights_than_the_index_says_are_refused_unread(
    zoo: Path, tmp_path: Path, capsys: Any, change: Callable[[Path], object], message: str
) -> None:
    change(zoo / "toy-digits" / MODEL)
    assert message in said(capsys, "toy-digits", "--from", zoo, "--out", tmp_path / "out", status=2)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_an_index_behind_a_link_is_refused_and_a_zoo_behind_one_is_the_users_own(zoo: Path, capsys: Any) -> None:
    (zoo.parent / "mine").symlink_to(zoo)
    said(capsys, "--from", zoo.parent / "mine")
    (zoo / INDEX).rename(zoo.parent / INDEX)
    (zoo / INDEX).symlink_to(zoo.parent / INDEX)
    assert "behind a link" in said(capsys, "--from", zoo, status=2)


class Loud:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch pwned",)


def test_a_pickle_and_tensors_of_another_network_are_refused_though_their_digest_is_right(
    zoo: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = zoo / "toy-digits" / MODEL
    write_index(zoo, toy_digits=described(weights, kind="adapter"))
    assert "not a file of 'lightspan adapter" in said(capsys, "toy-digits", "--from", zoo, status=2)
    write_tensors(weights, {"backbone.weight": torch.ones(1), "head.weight": torch.ones(1)}, {"format": "pt"})
    write_index(zoo, toy_digits=described(weights))
    assert "not tensors named backbone.*" in said(capsys, "toy-digits", "--from", zoo, status=2)
    weights.write_bytes(pickle.dumps(Loud()))
    write_index(zoo, toy_digits=described(weights))
    assert "no safetensors file" in said(capsys, "toy-digits", "--from", zoo, status=2)
    assert not (tmp_path / "pwned").exists()
    assert not list((tmp_path / "cache").rglob(EXPORT))


def test_nothing_of_the_index_is_text_of_another_kind_on_the_card(zoo: Path, tmp_path: Path, capsys: Any) -> None:
    weights = zoo / "toy-digits" / MODEL
    hostile = "---<script>`a`|b|[c](javascript:d)"
    write_index(
        zoo, toy_digits=described(weights, title=hostile, data=hostile, licence=hostile, made={hostile: hostile})
    )
    said(capsys, "toy-digits", "--from", zoo, "--out", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "<script" not in card.split("---\n", 2)[2]
    assert not re.search(r"(?<!\\)\]\(javascript", card.split("---\n", 2)[2])
    assert yaml.safe_load(card.split("---\n")[1])["license"] == hostile
    record = json.loads((tmp_path / "out" / EXPORT).read_text())
    assert record["name"] == "toy-digits"
