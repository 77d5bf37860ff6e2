"""The README's own code, taken from the page and run."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import rank_processes
import torch
import torchvision
from torchvision.models.resnet import BasicBlock

from lightspan.optim.subspace_file import apply_subspace

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language, first_words):
    """The one fenced block of a language that starts so."""
    found = [
        text for text in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if text.startswith(first_words)
    ]
    assert len(found) == 1, f"{len(found)} blocks of {language} start with {first_words!r}"
    return found[0]


def lightspan(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "lightspan", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.runs
def test_the_method_of_your_own_trains_from_its_recipe_and_beats_its_untrained_self(tmp_path):
    code = block("python", "# denoiser.py")
    assert len([line for line in code.splitlines() if line.strip()]) <= 42
    (tmp_path / "denoiser.py").write_text(code)
    (tmp_path / "denoiser.yaml").write_text(block("yaml", "# denoiser.yaml"))
    fit = "fit", "denoiser.yaml", "--allow-module", "denoiser", "--run", "run", "trainer.max_epochs=3"
    ended = rank_processes.launch(list(fit), 1, tmp_path, cwd=tmp_path)
    assert ended.statuses == [0], ended.said
    lines = (tmp_path / "run/metrics.jsonl").read_text()
    assert "probe/knn_accuracy" in lines


def test_the_callback_example_trains_a_module_that_knows_nothing_of_lightspan(tmp_path, monkeypatch):
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

    code = block("python", "from lightning import Trainer").replace("max_steps=1000", "max_steps=3, logger=False")
    data = torch.utils.data.DataLoader(torch.randn(8, 80), batch_size=4)
    names = {"your_module": Yours(), "your_data": data}
    exec(code, names)
    state = names["trainer"].optimizers[0].state[names["your_module"].layers.weight]
    assert state["exp_avg"].shape == (80, 64)


def trained(model, optimizer=None):
    """Three steps on noise, of what the model lets train."""
    generator = torch.Generator().manual_seed(0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 32, 32, generator=generator)).square().mean().backward()
        optimizer.step()
    model.eval()


def test_a_torchvision_model_is_adapted_and_opened_with_peft(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    code = block("python", "from lightspan.adapters.inject import adapt")
    assert len([line for line in code.splitlines() if line.strip()]) <= 6
    torch.manual_seed(0)
    model = torchvision.models.resnet.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)  # names as in ResNet-18
    pretrained = copy.deepcopy(model).eval()
    exec(code, {"model": model, "train": trained})
    x = torch.randn(2, 3, 32, 32)
    before = pretrained(x)
    opened = peft.PeftModel.from_pretrained(pretrained, "tuned").eval()
    torch.testing.assert_close(opened(x), model(x))
    assert not torch.allclose(before, model(x), atol=1e-3)


def test_all_weights_are_trained_in_500_directions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=5)
    start = copy.deepcopy(model)
    exec(block("python", "from functools import partial"), {"model": model, "train": trained})
    assert Path("tuned.safetensors").stat().st_size < 10_000  # with the names of 170 parameters
    apply_subspace("tuned.safetensors", start)
    for (name, expected), found in zip(model.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(expected, found), name


def test_the_overlay_example_checks_and_says_who_set_what(tmp_path):
    (tmp_path / "long.yaml").write_text(block("yaml", "# long.yaml"))
    lightspan("check", "language/quickstart", "-c", "long.yaml", cwd=tmp_path)
    why = lightspan("show", "language/quickstart", "-c", "long.yaml", "--why", "trainer.max_steps", cwd=tmp_path)
    assert "long.yaml:3" in why
    assert "2000" in why


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)\)", README))))
def test_every_link_leads_to_a_file(path):
    assert (ROOT / path).exists()
