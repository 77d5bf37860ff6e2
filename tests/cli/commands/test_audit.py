"""`lightspan audit`: every format, alone and as a pair, its files, and one clear error for what cannot be read."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightspan.adapters.inject import adapt
from lightspan.adapters.lora import LoRA
from lightspan.adapters.peft import save_peft
from lightspan.cli.main import main


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (40, 24), "fc.weight": (64, 24), "fc.bias": (64,), "conv.weight": (20, 3, 3, 3)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def audit(*arguments: str) -> dict:
    assert main(["audit", *arguments, "--out", "out"]) == 0
    return json.loads(Path("out/audit.json").read_text())


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["audit", *arguments, "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert not Path("out").exists()
    return said


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3, groups=3), nn.Flatten(), nn.Linear(6, 5), nn.LayerNorm(5)
    )


def adapter(folder: str, seed: int = 0, train: list[str] | None = None) -> None:
    model = network()
    adapt(model, ["0", "1", "3"], LoRA(2, alpha=3, cap=True), train=train or [], show=False)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter)) if parameter.requires_grad else None
    save_peft(model, folder)


def test_a_file_a_folder_and_a_checkpoint_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    state = weights()
    save_file(state, "file.safetensors")
    Path("folder").mkdir()
    Path("folder/config.json").write_text('{"auto_map": {"AutoModel": "evil.Model"}}')
    index = {"weight_map": {name: f"part{i % 2}.safetensors" for i, name in enumerate(state)}}
    for part in ("part0", "part1"):
        file = f"{part}.safetensors"
        save_file({n: state[n] for n, at in index["weight_map"].items() if at == file}, f"folder/{file}")
    Path("folder/model.safetensors.index.json").write_text(json.dumps(index))
    torch.save({"state_dict": state}, "last.ckpt")
    reports = []
    for path in ("file.safetensors", "folder", "last.ckpt"):
        report = audit(path)
        reports.append(sorted((row["name"], row["kind"], json.dumps(row.get("a"))) for row in report["layers"]))
    assert reports[0] == reports[1] == reports[2]
    assert {name: kind for name, kind, _ in reports[0]} == {
        "conv.weight": "kernel",
        "embed.weight": "embedding",
        "fc.bias": "vector",
        "fc.weight": "matrix",
    }
    shown = capsys.readouterr().out
    assert "fc.weight" in shown
    assert "and 1 vectors with nothing to note" in shown


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pair_is_compared_and_its_page_loads_nothing(dtype: torch.dtype) -> None:
    a = weights(dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    change = torch.randn(64, 2, generator=generator) @ torch.randn(2, 24, generator=generator)
    save_file(a, "a.safetensors")
    save_file({**a, "fc.weight": (a["fc.weight"].float() + change).to(dtype)}, "b<script>.safetensors")
    report = audit("a.safetensors", "b<script>.safetensors", "--rank", "1")
    rows = {row["name"]: row for row in report["layers"]}
    assert rows["fc.weight"]["change"]["above"] == 2
    assert 0.4 < rows["fc.weight"]["pair"]["kept"] < 1
    assert rows["conv.weight"]["notes"] == ["unchanged"]
    assert report["ranks"]["99"] == 2
    page = Path("out/audit.html").read_text()
    assert not re.search(r"https?://|url\(|@import|<script|<link|<img|<iframe|\bsrc=|\bhref=", page, re.IGNORECASE)
    assert "b&lt;script&gt;" in page
    for title in ("Matrix by matrix", "The change", "Subspaces of A and B", "Spectra of the change", "Tensors"):
        assert f">{title}</h2>" in page
    assert audit("a.safetensors", "b<script>.safetensors", "--only", "fc.*")["layers"][0]["name"] == "fc.bias"


def test_an_adapter_counts_as_what_it_adds_alone_and_as_the_model_it_makes_beside_its_own() -> None:
    start = network().state_dict()
    save_file({f"backbone.{name}": tensor for name, tensor in start.items()}, "run.safetensors")
    save_file(start, "plain.safetensors")
    adapter("lora")
    alone = {row["name"]: row["a"] for row in audit("lora")["layers"]}
    beside = {row["name"]: row for row in audit("run.safetensors", "lora")["layers"]}
    assert list(alone) == ["0.weight", "1.weight", "3.weight"]
    for name, found in alone.items():
        change = beside[f"backbone.{name}"]["change"]
        assert found["norm"] == pytest.approx(change["norm"], rel=1e-6)
    assert alone["0.weight"]["rank"] == alone["3.weight"]["rank"] == 2
    assert audit("plain.safetensors", "run.safetensors")["only_b"] == []  # names are met without `backbone.`


def test_two_adapters_are_compared_as_changes(capsys: pytest.CaptureFixture[str]) -> None:
    adapter("one", train=["4.*"])
    adapter("two", seed=1)
    report = audit("one", "two")
    assert all(row["pair"]["relative"] > 0 for row in report["layers"])
    assert "one also replaces 2 tensors" in capsys.readouterr().err


def test_what_cannot_be_audited_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    save_file(weights(), "a.safetensors")
    save_file({"w": torch.ones(3, 3, dtype=torch.int8)}, "integers.safetensors")
    save_file({"other": torch.ones(3, 3)}, "other.safetensors")
    save_file({}, "none.safetensors")
    Path("damaged.safetensors").write_bytes(Path("a.safetensors").read_bytes()[:300])
    Path("empty.safetensors").write_bytes(b"")
    Path("empty").mkdir()
    adapter("lora")
    Path("run").mkdir()
    Path("run/metrics.jsonl").touch()
    for arguments, words in {
        ("integers.safetensors",): r"no tensor of floating-point numbers to look at, but w \(int8\)",
        ("none.safetensors",): "nothing at all",
        ("damaged.safetensors",): "not a complete safetensors file",
        ("empty.safetensors",): "not a complete safetensors file",
        ("empty",): "no complete checkpoint and no safetensors file",
        ("missing",): "does not exist",
        (
            "a.safetensors",
            "other.safetensors",
        ): "no tensor in common: the first has conv.weight, embed.weight, the other",
        ("a.safetensors", "a.safetensors", "a.safetensors"): "one checkpoint or compares two, but got 3",
        ("lora", "a.safetensors"): "name its model first: lightspan audit a.safetensors lora",
        ("a.safetensors", "lora"): "it belongs to another model",
        ("a.safetensors", "--rank", "0"): "rank=0 must be at least 1",
        ("a.safetensors", "--exact-up-to", "0"): "largest=0 must be at least 1",
        ("a.safetensors", "--only", "attn*"): "matches no tensor of a.safetensors",
    }.items():
        assert re.search(words, refused(capsys, *arguments)), arguments
    assert main(["audit", "a.safetensors", "--out", "run"]) == 2
    assert "is a run folder" in capsys.readouterr().err


def test_a_folder_that_holds_pickles_runs_none_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (Path("ran"),))

    torch.save({"state_dict": {"w": torch.ones(2, 2)}, "evil": Evil()}, "evil.ckpt")
    refused(capsys, "evil.ckpt")
    assert not Path("ran").exists()


def test_a_run_folder_is_its_newest_checkpoint() -> None:
    run = Path("run")
    (run / "checkpoints").mkdir(parents=True)
    for file in ("resolved.yaml", "provenance.json"):
        (run / file).write_text("{}")
    for step in (2, 4):
        file = run / f"checkpoints/step={step}.ckpt"
        torch.save({"state_dict": {f"w{step}": torch.ones(2, 2)}, "global_step": step}, file)
        os.utime(file, (step, step))
    report = audit(str(run))
    assert report["a"].endswith("step=4.ckpt")
    assert [row["name"] for row in report["layers"]] == ["w4"]
