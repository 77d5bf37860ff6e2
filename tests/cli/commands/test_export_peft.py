"""`lightspan export --to peft` of an adapted run, from a file and from the folder that ranks of FSDP2 wrote."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import rank_processes
import torch
from cli.commands.test_export import CONFIG
from export_runs import run_export
from safetensors.torch import load_file

from lightspan.adapters.inject import adapted_layers, remove
from lightspan.callbacks.training.adaptation import Adaptation
from lightspan.cli.commands.export import load_weights
from lightspan.cli.config.build import build, load_resolved
from lightspan.core.errors import UserError

peft = pytest.importorskip("peft")

ADAPTATION = {
    "class_path": "lightspan.callbacks.training.adaptation.Adaptation",
    "init_args": {
        "spec": {"class_path": "lightspan.adapters.svfit.SVFit", "init_args": {}},
        "match": ["*.q_proj", "*.v_proj"],
    },
}


def config(**trainer: Any) -> dict[str, Any]:
    return {**CONFIG, "trainer": {**CONFIG["trainer"], **trainer, "callbacks": {"adaptation": ADAPTATION}}}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "resolved.yaml").write_text(json.dumps(config()))
    (folder / "provenance.json").write_text(json.dumps({"recipe": "language/tiny"}))
    built = build(load_resolved(folder))
    Adaptation.act(built.trainer, built.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    torch.save({"state_dict": built.model.state_dict(), "global_step": 1}, folder / "checkpoints" / "last.ckpt")
    return folder


def backbone_of(folder: Path, checkpoint: Path) -> torch.nn.Module:
    built = build(load_resolved(folder))
    Adaptation.act(built.trainer, built.model)
    load_weights(built.model, checkpoint)
    return built.model.backbone.eval()


def under_peft(ours: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """The frozen backbone with what peft reads, and nothing of lightspan."""
    frozen = copy.deepcopy(ours)
    remove(frozen)
    return peft.PeftModel.from_pretrained(frozen, str(folder)).eval()


def test_peft_gives_the_logits_of_the_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_export(run_dir, "--to", "peft") == 0
    out, tokens = run_dir / "export" / "peft", torch.arange(16)[None]
    assert "read back with peft: largest output difference" in capsys.readouterr().out
    ours = backbone_of(run_dir, run_dir / "checkpoints" / "last.ckpt")
    with torch.no_grad():
        torch.testing.assert_close(under_peft(ours, out)(tokens).logits, ours(tokens).logits, rtol=0, atol=1e-5)
    files = {"adapter_config.json", "adapter_model.safetensors", "export.json", "README.md"}
    assert {path.name for path in out.iterdir()} == files
    assert "library_name: peft" in (out / "README.md").read_text()


def test_other_formats_of_an_adapted_run(run_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert run_export(run_dir, "--to", "safetensors") == 0
    assert run_export(run_dir, "--to", "safetensors", "--fold", "--out", str(run_dir / "folded")) == 0
    plain = load_file(run_dir / "folded" / "model.safetensors")
    assert plain.keys() == build(load_resolved(run_dir)).model.state_dict().keys()
    adapted = load_file(run_dir / "export" / "safetensors" / "model.safetensors")
    assert {name.replace(".base.", ".") for name in adapted if ".adapters." not in name} == plain.keys()
    with pytest.raises(UserError, match="--fold is an option of --to safetensors"):
        run_export(run_dir, "--to", "peft", "--fold")
    assert run_export(run_dir, "--to", "huggingface") == 0
    folded = AutoModelForCausalLM.from_pretrained(run_dir / "export" / "huggingface", local_files_only=True)
    ours, tokens = backbone_of(run_dir, run_dir / "checkpoints" / "last.ckpt"), torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(folded(tokens).logits, ours(tokens).logits, rtol=0, atol=1e-5)


def test_a_run_without_adapters_is_named(run_dir: Path) -> None:
    bare = {**CONFIG, "trainer": dict(CONFIG["trainer"])}
    (run_dir / "resolved.yaml").write_text(json.dumps(bare))
    model = build(load_resolved(run_dir)).model
    torch.save({"state_dict": model.state_dict(), "global_step": 1}, run_dir / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match="--to peft exports adapters, but CausalLM of this run has none"):
        run_export(run_dir, "--to", "peft")


@pytest.mark.ranks
def test_a_run_of_two_sharded_ranks_is_exported_from_its_folder(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    strategy = {"class_path": "lightspan.training.strategies.FSDP2"}
    content = config(devices=2, strategy=strategy, max_steps=2, enable_checkpointing=True)
    content["trainer"]["callbacks"]["checkpoint"] = {
        "class_path": "lightspan.callbacks.resilience.checkpoint.Checkpoint",
        "init_args": {"dirpath": "${run}/checkpoints", "every_n_train_steps": 2},
    }
    recipe.write_text(json.dumps(content))
    run = tmp_path / "run"
    ended = rank_processes.launch(["fit", str(recipe), "--run", str(run)], 2, tmp_path / "logs")
    assert ended.statuses == [0, 0], ended.said
    assert run_export(run, "--to", "peft", "--out", tmp_path / "out") == 0
    checkpoint = next(path for path in (run / "checkpoints").iterdir() if path.is_dir())
    ours, tokens = backbone_of(run, checkpoint), torch.arange(16)[None]
    moved = [layer.adapters["default"].shift_R.abs().max() for layer in adapted_layers(ours).values()]
    assert min(moved) > 0
    with torch.no_grad():
        theirs = under_peft(ours, tmp_path / "out")(tokens).logits
        torch.testing.assert_close(theirs, ours(tokens).logits, rtol=0, atol=1e-5)


def test_adapters_that_change_nothing_are_not_exported(run_dir, tmp_path, capsys):
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    saved = torch.load(checkpoint, weights_only=True)
    for name, tensor in saved["state_dict"].items():
        if "shift_R" in name:
            tensor.zero_()
    torch.save(saved, checkpoint)
    with pytest.raises(UserError, match=r"every adapter of this run is zero: .*--to huggingface"):
        run_export(run_dir, "--to", "peft", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
