"""The code that README.md and the pages for beginners print, taken from them and run."""

import copy
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.models.resnet import BasicBlock

from lightspan.cli.main import main
from lightspan.optim.low_rank import presets
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.subspace_file import apply_subspace

ROOT = Path(__file__).resolve().parents[1]
# How the example of a callback in a module of one's own begins.
CALLBACK = "from lightning import Trainer\nfrom lightspan.callbacks"


def block(page: str, language: str, first_words: str) -> str:
    """The one fenced block of a language on a page that starts so."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [code for code in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL) if code.startswith(first_words)]
    assert len(found) == 1, f"{len(found)} blocks of {language} in {page} start with {first_words!r}"
    return found[0]


def lines_of(code: str) -> int:
    return len([line for line in code.splitlines() if line.strip()])


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 110


def test_the_callback_example_trains_a_module_that_knows_nothing_of_lightspan(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    import lightning

    class Yours(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Linear(80, 70)

        def training_step(self, batch, batch_idx):
            return self.layers(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    code = block("README.md", "python", CALLBACK)
    assert lines_of(code) <= 4
    data = torch.utils.data.DataLoader(torch.randn(8, 80), batch_size=4)
    names = {"your_module": Yours(), "your_data": data}
    exec(code.replace("max_steps=1000", "max_steps=3, logger=False"), names)
    state = names["trainer"].optimizers[0].state[names["your_module"].layers.weight]
    assert state["exp_avg"].shape == (80, 64)


@pytest.mark.parametrize("kind", ["timm", "gpt2", "llama"])
def test_the_callback_example_projects_the_hidden_matrices_of_usual_networks(kind, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    import lightning
    import timm
    import transformers

    sizes = {"vocab_size": 100, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "timm":
        options = {"depth": 1, "embed_dim": 96, "num_heads": 2, "img_size": 32, "num_classes": 3}
        net, batch = timm.create_model("vit_tiny_patch16_224", **options), torch.randn(4, 3, 32, 32)
    elif kind == "gpt2":
        config = transformers.GPT2Config(n_embd=96, n_positions=8, **sizes)
        net, batch = transformers.GPT2LMHeadModel(config), torch.randint(100, (4, 8))
    else:
        config = transformers.LlamaConfig(hidden_size=96, intermediate_size=128, tie_word_embeddings=False, **sizes)
        net, batch = transformers.LlamaForCausalLM(config), torch.randint(100, (4, 8))

    class Yours(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, batch_idx):
            found = self.net(batch)
            return (found if isinstance(found, torch.Tensor) else found.logits).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    code = block("README.md", "python", CALLBACK).replace("max_steps=1000", "max_steps=1")
    data = torch.utils.data.DataLoader(batch, batch_size=4)
    names = {"your_module": Yours(), "your_data": data}
    exec(code.replace("max_steps=1", "max_steps=1, logger=False, enable_checkpointing=False"), names)
    optimizer = names["trainer"].optimizers[0]
    for name, parameter in net.named_parameters():
        hidden = any(stack in name for stack in ("blocks.", ".h.", "layers.")) and parameter.ndim == 2
        size = optimizer.state[parameter]["exp_avg"].numel()
        if hidden:
            assert size < parameter.numel(), name
        elif kind != "timm":  # embeddings and the output head
            assert size == parameter.numel(), name


def test_the_ten_lines_of_the_front_page_train_with_the_state_that_it_says(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    page = "README.md"
    code = block(page, "python", "from lightning import Trainer\nfrom torch.optim")
    assert lines_of(code) <= 10
    assert code == block("docs/index.md", "python", "from lightning import Trainer")
    exec(
        code.replace("max_epochs=10", "max_steps=1, limit_val_batches=0, logger=False, enable_checkpointing=False"), {}
    )
    (promised,) = re.findall(r"`(optimiser state .*?)`", (ROOT / page).read_text(encoding="utf-8"))
    assert promised in capsys.readouterr().out


def test_the_views_of_the_project_page_are_checked_with_its_overlays(tmp_path, monkeypatch) -> None:
    page = "docs/a-project.md"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("my_views.py").write_text(block(page, "python", "# my_views.py"))
    for name in ("mine", "timm"):
        Path(f"{name}.yaml").write_text(block(page, "yaml", f"# {name}.yaml"))
    Path("my_pictures").mkdir()
    for number in range(20):
        Image.new("RGB", (40, 30), (10 * number, 0, 90)).save(f"my_pictures/{number}.png")
    command = block(
        page,
        "sh",
        "lightspan fit contrastive/simclr --images my_pictures --image-size 32 -c mine.yaml \\\n    data.",
    )
    arguments = shlex.split(command.replace("\\\n", " "))[2:]
    arguments = arguments[: arguments.index("--run")]
    try:
        assert main(["check", *arguments, "-c", "timm.yaml"]) == 0
    finally:
        sys.modules.pop("my_views", None)


def test_the_overlay_example_checks_and_says_who_set_what(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("long.yaml").write_text(block("docs/running.md", "yaml", "# long.yaml"))
    assert main(["check", "language/quickstart", "-c", "long.yaml"]) == 0
    assert main(["show", "language/quickstart", "-c", "long.yaml", "--why", "trainer.max_steps"]) == 0
    why = capsys.readouterr().out
    assert "long.yaml:3" in why
    assert "2000" in why


def test_the_first_method_trains_from_its_recipe_and_in_plain_python(tmp_path, monkeypatch) -> None:
    page = "docs/first-method.md"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as Python's own start in this folder has it
    code = block(page, "python", "# denoiser.py")
    assert lines_of(code) <= 42
    Path("denoiser.py").write_text(code)
    Path("denoiser.yaml").write_text(block(page, "yaml", "# denoiser.yaml"))
    command = block(page, "sh", "lightspan fit denoiser.yaml").split()[1:]
    try:
        assert main([*command, "--run", "run", "trainer.max_epochs=3"]) == 0
        assert "probe/knn_accuracy" in Path("run/metrics.jsonl").read_text()
        exec(block(page, "python", "# plain.py"), {})
    finally:
        sys.modules.pop("denoiser", None)


@pytest.mark.runs
def test_rendered_views_are_trained_on_and_scenes_are_drawn(tmp_path, monkeypatch, capsys) -> None:
    page = "docs/rendered.md"
    monkeypatch.chdir(tmp_path)
    Path("poses.yaml").write_text(block(page, "yaml", "# poses.yaml"))
    assert main(["check", "poses.yaml"]) == 0
    command = block(page, "sh", "lightspan fit poses.yaml").split()[1:]
    small = [
        "trainer.max_epochs=1",
        "data.init_args.size=256",
        "data.init_args.val_size=64",
        "trainer.log_every_n_steps=1",
    ]
    assert main([*command, *small]) == 0
    assert "train/loss" in Path("runs/poses/metrics.jsonl").read_text()
    exec(block(page, "python", "# scenes.py"), {})
    assert "torch.Size([128, 3, 64, 64]) tensor([0, 1, 2, 3, 4, 5, 6])" in capsys.readouterr().out


def test_a_folder_of_images_is_packed_and_trained_on(tmp_path, monkeypatch) -> None:
    page = "docs/own-images.md"
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for number, name in enumerate(("bird", "cat", "dog")):
            (folder := Path("photos", split, name)).mkdir(parents=True)
            for i in range(count):
                picture = pixels.integers(0, 60, (40 + i, 48, 3), dtype=np.uint8)
                picture[..., number] += 150
                Image.fromarray(picture).save(folder / f"{i}.{'png' if i % 2 else 'jpg'}")
    for line in block(page, "sh", "lightspan data pack").splitlines():
        assert main(line.split()[1:]) == 0
    Path("photos.yaml").write_text(block(page, "yaml", "# photos.yaml"))
    check, fit, report = (line.split()[1:] for line in block(page, "sh", "lightspan check").splitlines())
    assert main(check) == 0
    small = [
        "trainer.max_epochs=1",
        "data.init_args.image_size=32",
        "model.init_args.backbone.init_args.name=test_resnet",
    ]
    assert main([*fit, *small]) == 0
    assert "val/accuracy" in Path("runs/photos/metrics.jsonl").read_text()
    assert main(report) == 0


def trained(model, optimizer=None) -> None:
    """Three steps on noise, of what the model lets train."""
    generator = torch.Generator().manual_seed(0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 32, 32, generator=generator)).square().mean().backward()
        optimizer.step()
    model.eval()


def test_a_torchvision_model_is_adapted_and_opened_with_peft(tmp_path, monkeypatch) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    code = block("docs/adapters.md", "python", "from lightspan.adapters.inject import adapt")
    assert lines_of(code) <= 6
    torch.manual_seed(0)
    model = torchvision.models.resnet.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)  # names as in ResNet-18
    pretrained = copy.deepcopy(model).eval()
    exec(code, {"model": model, "train": trained})
    x = torch.randn(2, 3, 32, 32)
    before = pretrained(x)
    opened = peft.PeftModel.from_pretrained(pretrained, "tuned").eval()
    torch.testing.assert_close(opened(x), model(x))
    assert not torch.allclose(before, model(x), atol=1e-3)


def test_all_weights_are_trained_in_500_directions(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=5)
    start = copy.deepcopy(model)
    code = block("docs/random-subspaces.md", "python", "from functools import partial\nfrom torch.optim")
    exec(code, {"model": model, "train": trained})
    assert Path("tuned.safetensors").stat().st_size < 10_000  # with the names of 170 parameters
    apply_subspace("tuned.safetensors", start)
    for (name, expected), found in zip(model.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(expected, found), name


def test_the_complete_example_of_a_random_subspace_makes_its_weights_again(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(block("docs/random-subspaces.md", "python", "from functools import partial\n\nimport torch"), {})


@pytest.mark.parametrize("name", ["GaLore", "Fira", "APOLLO"])
def test_the_switches_shown_for_the_callback_are_those_of_the_preset(name) -> None:
    code = block("docs/optimisers.md", "python", "from lightspan.callbacks.training.subspace_projection")
    imports, lines = code.split("\n\n")
    exec(imports, names := {})
    (line,) = (line for line in lines.splitlines() if line.endswith(f"# {name}"))
    preset = {"Fira": presets.FiraAdam}.get(name) or getattr(presets, name)
    generator = torch.Generator().manual_seed(0)
    sides = [torch.nn.Parameter(torch.ones(264, 260)) for _ in range(2)]
    steps = LowRank(sides[:1], lr=1e-2, **eval(line, names).options), preset(sides[1:], lr=1e-2)
    for _ in range(2):
        gradient = torch.randn(264, 260, generator=generator)
        for side, optimizer in zip(sides, steps, strict=True):
            side.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(*sides)
    assert not torch.equal(sides[0], torch.ones(264, 260))


def test_every_line_shown_for_the_callback_can_be_made() -> None:
    exec(block("docs/optimisers.md", "python", "from lightspan.callbacks.training.subspace_projection"), {})


def test_the_audit_of_a_network_and_its_adapter_finds_what_the_page_says(tmp_path, monkeypatch, capsys) -> None:
    page = "docs/audit.md"
    monkeypatch.chdir(tmp_path)
    exec(block(page, "python", "# digits.py"), {"__name__": "digits"})
    for line in block(page, "sh", "lightspan audit").splitlines():
        assert main(line.split()[1:]) == 0
    alone, trained, adapter, change = (
        json.loads(Path("audits", name, "audit.json").read_text()) for name in ("base", "trained", "adapter", "change")
    )
    assert [row["name"] for row in change["layers"]] == ["0.weight", "2.weight", "4.weight"]
    assert {row["name"]: row["a"]["rank"] for row in change["layers"]} == {"0.weight": 8, "2.weight": 8, "4.weight": 8}
    # Trained weights differ between machines by more than rounding, so that only what the page concludes is asserted.
    assert max(adapter["ranks"].values()) < 8
    assert max(trained["ranks"].values()) > 8
    assert alone["b"] is None
    assert (Path("audits/adapter/audit.html")).read_text().count("<svg") > 10
    assert "overlap of rows" in capsys.readouterr().out


@pytest.mark.runs
def test_two_runs_are_listed_ranked_tagged_shown_and_deleted_as_the_page_says(tmp_path, monkeypatch, capsys) -> None:
    page = "docs/runs.md"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    printed = {}
    for first in ("lightspan fit", "lightspan runs --status", "lightspan runs tag"):
        for line in block(page, "sh", first).splitlines():
            assert main(shlex.split(line)[1:]) == 0, line
            printed[line] = capsys.readouterr().out
    heads, slow, fast, *remarks = printed["lightspan runs"].splitlines()
    shown = block(page, "text", "run ").splitlines()
    assert heads.split() == shown[0].split()
    for found, line in zip((slow, fast), shown[1:3], strict=True):
        assert found.split()[:-4] == line.split()[:-4]  # without what is measured
    assert remarks[0] == shown[3]
    best = printed["lightspan runs --best val/accuracy --metric val/loss_nats"].splitlines()
    assert best[1].startswith("runs/fast")
    assert best[3].startswith("best: the highest val/accuracy, judging by its name")
    assert len(json.loads(printed["lightspan runs --json"])) == 2
    assert Path("runs.csv").read_text().count("\n") == 3
    assert (
        printed["lightspan runs --tag baseline"]
        .splitlines()[1]
        .rstrip()
        .endswith("baseline paper  the rate of the paper")
    )
    report, *_ = block(page, "sh", "lightspan report").splitlines()
    assert main(shlex.split(report)[1:]) == 0
    clean = block(page, "sh", "lightspan runs clean").splitlines()
    for line in clean:
        assert main(shlex.split(line)[1:]) == 0
    assert [path.name for path in Path("runs").iterdir()] == ["fast"]
