"""What is merged keeps the format of its inputs: Hugging Face folders, sharded or not, PEFT adapters, safetensors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lightspan.cli.main import main
from lightspan.core.errors import UserError
from lightspan.merging.adapted import AdaptedWeights
from lightspan.merging.arithmetic import WeightedAverage
from lightspan.merging.product import write_product
from lightspan.merging.weights import open_weights

peft = pytest.importorskip("peft")

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 40}


def llama(seed: int, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES | changes, num_attention_heads=2, num_key_value_heads=1))


def saved(model: PreTrainedModel, folder: Path, **options: Any) -> str:
    model.save_pretrained(folder, **options)
    return str(folder)


def lora(model: PreTrainedModel, folder: Path, seed: int, **options: Any) -> dict[str, torch.Tensor]:
    """Writes a random adapter with PEFT; returns the weights that PEFT merges it to."""
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, **options))
    adapted.save_pretrained(folder)
    return {n: t.clone() for n, t in adapted.merge_and_unload().state_dict().items()}


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_hugging_face_folder_stays_one_that_transformers_loads(sharded: bool, tmp_path: Path, capsys: Any) -> None:
    options = {"max_shard_size": "5KB"} if sharded else {}
    places = [saved(llama(seed), tmp_path / f"m{seed}", **options) for seed in range(3)]
    (tmp_path / "m0" / "tokenizer.json").write_text('{"of": "the base"}')
    (tmp_path / "m0" / "modeling_mine.py").write_text("raise SystemExit")
    line = ["merge", *places[1:], "--base", places[0], "--method", "task_arithmetic", "--out", "out"]
    assert main([*line, "--set", "coefficients.init_args.scale=0.5"]) == 0
    assert "wrote out" in capsys.readouterr().out
    loaded = LlamaForCausalLM.from_pretrained("out", local_files_only=True).state_dict()
    base, one, two = (llama(seed).state_dict() for seed in range(3))
    for name, tensor in loaded.items():
        wanted = 0.5 * one[name].double() + 0.5 * two[name].double()
        torch.testing.assert_close(tensor, wanted.float(), rtol=1e-5, atol=1e-7)
        assert tensor.shape == base[name].shape
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "README.md"} <= names
    assert "modeling_mine.py" not in names
    assert ("model.safetensors.index.json" in names) == sharded
    if sharded:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index == json.loads((tmp_path / "m0" / "model.safetensors.index.json").read_text()) | {
            "metadata": {"total_size": sum(t.nbytes for t in loaded.values())}
        }
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(text in card for text in ("`task_arithmetic`", "| m1 |", "m2", "scale: 0.5", "library_name: transform"))
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == [places[0], *places[1:]]
    assert head["base_model_relation"] == "merge"
    assert 'LlamaForCausalLM.from_pretrained("FOLDER")' in card


@pytest.mark.parametrize(
    ("settings", "coefficients"),
    [
        (["task_arithmetic", "--base", "base"], {"base": "base", "a": "0.3", "b": "0.3"}),
        (
            ["task_arithmetic", "--base", "base", "--set", "coefficients.init_args.of_tasks.a=0.7"],
            {"base": "base", "a": "0.7", "b": "0.3"},
        ),
        (
            ["dare", "--base", "base", "--set", "coefficients.init_args.rate=0.5"],
            {"base": "base", "a": None, "b": None},
        ),
        (["ties", "--base", "base"], {"base": "base", "a": "1", "b": "1"}),
        (["average", "--set", "weights={a: 3, b: 1}"], {"a": "0.75", "b": "0.25"}),
        (["slerp", "--set", "t=0.2"], {"a": "0.8", "b": "0.2"}),
    ],
)
def test_a_model_card_says_what_each_parent_counts(settings: list[str], coefficients: dict[str, str | None]) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        save_file({"w": torch.full((4,), float(seed))}, f"{name}.safetensors")
    settings = [f"{s}.safetensors" if s == "base" else s for s in settings]
    assert main(["merge", "a.safetensors", "b.safetensors", "--out", "out", "--method", *settings]) == 0
    card = Path("out/README.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines() if line.startswith("| ")]
    found = {row[0]: row[1] for row in rows[1:]}
    assert found.keys() == coefficients.keys()
    assert all(found[name] == wanted for name, wanted in coefficients.items() if wanted is not None)
    assert all(float(found[name]) for name, wanted in coefficients.items() if wanted is None)
    assert 'network.load_state_dict(load_file("model.safetensors"))' in card


def test_adapters_are_merged_as_the_change_that_peft_makes_of_them(tmp_path: Path) -> None:
    base = saved(llama(0), tmp_path / "base")
    theirs = lora(llama(0), tmp_path / "lora", 1, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    assert main(["merge", "lora", "--base", base, "--method", "negation", "--out", "out"]) == 0
    assert main(["merge", "lora", "lora", "--base", base, "--method", "average", "--out", "average"]) == 0
    start = llama(0).state_dict()
    for out, share in (("out", -0.5), ("average", 1.0)):
        ours = load_file(tmp_path / out / "model.safetensors")
        for name, tensor in ours.items():
            wanted = start[name] + share * (theirs[name] - start[name])
            torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(theirs[name], start[name]) for name in start)


def test_weights_that_are_stored_as_inputs_by_outputs_are_told_by_the_layers_that_are_not_square(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=8, vocab_size=20))
    start = {n: t.clone() for n, t in model.state_dict().items()}
    saved(model, tmp_path / "base")
    theirs = lora(model, tmp_path / "lora", 1, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": False}))
    weights = AdaptedWeights(tmp_path / "lora", open_weights(tmp_path / "base"))
    changed = [name for name in weights.forms if not torch.equal(theirs[name], start[name])]
    assert len(changed) == 3
    for name in weights.forms:
        torch.testing.assert_close(weights.read(name).float(), theirs[name], rtol=1e-5, atol=1e-6)


def test_an_adapter_of_convolutions_is_read_under_the_names_of_a_run(tmp_path: Path) -> None:
    from torch import nn

    from lightspan.adapters.inject import adapt, fold
    from lightspan.adapters.lora import LoRA
    from lightspan.adapters.peft import save_peft

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3, groups=3), nn.Flatten(), nn.Linear(6, 5))
    start = {f"backbone.{name}": t.clone() for name, t in model.state_dict().items()}
    save_file(start, tmp_path / "run.safetensors")
    adapt(model, ["*"], LoRA(2, alpha=3, cap=True), show=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter)) if parameter.requires_grad else None
    save_peft(model, tmp_path / "lora")
    fold(model)
    weights = AdaptedWeights(tmp_path / "lora", open_weights(tmp_path / "run.safetensors"))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(weights.read(f"backbone.{name}").float(), tensor, rtol=1e-5, atol=1e-6)


def test_safetensors_stay_safetensors_and_say_what_they_were_made_of(tmp_path: Path, capsys: Any) -> None:
    for name, value in (("a", 1.0), ("step=4", 3.0)):
        save_file({"w": torch.full((2,), value)}, tmp_path / f"{name}.safetensors")
    Path("out").mkdir()  # an empty folder is as good as none
    assert main(["merge", "a.safetensors", "step=4.safetensors", "--method", "average", "--out", "out"]) == 0
    assert load_file("out/model.safetensors")["w"].tolist() == [2, 2]
    with safe_open("out/model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["merged"]).keys() == {"a", "step=4"}
    assert "library_name" not in Path("out/README.md").read_text()
    capsys.readouterr()
    assert main(["merge", "a.safetensors", "a.safetensors", "--method", "average", "--out", "out"]) == 2
    assert "--out out exists and is not an empty folder" in capsys.readouterr().err


def test_a_recipe_whose_first_checkpoint_is_a_folder_makes_a_folder(tmp_path: Path) -> None:
    saved(llama(0), tmp_path / "a")
    paths = ["checkpoints.first=a", "checkpoints.second=a"]
    assert main(["run", "merging/slerp", *paths, "--run", "out"]) == 0
    merged = LlamaForCausalLM.from_pretrained("out/merged", local_files_only=True).state_dict()
    assert all(torch.equal(tensor, llama(0).state_dict()[name]) for name, tensor in merged.items())


def spoilt(folder: Path, what: str) -> list[str]:
    """A command line that has to be refused."""
    base, other = saved(llama(0), folder / "base"), folder / "other"
    line = ["--base", base, "--method", "ties", "--out", "out"]
    if what == "another architecture":
        return [saved(llama(1, hidden_size=20), other), *line]
    if what == "a head of another size":
        return [saved(llama(1, vocab_size=41), other), *line]
    if what in ("missing", "extra", "NaN", "no checkpoint"):
        saved(llama(1), other)
        tensors = load_file(other / "model.safetensors")
        if what == "missing":
            del tensors["model.norm.weight"]
        elif what == "extra":
            tensors["model.more"] = torch.ones(1)
        else:
            tensors["model.norm.weight"][3] = torch.nan
        save_file(tensors, other / "model.safetensors")
        if what == "no checkpoint":
            (folder / "notes.ckpt").write_text("not a checkpoint")
            return [str(folder / "notes.ckpt"), *line]
        return [str(other), *line]
    if what in ("adapter of another model", "adapter of other sizes", "adapter alone", "adapter leads"):
        changes = {"hidden_size": 20} if what == "adapter of other sizes" else {"num_hidden_layers": 2}
        model = llama(0, **({} if what.startswith("adapter ") and what.endswith(("alone", "leads")) else changes))
        lora(model, other, 1, target_modules=["q_proj"])
        if what == "adapter leads":
            return [base, "--base", str(other), *line[2:]]
        return [str(other), *(["--method", "average", "--out", "out"] if what == "adapter alone" else line)]
    if what == "no base":
        return [base, *line[2:]]
    if what == "a shard is gone":
        saved(llama(1), other, max_shard_size="5KB")
        next(other.glob("*-00002-*")).unlink()
        return [str(other), *line]
    if what == "no such setting":
        return [base, *line, "--set", "densety=0.2"]
    if what == "a base for nothing":
        return [base, base, *line[:2], "--method", "slerp", "--out", "out"]
    assert what == "no such method"
    return [base, *line[:2], "--method", "tyes", "--out", "out"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("another architecture", r"lm_head.weight is [40, 16] in base but [40, 20] in other"),
        ("a head of another size", r"lm_head.weight is [40, 16] in base but [41, 16] in other"),
        ("missing", "model.norm.weight is in base but not in other"),
        ("extra", "model.more is in other but not in base"),
        ("NaN", "model.norm.weight of the checkpoint other holds NaN"),
        ("no checkpoint", "notes.ckpt"),
        ("adapter of another model", "which its base"),
        ("adapter of other sizes", "belong to a layer of other sizes than [16, 16]"),
        (
            "adapter alone",
            "is an adapter, a change of a model and no model of its own; name the model that it changes as the base",
        ),
        ("adapter leads", "is an adapter, a change of a model and no model of its own"),
        ("no base", "--method ties needs --base"),
        ("a shard is gone", "which is not in"),
        ("no such setting", "did you mean density"),
        ("a base for nothing", "--method slerp asks for no base, and no adapter needs one; leave --base out"),
        ("no such method", "did you mean merging/ties"),
    ],
)
def test_what_cannot_be_merged_is_said_in_one_line_and_nothing_is_written(
    what: str, message: str, tmp_path: Path, capsys: Any
) -> None:
    line = spoilt(tmp_path, what)
    capsys.readouterr()
    assert main(["merge", *line]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".lightspan*"))


def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    saved(llama(0), tmp_path / "m", max_shard_size="5KB")
    index = tmp_path / "m" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for file in ("../base.safetensors", 3, "x" * 5000):
        content["weight_map"]["model.norm.weight"] = file
        index.write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"which is not in|is no index"):
            open_weights(tmp_path / "m")
    index.write_text("[]")
    with pytest.raises(UserError, match="is no index of safetensors files"):
        open_weights(tmp_path / "m")


def test_a_merger_of_ones_own_needs_no_more_than_a_file_that_names_it(tmp_path: Path, capsys: Any) -> None:
    for seed, name in enumerate(("x/a", "y/a", "base")):
        Path(name).parent.mkdir(exist_ok=True)
        save_file({"w": torch.full((4,), float(seed))}, f"{name}.safetensors")
    Path("mine.yaml").write_text("merger: {class_path: lightspan.merging.arithmetic.WeightedAverage}")
    line = ["merge", "x/a.safetensors", "y/a.safetensors", "--out", "out", "--method", "mine.yaml"]
    assert main(line) == 0
    assert load_file("out/model.safetensors")["w"].tolist() == [0.5] * 4
    assert "note: y/a.safetensors is called a-2, since another checkpoint has the name a" in capsys.readouterr().err
    assert main(["merge", "x/a.safetensors", "x/a.safetensors", "--out", "two", "--method", "average"]) == 0
    assert "x/a.safetensors is given twice, and counts twice: as a and as a-2" in capsys.readouterr().err


@pytest.mark.parametrize(("method", "setting"), [("task_arithmetic", "scale=2"), ("dare", "rate=0.5")])
def test_a_setting_of_the_coefficients_is_told_where_it_belongs(method: str, setting: str, capsys: Any) -> None:
    assert main(["merge", "a", "--base", "b", "--out", "out", "--method", method, "--set", setting]) == 2
    name = setting.partition("=")[0]
    assert f"did you mean merger.init_args.coefficients.init_args.{name}?" in capsys.readouterr().err


def test_no_file_of_the_reader_becomes_part_of_a_merged_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"notes\.txt is a link that leads out of"):
        write_product(WeightedAverage(), {"a": open_weights(folder)}, out, {}, "average", {})
    assert not out.exists()


def test_the_links_of_the_hubs_own_cache_are_followed(tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "1234"
    for made in (blobs, folder):
        made.mkdir(parents=True)
    save_file({"w": torch.ones(2)}, blobs / "a")
    (blobs / "b").write_text("{}")
    (folder / "model.safetensors").symlink_to("../../blobs/a")
    (folder / "config.json").symlink_to("../../blobs/b")
    write_product(WeightedAverage(), {"a": open_weights(folder)}, tmp_path / "out", {}, "average", {})
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
