"""`lightspan export`: what is written is what was trained, read back by the format's own loader, or nothing is."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from export_runs import run_export, run_with_checkpoint
from torch import nn

from lightspan.cli.config.build import build, load_resolved
from lightspan.cli.exports import huggingface
from lightspan.cli.exports.safetensors import write_safetensors
from lightspan.core.errors import UserError
from lightspan.training.checkpoints.folder import write_folder

CONFIG: dict[str, Any] = {
    "about": {"title": "t", "paper": "none", "family": "language"},
    "trainer": {"max_steps": 1, "accelerator": "cpu", "logger": {}, "enable_checkpointing": False},
    "model": {
        "class_path": "lightspan.methods.language.causal_lm.CausalLM",
        "init_args": {
            "backbone": {
                "class_path": "lightspan.backbones.language.llama",
                "init_args": {"width": 32, "depth": 1, "heads": 2, "mlp_width": 64, "context": 16},
            },
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        },
    },
    "data": {
        "class_path": "lightspan.datamodules.text.windows.ByteText",
        "init_args": {"batch_size": 4, "context": 16},
    },
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return run_with_checkpoint(tmp_path / "run", CONFIG, "language/tiny")


def saved(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_safetensors_hold_every_tensor_of_the_checkpoint(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    assert run_export(run_dir, "--to", "safetensors") == 0
    path = run_dir / "export" / "safetensors" / "model.safetensors"
    loaded, expected = load_file(path), saved(run_dir)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    with safe_open(path, "pt") as file:
        assert {"recipe": "language/tiny", "format": "pt"}.items() <= file.metadata().items()
    assert "largest tensor difference 0" in capsys.readouterr().out


def test_the_folder_of_a_sharded_run_gives_the_same_safetensors(run_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    expected = saved(run_dir)
    path = run_dir / "checkpoints" / "last.ckpt"
    path.unlink()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        write_folder({"state_dict": dict(expected)}, {"global_step": 1}, path)
    finally:
        dist.destroy_process_group()
    for given, out in ((run_dir, tmp_path / "a"), (path, tmp_path / "b")):
        assert run_export(given, "--to", "safetensors", "--out", out) == 0
        loaded = load_file(out / "model.safetensors")
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    (path / "__0_0.distcp").write_bytes(b"x")
    with pytest.raises(UserError, match=r"last.ckpt is damaged: __0_0.distcp is not as the manifest says"):
        run_export(path, "--to", "safetensors", "--out", tmp_path / "c")


def test_a_newer_one_that_is_torn_is_passed_over(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "checkpoints" / "step=2.ckpt").write_bytes(b"PK half")
    (run_dir / "checkpoints" / "latest").write_text("step=2.ckpt")
    assert run_export(run_dir, "--to", "safetensors") == 0
    assert "step=2.ckpt is cut off after 7 bytes" in capsys.readouterr().err


def test_tensors_that_share_memory_are_stored_once(tmp_path: Path) -> None:
    from safetensors import safe_open

    tied = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    tied[1].weight = tied[0].weight
    assert write_safetensors(tied, tmp_path, {}) == 0
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len(file.keys()) == 1


@pytest.mark.parametrize("values", [["nan", "1"], ["nan", "nan"], ["inf", "nan"], ["inf", "-inf"]])
def test_tensors_that_are_not_numbers_read_back_equal(tmp_path: Path, values: list[str]) -> None:
    broken = nn.Linear(2, 1, bias=False)
    broken.weight.data[0] = torch.tensor([float(value) for value in values])
    assert write_safetensors(broken, tmp_path, {}) == 0


def test_huggingface_loads_without_lightspan_and_says_the_same(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    assert run_export(run_dir / "checkpoints" / "last.ckpt", "--to", "huggingface") == 0
    loaded = AutoModelForCausalLM.from_pretrained(run_dir / "export" / "huggingface", local_files_only=True)
    expected = {name.removeprefix("backbone."): tensor for name, tensor in saved(run_dir).items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    ours = build(load_resolved(run_dir)).model
    ours.load_state_dict(saved(run_dir))
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=tokens).logits, ours.backbone.eval()(input_ids=tokens).logits)
    assert "largest output difference 0" in capsys.readouterr().out
    record = json.loads((run_dir / "export" / "huggingface" / "export.json").read_text())
    assert (record["recipe"], record["largest_difference"]) == ("language/tiny", 0)


def test_the_comparison_sees_a_changed_weight(tmp_path: Path) -> None:
    from lightspan.backbones.language import llama

    model = llama(width=32, depth=1, heads=2, mlp_width=64, context=16)
    model.save_pretrained(tmp_path)
    assert huggingface.largest_output_difference(model, tmp_path) == 0
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 0.5
    assert huggingface.largest_output_difference(model, tmp_path) > 1e-3


def test_encoders_are_compared_by_their_hidden_states(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8)
    config.patch_size = 4
    model = ViTModel(config)
    model.save_pretrained(tmp_path)
    assert huggingface.largest_output_difference(model, tmp_path) == 0


def test_an_export_that_differs_is_not_written(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface, "largest_output_difference", lambda backbone, folder: 2e-6)
    assert run_export(run_dir, "--to", "huggingface") == 1
    assert list((run_dir / "export").iterdir()) == []
    assert "this is more than 1e-06: nothing was written" in capsys.readouterr().out


def test_an_export_that_dies_half_way_leaves_the_earlier_one(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_export(run_dir, "--to", "huggingface")
    out = run_dir / "export" / "huggingface"
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def die(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface, "largest_output_difference", die)
    with pytest.raises(KeyboardInterrupt):
        run_export(run_dir, "--to", "huggingface", "--overwrite")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in out.parent.iterdir()] == ["huggingface"]


def test_an_earlier_export_is_replaced_only_on_demand(run_dir: Path) -> None:
    run_export(run_dir, "--to", "safetensors")
    with pytest.raises(
        UserError, match="contains an earlier export; name another folder, or add --overwrite, which replaces all"
    ):
        run_export(run_dir, "--to", "safetensors")
    assert run_export(run_dir, "--to", "safetensors", "--overwrite") == 0


def test_a_folder_that_is_no_export_is_never_replaced(run_dir: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"--out '.*/mine' exists and is not an earlier export"):
        run_export(run_dir, "--to", "safetensors", "--out", mine, "--overwrite")
    assert (mine / "thesis.tex").read_text() == "x"


def test_a_link_in_a_run_folder_does_not_lead_an_export_out_of_it(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (run_dir / "export").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="export is a link that leads out of its run folder"):
        run_export(run_dir, "--to", "safetensors")
    assert not any((tmp_path / "mine").iterdir())


def test_a_checkpoint_elsewhere_needs_its_run_folder_or_recipe(run_dir: Path, tmp_path: Path) -> None:
    away = tmp_path / "away" / "model.ckpt"
    away.parent.mkdir()
    (run_dir / "checkpoints" / "last.ckpt").rename(away)
    with pytest.raises(UserError, match=r"has no resolved.yaml, so the model of model.ckpt is not known; .* --run"):
        run_export(away, "--to", "safetensors")
    assert run_export(away, "--to", "safetensors", "--run", run_dir, "--out", tmp_path / "out") == 0
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(json.dumps(CONFIG))
    assert run_export(away, "--to", "safetensors", "--recipe", recipe, "--out", tmp_path / "out2") == 0


def test_merged_weights_are_exported_as_the_model_of_a_recipe(run_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    recipe, merged = tmp_path / "tiny.yaml", tmp_path / "merged"
    recipe.write_text(json.dumps(CONFIG))
    assert run_export(run_dir, "--to", "safetensors", "--out", merged) == 0  # a merge's file is like an export's
    with pytest.raises(UserError, match=r"merged/model.safetensors holds weights alone; name the recipe .* --out"):
        run_export(merged, "--to", "huggingface")
    with pytest.raises(UserError, match=r"merged/model.safetensors holds weights alone, .* nothing left to export"):
        run_export(merged, "--to", "safetensors", "--recipe", recipe, "--out", tmp_path / "again")
    for source, out in ((merged, tmp_path / "one"), (merged / "model.safetensors", tmp_path / "two")):
        assert run_export(source, "--to", "huggingface", "--recipe", recipe, "--out", out) == 0
        loaded = load_file(out / "model.safetensors")
        assert all(torch.equal(tensor, saved(run_dir)[f"backbone.{name}"]) for name, tensor in loaded.items())


@pytest.mark.parametrize("trainer", [{"accelerator": "gpu"}, {"accelerator": "cuda", "devices": 8, "strategy": "ddp"}])
def test_a_run_of_gpus_and_ranks_that_are_not_here_is_exported(run_dir: Path, trainer: dict[str, Any]) -> None:
    (run_dir / "resolved.yaml").write_text(json.dumps({**CONFIG, "trainer": {**CONFIG["trainer"], **trainer}}))
    assert run_export(run_dir, "--to", "safetensors") == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_precision_are_cast_and_it_is_said(
    run_dir: Path, capsys: pytest.CaptureFixture[str], dtype: torch.dtype
) -> None:
    state = {name: tensor.to(dtype) for name, tensor in saved(run_dir).items()}
    torch.save({"state_dict": state}, run_dir / "checkpoints" / "last.ckpt")
    assert run_export(run_dir, "--to", "safetensors") == 0
    name = str(dtype).removeprefix("torch.")
    assert f"{len(state)} tensors of {run_dir}/checkpoints/last.ckpt are cast from {name} to" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_weights_of_another_kind_of_number_are_refused(run_dir: Path, dtype: torch.dtype) -> None:
    state = saved(run_dir)
    state["backbone.lm_head.weight"] = state["backbone.lm_head.weight"].to(dtype)
    torch.save({"state_dict": state}, run_dir / "checkpoints" / "last.ckpt")
    name = str(dtype).removeprefix("torch.")
    message = f"of another kind of number: backbone.lm_head.weight {name} there, float32 here"
    with pytest.raises(UserError, match=message):
        run_export(run_dir, "--to", "safetensors")


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    for place, message in ((tmp_path, "is a folder without a checkpoint"), (tmp_path / "gone", "does not exist")):
        with pytest.raises(UserError, match=rf"'{place}' {message}; name RUN/checkpoints/NAME.ckpt or a run folder"):
            run_export(place, "--to", "safetensors")


def test_a_truncated_checkpoint_is_named(run_dir: Path) -> None:
    path = run_dir / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"no checkpoint of .*/run is whole: .*last.ckpt is cut off after \d+ bytes"):
        run_export(run_dir, "--to", "safetensors")
    with pytest.raises(UserError, match=r"last.ckpt is cut off .*; give the path of another checkpoint"):
        run_export(path, "--to", "safetensors")
    assert not (run_dir / "export").exists()


def test_a_checkpoint_with_foreign_objects_is_not_opened(run_dir: Path) -> None:
    torch.save({"state_dict": {}, "object": argparse.Namespace(a=1)}, run_dir / "checkpoints" / "last.ckpt")
    with pytest.raises(
        UserError, match=r"not loaded and no code in it was run \(Unsupported global: GLOBAL argparse.Namespace"
    ):
        run_export(run_dir, "--to", "safetensors")


def test_a_checkpoint_of_another_model_is_named_with_what_differs(run_dir: Path) -> None:
    state = saved(run_dir)
    state["backbone.extra"] = torch.zeros(1)
    state["backbone.lm_head.weight"] = torch.zeros(7, 32)
    torch.save({"state_dict": state}, run_dir / "checkpoints" / "last.ckpt")
    unknown, wrong = "only in it: backbone.extra", r"backbone.lm_head.weight \[7, 32\] there, \[256, 32\] here"
    message = rf"another model than .*\.CausalLM: {unknown}; of another shape: {wrong}; name the run folder"
    with pytest.raises(UserError, match=message):
        run_export(run_dir, "--to", "safetensors")


def test_a_file_without_weights_is_no_checkpoint(run_dir: Path) -> None:
    torch.save([1, 2], run_dir / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match="a torch file but not a checkpoint: it contains a list, but no 'state_dict'"):
        run_export(run_dir, "--to", "safetensors")


def test_huggingface_needs_a_transformers_backbone() -> None:
    module = nn.Module()
    with pytest.raises(UserError, match="Module is not one: it has no attribute `backbone`; use --to onnx"):
        huggingface.require_pretrained(module)
    module.backbone = nn.Linear(1, 1)
    with pytest.raises(
        UserError, match="its backbone is a Linear; use --to onnx, --to torch-export or --to safetensors"
    ):
        huggingface.require_pretrained(module)
